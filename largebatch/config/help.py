"""Table of a run's settings: each key with its value in this run, its type and its description."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

from rich.table import Table

from largebatch.config.schema import Config
from largebatch.section import Section


def _takes(annotation: Any) -> str:
    """Return the values that a field accepts, as text."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _takes(parts[0])
    if origin is Literal:
        return " | ".join(str(part) for part in parts)
    if origin in (list, tuple):
        return (
            "["
            + ", ".join(_takes(part) for part in parts if part is not Ellipsis)
            + (", ...]" if origin is list else "]")
        )
    if parts and origin is not dict:
        return " | ".join(_takes(part) for part in parts)
    return {type(None): "null", dict: "{...}"}.get(
        origin or annotation, getattr(annotation, "__name__", str(annotation))
    )


def settings(section: Section, path: str = "") -> Iterator[tuple[str, Any, str, str]]:
    """Yield (key, value, accepted values, description) for every setting of a section and of the sections inside it."""
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from settings(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value, _takes(info.annotation), info.description or ""


def describe_settings(config: Config) -> Table:
    """Return the table of a run's settings."""
    table = Table(
        title="settings", title_justify="left", show_lines=False, pad_edge=False, box=None, padding=(0, 2, 0, 0)
    )
    table.add_column("flag", no_wrap=True)
    table.add_column("this run", overflow="fold", max_width=18)
    table.add_column("takes", overflow="fold", max_width=26)
    table.add_column("meaning")
    section = None
    for key, value, takes, meaning in settings(config):
        if section not in (None, key.partition(".")[0]) and "." in key:
            table.add_row()
        section = key.partition(".")[0]
        table.add_row(f"--{key}", "null" if value is None else str(value), takes, meaning)
    return table

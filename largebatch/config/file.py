"""Reading of a config: the YAML file, then ``--section.key VALUE`` flags, validated together, with one-line errors."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from largebatch.config import yaml_text
from largebatch.config.schema import FACTORY, Config, section_names
from largebatch.errors import UserError, nearest
from largebatch.section import Section, leaf_types, user_path


def short(value: Any) -> str:
    """Return a value as quoted in a message, with at most 80 characters."""
    quoted = "null" if value is None else _REPR.repr(value) if not isinstance(value, str) else value
    return quoted if len(quoted) <= 80 else f"{quoted[:77]}..."


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        UserError: if the file is missing, unreadable, not YAML, or not a mapping.
    """
    path = user_path(path, "config")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        near = nearest(path.name, [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else [])
        raise UserError(f"{path}: no such config file{near}") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{short(str(path))}: cannot be read as a text file ({reason})") from error
    try:
        values = yaml_text.load(text)
    except RecursionError as error:
        raise UserError(f"{path}: nested more deeply than a config is") from error
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{path}{place}: not valid YAML: {getattr(error, 'problem', None) or 'unreadable'}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected sections (data, model, batch, ...), got {type(values).__name__}")
    return values


class FlagText(str):
    """The text of a flag's value, which is parsed according to the type of its key."""


def parse_flags(flags: Sequence[str]) -> dict[str, Any]:
    """Parse ``--section.key VALUE`` and ``--section.key=VALUE`` into {"section.key": text of the value}.

    Raises:
        UserError: for a word that is not a flag, a flag without a value, or a flag that is given twice.
    """
    values: dict[str, Any] = {}
    words = iter(flags)
    for word in words:
        if not word.startswith("--") or len(word) < 3:
            raise UserError(f"command line: expected a flag like --batch.size 256, got '{word}'")
        key, equals, text = word[2:].partition("=")
        if not equals:
            following = next(words, None)
            if following is None:
                raise UserError(f"command line: --{key} needs a value, like --{key} VALUE")
            text = following
        if key in values:
            raise UserError(
                f"command line: --{key} is there twice, with {short(values[key])} and {short(text)}; leave one out"
            )
        values[key] = FlagText(text)
    return values


def _read_flag(key: str, text: FlagText, annotation: Any) -> Any:
    """Return the value of a flag. If its key takes text, a text that looks like another type remains text.

    Raises:
        UserError: if the text is not valid YAML, such as an open bracket, and the key does not take text.
    """
    kinds = {member if isinstance(member, type) else type(member) for member in leaf_types(annotation)}
    takes_text = bool(kinds & {str, Path})
    try:
        value = yaml_text.load_flag(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if takes_text:
            return str(text)
        problem = getattr(error, "problem", None)
        why = f" ({short(problem)})" if problem else ""
        raise UserError(f"command line: --{key}: '{short(str(text))}' cannot be read as a YAML value{why}") from error
    is_number = isinstance(value, int | float) and bool(kinds & {int, float})
    is_list = isinstance(value, list) and bool(kinds & {list, tuple})
    if isinstance(value, str) or not takes_text or type(value) in kinds or is_number or is_list:
        return str(value) if isinstance(value, str) else value
    return str(text)


def merge_flags(values: dict[str, Any], flags: Mapping[str, Any]) -> list[str]:
    """Set the values of flags in a config's values, in place; return warnings.

    A flag that changes a section's ``name`` removes the file's keys that the newly named kind does not have.
    """
    warnings = []
    for key, value in sorted(flags.items(), key=lambda item: not item[0].endswith(".name")):
        *path, last = key.split(".")
        section = values
        for part in path:
            inner = section.get(part, {})
            if not isinstance(inner, dict):
                raise UserError(f"command line: --{key}: '{part}' is not a section")
            section[part] = section = dict(inner)  # a copy, because a YAML alias may refer to the same section
        if isinstance(value, FlagText):
            value = _read_flag(key, value, _annotation(path, last, values))
        if last == "name" and len(path) == 1 and section.get("name") not in (None, value):
            fields = _fields_of(Config, path, {**values, path[0]: {"name": value}})
            unused = [k for k in section if fields and k not in fields]
            for k in unused:
                del section[k]
            if unused:
                warnings.append(f"{path[0]}.name: '{value}' has no {', '.join(unused)}; left out")
        section[last] = value
    return warnings


def _members(annotation: Any) -> Iterator[type[Section]]:
    """Yield the section classes in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    elif get_origin(annotation) is not None:
        for part in get_args(annotation):
            yield from _members(part)


def _is_section(field: Any) -> bool:
    info = Config.model_fields.get(field)
    return info is not None and any(_members(info.annotation))


def section_class(field: str, name: Any) -> type[Section] | None:
    """Return the class of a section of `Config`, chosen by its ``name`` if there are several kinds."""
    info = Config.model_fields.get(field)
    members = list(_members(info.annotation)) if info else []
    if len(members) <= 1:
        return members[0] if members else None
    wanted = FACTORY if isinstance(name, str) and ":" in name else name
    return next((member for member in members if wanted in section_names(member)), None)


def _annotation(path: Sequence[str], key: str, values: Mapping[str, Any]) -> Any:
    """Return the type of a key; `Any` for an unknown key, or for one in a factory's options."""
    if len(path) > 1:
        return Any
    section: type[Section] | None = Config
    if path:
        section = section_class(path[0], values[path[0]].get("name"))
        if section is None and key == "name":
            return str
    info = section.model_fields.get(key) if section else None
    return info.annotation if info else Any


def _fields_of(root: type[Section], path: Sequence[Any], values: Mapping[str, Any]) -> list[str]:
    """Return the known keys of the section at ``path``."""
    if not path:
        return list(root.model_fields)
    inner = values.get(str(path[0]))
    section = section_class(str(path[0]), inner.get("name") if isinstance(inner, Mapping) else None)
    return list(section.model_fields) if section else []


def _describe(error: ErrorDetails, values: Mapping[str, Any]) -> str:
    """Return a line for a validation error, with the key, the expected value and the given value."""
    loc = list(error["loc"])
    if len(loc) > 1 and loc[0] in ("data", "model", "optimizer", "schedule"):
        del loc[1]  # the tag of the union
    where = short(
        ".".join(str(part) for part in loc if not str(part).startswith(("constrained-", "literal[", "function-")))
    )
    kind, came = error["type"], error["input"]
    if kind == "extra_forbidden":
        known = _fields_of(Config, loc[:-1], values)
        section = ".".join(map(str, loc[:-1]))
        return f"{where}: unknown key{nearest(str(loc[-1]), known)}; {section or 'a run'} knows {', '.join(known)}"
    if kind == "missing":
        return f"{where}: missing; add it to the config or pass --{where} VALUE"
    if kind == "union_tag_invalid":
        names = [
            name for member in _members(Config.model_fields[str(loc[0])].annotation) for name in section_names(member)
        ]
        name = came.get("name") if isinstance(came, Mapping) else came
        return (
            f"{where}.name: unknown '{short(name)}'{nearest(str(name)[:80], names)}; expected one of {', '.join(names)}"
        )
    if kind == "union_tag_not_found":
        if not isinstance(came, Mapping):
            return f"{where}: expected a section with keys, got {short(came)}"
        return f"{where}.name: missing; say which one"
    message = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        message = "a section with keys"
    if kind == "string_type" and came is not None:
        message += "; put it in quotes" if isinstance(came, int | float) else ""
    if kind == "value_error" and isinstance(came, Mapping):
        return f"{where}: {message}"
    if message.startswith("expected "):
        return f"{where}: {message}"
    return (
        f"{where}: expected {message}, got {came!r}"
        if isinstance(came, str) and len(came) < 80
        else (f"{where}: expected {message}, got {short(came)}")
    )


def load_config(path: Path, flags: Mapping[str, Any] | None = None) -> tuple[Config, list[str]]:
    """Read a config file, apply flags, and check every value.

    Args:
        path: the YAML file.
        flags: {"section.key": value}, as returned by `parse_flags`.

    Returns:
        The config, and warnings about flags.

    Raises:
        UserError: for any error in the file or the flags, in one line.
    """
    values = read_yaml(path)
    for key in [key for key, value in values.items() if value is None and _is_section(key)]:
        values[key] = {}  # a heading without keys
    warnings = merge_flags(values, flags or {})
    return parse_config(values, str(path)), warnings


def parse_config(values: Mapping[str, Any], where: str = "config") -> Config:
    """Return the config with the given nested values.

    Raises:
        UserError: for the first error in them.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        details = error.errors()
        # Count the errors of a union's members once (a coefficient is a name or a number).
        places = {d["loc"][:2] for d in details}
        more = f" (and {len(places) - 1} more)" if len(places) > 1 else ""
        raise UserError(f"{where}: {_describe(details[0], values)}{more}") from error

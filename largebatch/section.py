"""The base of every config section, and what the fields of sections share."""

from __future__ import annotations

import importlib
import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from largebatch.errors import UserError, nearest

# Beyond what any run has, and what dates, sizes and float32 can hold.
LARGEST = 10**12
Coefficient = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, le=LARGEST, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False)]
# Durations of less than what a clock tells, or than a sample of any data set.
Minutes = Annotated[Positive, AfterValidator(lambda value: _no_less(value, 1e-9))]
Epochs = Annotated[Positive, AfterValidator(lambda value: _no_less(value, 1e-15))]
Count = Annotated[int, Field(ge=1, le=LARGEST)]
# Samples of a data set, each of which has its number among the floats, too.
NumSamples = Annotated[int, Field(ge=1, le=2**53)]
# What no machine has more of: widths of layers and classes; pixels of an image's side; layers one after the other.
Width = Annotated[int, Field(ge=1, le=2**20)]
Side = Annotated[int, Field(ge=1, le=2**14)]
Depth = Annotated[int, Field(ge=1, le=2**12)]


def _no_less(value: float, least: float) -> float:
    if value < least:
        raise ValueError(f"{least:g} or more")
    return value


class Section(BaseModel):
    """One section of a config. Unknown keys are refused; attribute docstrings become the command-line help."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse what pydantic would turn into a number: true is not 1, and a text is no number, whatever stands in it."""
        members = set(leaf_types(cls.model_fields[str(info.field_name)].annotation))
        if members & {int, float} and not members & {bool, str}:
            for item in value if isinstance(value, list | tuple) else (value,):
                if isinstance(item, bool) or (isinstance(item, str) and item not in members and _looks_like(item)):
                    shown = str(item).lower() if isinstance(item, bool) else f"the text '{item[:40]}'"
                    raise ValueError(f"expected a number, got {shown}")
        return value


def _looks_like(text: str) -> bool:
    """Return whether Python takes a text for a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def leaf_types(annotation: Any) -> Iterator[Any]:
    """Yield the types that an annotation is made of, and the values of its literals."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        yield from parts
    elif origin in (list, tuple, dict):
        yield origin
        yield from (member for part in parts if part is not Ellipsis for member in leaf_types(part))
    elif origin is Annotated:
        yield from leaf_types(parts[0])
    elif parts:
        yield from (member for part in parts for member in leaf_types(part))
    else:
        yield annotation


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings, named like ``section.key``."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def user_path(text: str | Path, where: str) -> Path:
    """Return a path that a user named, with ``~`` expanded; whatever it is asked for afterwards, there is an answer.

    Args:
        text: the path.
        where: the key or flag that named it, for the error.

    Raises:
        UserError: if it cannot be looked at: a user that is not known, a name that is too long, a folder that is closed.
    """
    try:
        path = Path(text).expanduser()
        path.stat()
    except FileNotFoundError:
        pass
    except NotADirectoryError:  # to whoever opens it, as good as not there
        pass
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError for ~nobody, ValueError for a null byte
        shown = f"{text}" if len(f"{text}") <= 120 else f"{text}"[:117] + "..."
        raise UserError(f"{where}: '{shown}': {getattr(error, 'strerror', None) or error}") from error
    return path


def displayable(text: str) -> str:
    """Return a text of which every letter can be shown: what no terminal and no font takes is escaped."""
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(letter: str) -> str:
    if "\udc80" <= letter <= "\udcff":  # a byte that is not UTF-8
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("unicode_escape", "surrogatepass").decode()


def import_factory(path: str, where: str) -> Callable[..., Any]:
    """Import ``package.module:attribute``.

    Args:
        path: module path and attribute, separated by a colon.
        where: the config key that named it, for the error.

    Raises:
        UserError: if the module or the attribute does not exist or is not callable, or the module fails or exits.
    """
    module_name, _, attribute = path.partition(":")
    if len(path) > 255 or not all(part.isidentifier() for part in module_name.split(".")):
        raise UserError(f"{where}: '{module_name[:80]}' is no name of a module; expected package.module:factory")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"{where}: cannot import '{module_name}' ({error}); is it on PYTHONPATH?") from error
    except (Exception, SystemExit) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, SystemExit):
            reason = f"it exits (code {error.code})"
        elif not isinstance(error, SyntaxError):  # which says its own place
            reason += f" ({last.filename}, line {last.lineno})"
        raise UserError(f"{where}: cannot import '{module_name}': {reason}") from error
    factory: Callable[..., Any] | None = getattr(module, attribute, None)
    if not callable(factory):
        known = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise UserError(f"{where}: module '{module_name}' has no callable '{attribute}'{nearest(attribute, known)}")
    return factory


def call_factory(path: str, section: str, options: Mapping[str, Any], offered: Mapping[str, Any]) -> Any:
    """Call the factory that a section names with its options, and with those of our own arguments that it takes.

    Args:
        path: ``package.module:attribute``.
        section: of the config, which has ``name`` and ``options``.
        options: keyword arguments.
        offered: our own, by name.

    Raises:
        UserError: if it cannot be imported, the options do not fit its signature, or it exits.
    """
    factory = import_factory(path, f"{section}.name")
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{section}.name: '{path}' does not say what arguments it takes; name a function written in Python"
        ) from error
    arguments = {**{name: value for name, value in offered.items() if name in signature.parameters}, **options}
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise UserError(f"{section}.options: {error}; the factory takes {signature}") from error
    try:
        return factory(**arguments)
    except SystemExit as error:
        raise UserError(f"{section}.name: '{path}' exits (code {error.code}) where it should return") from error


@contextmanager
def within_memory(section: str) -> Iterator[None]:
    """Say in a line what this machine has no memory for.

    Args:
        section: of the config, whose sizes ask for it.

    Raises:
        UserError: where something is not allocated, or no address reaches so far.
    """
    try:
        yield
    except (MemoryError, OverflowError, RuntimeError) as error:
        text = (str(error).splitlines() or [""])[0]
        signs = (
            "allocate memory",
            "out of memory",
            "Storage size calculation overflowed",
            "numel: integer multiplication",
        )
        if isinstance(error, RuntimeError) and not any(sign in text for sign in signs):
            raise
        raise UserError(
            f"{section}: this machine has no memory for what it describes ({text or type(error).__name__}); lower its sizes"
        ) from error

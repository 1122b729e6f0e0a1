"""Base class of all config sections, types of their fields, and helpers for values that users name."""

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

# An upper limit far above the values of real runs, which dates, sizes and float32 can still represent.
LARGEST = 10**12
Coefficient = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, le=LARGEST, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False)]
# Durations with lower limits, which are below the resolution of a clock and below one sample of any data set.
Minutes = Annotated[Positive, AfterValidator(lambda value: _no_less(value, 1e-9))]
Epochs = Annotated[Positive, AfterValidator(lambda value: _no_less(value, 1e-15))]
Count = Annotated[int, Field(ge=1, le=LARGEST)]
# Number of samples in a data set; a float64 represents each index exactly.
NumSamples = Annotated[int, Field(ge=1, le=2**53)]
# Upper limits above the capacity of any machine: widths of layers and numbers of classes; image sides in pixels; depths in
# layers.
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
        """Refuse values that pydantic would convert to a number: true is not 1, and the text "1" is not a number."""
        members = set(leaf_types(cls.model_fields[str(info.field_name)].annotation))
        if members & {int, float} and not members & {bool, str}:
            for item in value if isinstance(value, list | tuple) else (value,):
                if isinstance(item, bool) or (isinstance(item, str) and item not in members and _looks_like(item)):
                    shown = str(item).lower() if isinstance(item, bool) else f"the text '{item[:40]}'"
                    raise ValueError(f"expected a number, got {shown}")
        return value


def _looks_like(text: str) -> bool:
    """Return whether Python can convert a text to a float."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def leaf_types(annotation: Any) -> Iterator[Any]:
    """Yield the types in an annotation, and the values of its literals."""
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
    """Yield the values of nested mappings with their names, such as ``section.key``."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def user_path(text: str | Path, where: str) -> Path:
    """Return a path that a user named, with ``~`` expanded, after checking that it can be looked up; it need not exist.

    Args:
        text: the path.
        where: the key or flag with the path, for the error.

    Raises:
        UserError: if it cannot be looked up: an unknown user, a name that is too long, or a folder without access.
    """
    try:
        path = Path(text).expanduser()
        path.stat()
    except FileNotFoundError:
        pass
    except NotADirectoryError:  # treated as a missing file
        pass
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError for ~nobody, ValueError for a null byte
        shown = f"{text}" if len(f"{text}") <= 120 else f"{text}"[:117] + "..."
        raise UserError(f"{where}: '{shown}': {getattr(error, 'strerror', None) or error}") from error
    return path


def displayable(text: str) -> str:
    """Return a text in which characters that cannot be displayed are escaped."""
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(letter: str) -> str:
    if "\udc80" <= letter <= "\udcff":  # a byte that is not UTF-8
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("unicode_escape", "surrogatepass").decode()


def import_factory(path: str, where: str) -> Callable[..., Any]:
    """Import ``package.module:attribute``.

    Args:
        path: module path and attribute, separated by a colon.
        where: the config key with the path, for the error.

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
        elif not isinstance(error, SyntaxError):  # its message has the place
            reason += f" ({last.filename}, line {last.lineno})"
        raise UserError(f"{where}: cannot import '{module_name}': {reason}") from error
    factory: Callable[..., Any] | None = getattr(module, attribute, None)
    if not callable(factory):
        known = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise UserError(f"{where}: module '{module_name}' has no callable '{attribute}'{nearest(attribute, known)}")
    return factory


def call_factory(path: str, section: str, options: Mapping[str, Any], offered: Mapping[str, Any]) -> Any:
    """Call the factory that a section names with its options, and with those offered arguments that it takes.

    Args:
        path: ``package.module:attribute``.
        section: the section of the config with the keys ``name`` and ``options``.
        options: keyword arguments from the config.
        offered: keyword arguments that largebatch supplies if the factory has a parameter of that name.

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
    """Convert an error from a lack of memory into a `UserError` of one line.

    Args:
        section: the section of the config whose sizes need the memory.

    Raises:
        UserError: if an allocation fails, or a size exceeds the address range.
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

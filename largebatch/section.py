"""The base of every config section, and the one exception a user's mistake raises."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _is_number(value: Any) -> Any:
    if isinstance(value, bool):  # which Python takes for 1 and 0
        raise ValueError("expected a number, got " + str(value).lower())
    return value


# Beyond what any run has, and what dates, sizes and float32 can hold.
LARGEST = 10**12
Coefficient = Annotated[float, BeforeValidator(_is_number), Field(ge=0, lt=1)]
Positive = Annotated[float, BeforeValidator(_is_number), Field(gt=0, le=LARGEST, allow_inf_nan=False)]
NonNegative = Annotated[float, BeforeValidator(_is_number), Field(ge=0, le=LARGEST, allow_inf_nan=False)]
Count = Annotated[int, BeforeValidator(_is_number), Field(ge=1, le=LARGEST)]


class UserError(ValueError):
    """A mistake the user can mend: shown as one line, without a traceback, with exit code 2.

    The message says where, what was expected, what came, and what to do.

    Attributes:
        everywhere: every rank meets the same mistake (a config, say), so one of them says it for all.
    """

    everywhere = True


class SharedError(UserError):
    """A mistake of a rank, or of them all, that every rank was told of: one line a node says it."""


class UnreadableError(SharedError):
    """Samples cannot be read, and the run cannot or shall not go on without them."""


class LostRankError(RuntimeError):
    """The ranks can no longer reach each other; the message names those that are missing or failed first."""


class LostWorkerError(RuntimeError):
    """A worker process of a data loader died or hangs; the message names it and says what to do."""


class Section(BaseModel):
    """One section of a config. Unknown keys are refused; attribute docstrings become the command-line help."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


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


def first_few(items: Sequence[str], separator: str = "; ", most: int = 5) -> str:
    """Return the first few of several in one line, with the number of the others."""
    more = f" and {len(items) - most:,} more" if len(items) > most else ""
    return separator.join(items[:most]) + more


def nearest(word: str, known: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the closest known word, or the empty string."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{match[0]}'?)" if match else ""


def import_factory(path: str, where: str) -> Callable[..., Any]:
    """Import ``package.module:attribute``.

    Args:
        path: module path and attribute, separated by a colon.
        where: the config key that named it, for the error.

    Raises:
        UserError: if the module or the attribute does not exist or is not callable.
    """
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"{where}: cannot import '{module_name}' ({error}); is it on PYTHONPATH?") from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        known = [name for name in vars(module) if not name.startswith("_")]
        raise UserError(f"{where}: module '{module_name}' has no callable '{attribute}'{nearest(attribute, known)}")
    return factory

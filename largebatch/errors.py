"""The errors that a user sees as one line, and helpers that word lists and near misses in them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class UserError(ValueError):
    """A mistake that the user can correct: shown as one line, without a traceback, with exit code 2.

    The message says where the mistake is, what was expected, what was given, and what to do.

    Attributes:
        everywhere: whether every rank has the same mistake (in a config, for example), so that one rank reports it for all.
    """

    everywhere = True


class SharedError(UserError):
    """A mistake of one rank or of all ranks that every rank was told of, so that it is reported in one line per node."""


class UnreadableError(SharedError):
    """Samples cannot be read, and the run cannot continue without them, or was told not to."""


class LostRankError(RuntimeError):
    """The ranks can no longer reach each other; the message names those that are missing or failed first.

    Attributes:
        is_mistake: whether the other rank ended by a mistake that the user has to correct before another start.
    """

    is_mistake = False


class LostWorkerError(RuntimeError):
    """A worker process of a data loader died or hangs; the message names it and says what to do."""


def first_few(items: Sequence[str], separator: str = "; ", most: int = 5) -> str:
    """Return the first ``most`` items in one line, followed by the number of the others."""
    more = f" and {len(items) - most:,} more" if len(items) > most else ""
    return separator.join(items[:most]) + more


def nearest(word: str, known: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the closest known word, or the empty string."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{match[0]}'?)" if match else ""

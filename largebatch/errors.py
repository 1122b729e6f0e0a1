"""The errors that a user meets as one line, and how lists and near misses are worded in them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


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
    """The ranks can no longer reach each other; the message names those that are missing or failed first.

    Attributes:
        is_mistake: what ended the other rank is the user's to mend, and another start would meet it again.
    """

    is_mistake = False


class LostWorkerError(RuntimeError):
    """A worker process of a data loader died or hangs; the message names it and says what to do."""


def first_few(items: Sequence[str], separator: str = "; ", most: int = 5) -> str:
    """Return the first few of several in one line, with the number of the others."""
    more = f" and {len(items) - most:,} more" if len(items) > most else ""
    return separator.join(items[:most]) + more


def nearest(word: str, known: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the closest known word, or the empty string."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{match[0]}'?)" if match else ""

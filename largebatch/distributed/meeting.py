"""Ranks agree before they have a process group: on what they hold, and on what one of them could not do.

Collectives are of no use for it: ranks that hold other configs open other groups, and sums of other lengths abort. What
is compared travels through the store that the ranks meet through, to rank 0, which tells all of them what it found.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist

from largebatch.distributed.arrival import START_SECONDS, open_store
from largebatch.distributed.backend import Ranks
from largebatch.distributed.lifeline import Lifelines, hold
from largebatch.distributed.watch import GRACE_SECONDS, name_ranks, short_cause, wait_until
from largebatch.errors import LostRankError, SharedError, UserError, first_few
from largebatch.process.launched import is_under_torchrun

Shown = dict[str, Any]

# How long a mistake waits to be told to ranks that perhaps nobody starts.
PATIENCE_SECONDS = 20.0


class Meeting:
    """What the ranks of a run agree on before they open their process group; one rank agrees with itself.

    Args:
        ranks: this process among all. A group that is open already lends its store.
        seconds: how long to wait for the others to come; None for as long as ranks wait for each other.

    Attributes:
        store: through which the ranks met, for the engine to open its group; None where there is one rank, or a group.

    Raises:
        LostRankError: if they do not meet.
    """

    def __init__(self, ranks: Ranks, seconds: float | None = None) -> None:
        self.rank, self.world_size = ranks.rank, ranks.world_size
        self.seconds = max(ranks.timeout_seconds, START_SECONDS) if seconds is None else seconds
        self.store: dist.Store | None = None
        self._lines: Lifelines | socket.socket | None = None
        self._gone: set[int] = set()  # ranks whose processes have ended
        if self.world_size == 1:
            return
        if dist.is_initialized():
            # Runs that follow each other in one group use one store: each has a number of its own in it.
            store = dist.distributed_c10d._get_default_store()
            number = store.add(f"largebatch/meetings/{self.rank}", 1)
        else:
            self.store = store = open_store(ranks, seconds)
            number = 0
        self._notes = dist.PrefixStore(f"largebatch/meeting/{number}", store)
        self._notes.set(f"place/{self.rank}", f"{platform.node()}, process {os.getpid()}")
        self._lines = self._hold_lines()

    def _hold_lines(self) -> Lifelines | socket.socket | None:
        """Connect to rank 0, which is to see where a process is killed; a group that is open already sees it by itself."""
        if self.store is None:
            return None
        if self.rank > 0:
            self._notes.wait(["lines"], timedelta(seconds=self.seconds))
            return hold(os.environ["MASTER_ADDR"].strip(), int(self._notes.get("lines")), self.rank)
        lines = Lifelines()
        self._notes.set("lines", str(lines.port))
        return lines

    @contextmanager
    def agree(self, on: str, difference: Callable[[list[Shown]], str | None]) -> Iterator[Shown]:
        """Run a block on every rank, and leave it on all of them alike.

        Args:
            on: a word of its own for this block.
            difference: called on rank 0 with what each rank has shown, in part where the block failed; the line that
                tells what differs, or None.

        Yields:
            A mapping for the block to fill with what is to be shown, as JSON holds it.

        Raises:
            SharedError: on every rank, where they differ, or the block raised a `UserError` on one of them.
            LostRankError: where the block raised something else on another rank, or one was not heard of.
        """
        shown: Shown = {}
        raised: BaseException | None = None
        try:
            yield shown
        except (Exception, SystemExit) as error:
            raised = error
        if self.world_size == 1:
            if raised is not None:
                raise raised
            return
        is_own = raised is not None and not isinstance(raised, UserError)
        text = None if raised is None else f"{type(raised).__name__}: {raised}" if is_own else str(raised)
        try:
            verdict = self._exchange(
                on, {"shown": shown, "error": text, "is_own": is_own, "host": platform.node()}, difference
            )
        except RuntimeError as error:
            if raised is not None:
                raise raised from None
            raise LostRankError(
                "rank 0, which keeps the ranks' meeting place, is gone or cannot be reached: its own log says why "
                f"({short_cause(str(error))})"
            ) from error
        if raised is not None and is_own:
            raise raised
        if verdict is not None:
            raise (SharedError if verdict["is_mistake"] else LostRankError)(verdict["text"]) from raised

    def _exchange(self, on: str, account: Shown, difference: Callable[[list[Shown]], str | None]) -> Shown | None:
        """Return rank 0's verdict on the accounts of all ranks, None for agreement."""
        notes = self._notes
        notes.set(f"{on}/{self.rank}", json.dumps(account, default=str))
        if self.rank == 0:
            verdict = self._judge(on, difference)
            notes.set(f"{on}/verdict", json.dumps(verdict))
            if verdict is not None:  # the store may go with this process
                readers = self.world_size - 1 - len(self._gone)
                wait_until(lambda: notes.add(f"{on}/read", 0) >= readers, GRACE_SECONDS)
            return verdict
        if not wait_until(lambda: notes.check([f"{on}/0"]), self.seconds):
            return {"is_mistake": False, "text": self._missing([0], on)}
        # It waits as long for the others, and has then something to say.
        if not wait_until(lambda: notes.check([f"{on}/verdict"]), self.seconds + 2 * GRACE_SECONDS):
            return {"is_mistake": False, "text": self._missing([0], on)}
        verdict = json.loads(notes.get(f"{on}/verdict"))
        if verdict is not None:
            notes.add(f"{on}/read", 1)
        return verdict

    def _judge(self, on: str, difference: Callable[[list[Shown]], str | None]) -> Shown | None:
        deadline = time.monotonic() + self.seconds
        keys = [f"{on}/{rank}" for rank in range(self.world_size)]
        for key in keys:
            wait_until(partial(self._is_settled, keys, key), deadline - time.monotonic())
        missing = [rank for rank, key in enumerate(keys) if not self._notes.check([key])]
        ended = [self._place(rank) for rank in missing if rank in self._gone]
        if ended:
            line = f"{first_few(ended, ', ')} ended on the {on} without a word: killed, perhaps for want of memory"
            return {"is_mistake": False, "text": line}
        if missing:
            return {"is_mistake": False, "text": self._missing(missing, on)}
        accounts = [json.loads(self._notes.get(key)) for key in keys]
        text = difference([account["shown"] for account in accounts])
        if text is not None:
            return {"is_mistake": True, "text": text}
        failed: dict[str, list[int]] = {}
        for rank, account in enumerate(accounts):
            if account["error"] is not None:
                failed.setdefault(account["error"], []).append(rank)
        if not failed:
            return None
        lines = [
            text if len(ranks) == self.world_size else f"{name_ranks(ranks)}{_on_hosts(accounts, ranks)}: {text}"
            for text, ranks in failed.items()
        ]
        return {"is_mistake": not any(account["is_own"] for account in accounts), "text": first_few(lines)}

    def _is_settled(self, keys: list[str], key: str) -> bool:
        """Return whether a rank has left its account, or one that has not has ended."""
        if isinstance(self._lines, Lifelines):
            self._gone = self._lines.gone()
        return self._notes.check([key]) or not all(self._notes.check([keys[rank]]) for rank in self._gone)

    def _missing(self, ranks: list[int], on: str) -> str:
        places = first_few([self._place(rank) for rank in ranks], ", ")
        return f"no word from {places} on the {on} for {self.seconds:.0f} s: dead, or still at it"

    def _place(self, rank: int) -> str:
        known = self._notes.check([f"place/{rank}"])
        return f"rank {rank} ({self._notes.get(f'place/{rank}').decode() if known else 'which has not come'})"


def _on_hosts(accounts: list[Shown], ranks: list[int]) -> str:
    """Return the hosts of ranks in brackets; nothing where all ranks are on one host."""
    if len({account["host"] for account in accounts}) == 1:
        return ""
    return f" ({first_few(list(dict.fromkeys(accounts[rank]['host'] for rank in ranks)), ', ', most=3)})"


@contextmanager
def before_the_meeting(ranks: Ranks) -> Iterator[None]:
    """Run a block that comes before the ranks meet, and tell the others where it ends this one.

    Args:
        ranks: this process among all; one rank has nobody to tell.

    Raises:
        SharedError: where it raised a `UserError`, here or on another rank that came to the meeting with it.
    """
    try:
        yield
    except Exception as error:
        if ranks.world_size == 1:
            raise
        # Torchrun has started all of them. Where nobody has, a mistake is not kept waiting for long.
        try:
            meeting = Meeting(ranks, START_SECONDS if is_under_torchrun() else PATIENCE_SECONDS)
        except (LostRankError, UserError):
            raise error from None
        with meeting.agree("config", lambda shown: None):
            raise

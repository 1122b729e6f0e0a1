"""Agreement of the ranks before they have a process group: on their configs and data, and on failures of single ranks.

Collectives cannot be used: ranks with different configs would open different groups, and reductions of different lengths
abort. The values to compare go through the ranks' common store to rank 0, which sends its verdict to all ranks.
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

# How long a rank with an error waits to report it to other ranks, which may never be started.
PATIENCE_SECONDS = 20.0


class Meeting:
    """Agreement of the ranks of a run before they open their process group; a single rank needs none.

    Args:
        ranks: this process's rank and the world size. If a process group is open already, its store is used.
        seconds: how long to wait for the other ranks; None for the ranks' timeout, but at least `START_SECONDS`.

    Attributes:
        store: the ranks' common store, with which the engine opens its group; None for a single rank or an open group.

    Raises:
        LostRankError: if not all ranks connect in time.
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
            # Successive runs in one group share its store, in which each run has its own number.
            store = dist.distributed_c10d._get_default_store()
            number = store.add(f"largebatch/meetings/{self.rank}", 1)
        else:
            self.store = store = open_store(ranks, seconds)
            number = 0
        self._notes = dist.PrefixStore(f"largebatch/meeting/{number}", store)
        self._notes.set(f"place/{self.rank}", f"{platform.node()}, process {os.getpid()}")
        self._lines = self._hold_lines()

    def _hold_lines(self) -> Lifelines | socket.socket | None:
        """Connect to rank 0, which detects by this that a process is killed; an open process group detects it itself."""
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
        """Run a block on every rank, such that it succeeds on all ranks or raises on all ranks.

        Args:
            on: a unique name for this block.
            difference: called on rank 0 with the mapping of each rank, which may be incomplete if the block failed; it returns
                one line that describes the difference, or None.

        Yields:
            A mapping that the block fills with the values to compare; they must be serializable as JSON.

        Raises:
            SharedError: on every rank, if the ranks differ, or if the block raised a `UserError` on one of them.
            LostRankError: if the block raised another exception on another rank, or if a rank did not answer in time.
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
        """Return rank 0's verdict on the accounts of all ranks; None if they agree."""
        notes = self._notes
        notes.set(f"{on}/{self.rank}", json.dumps(account, default=str))
        if self.rank == 0:
            verdict = self._judge(on, difference)
            notes.set(f"{on}/verdict", json.dumps(verdict))
            if verdict is not None:  # the store may end with this process
                readers = self.world_size - 1 - len(self._gone)
                wait_until(lambda: notes.add(f"{on}/read", 0) >= readers, GRACE_SECONDS)
            return verdict
        if not wait_until(lambda: notes.check([f"{on}/0"]), self.seconds):
            return {"is_mistake": False, "text": self._missing([0], on)}
        # Rank 0 waits equally long for the other ranks before it gives its verdict.
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
        """Return whether a rank has written its account, or some rank has ended without writing one."""
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
    """Return the hosts of some ranks in parentheses; an empty string if all ranks are on one host."""
    if len({account["host"] for account in accounts}) == 1:
        return ""
    return f" ({first_few(list(dict.fromkeys(accounts[rank]['host'] for rank in ranks)), ', ', most=3)})"


@contextmanager
def before_the_meeting(ranks: Ranks) -> Iterator[None]:
    """Run a block before the ranks connect, and report an exception in it to the other ranks.

    Args:
        ranks: this process's rank and the world size.

    Raises:
        SharedError: if the block raised a `UserError` on any rank and the ranks could connect.
    """
    try:
        yield
    except Exception as error:
        if ranks.world_size == 1:
            raise
        # torchrun has started all ranks. Without it, report the error after a short wait.
        try:
            meeting = Meeting(ranks, START_SECONDS if is_under_torchrun() else PATIENCE_SECONDS)
        except (LostRankError, UserError):
            raise error from None
        with meeting.agree("config", lambda shown: None):
            raise

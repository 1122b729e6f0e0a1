"""Diagnosis of lost ranks after communication has failed.

A failed collective only reports that a connection closed or that it timed out. Therefore every rank that fails writes an
account of its failure to the process group's store, waits briefly for the accounts of the other ranks, and reports which
ranks wrote none (dead or hanging) and which ranks failed on their own.
"""

from __future__ import annotations

import os
import platform
import re
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import torch.distributed as dist

from largebatch.process.signals import handled_by

# How long a failed rank waits for the accounts of the others. Launchers kill the remaining processes 30 s after a failure.
GRACE_SECONDS = 5.0

# Parts of the messages of gloo's and the stores' plain RuntimeErrors when a peer is gone or does not answer.
_SIGNS = (
    "gloo",
    "Connection closed",
    "Connection reset",
    "Connection refused",
    "Timed out",
    "timeout",
    "Broken pipe",
    "NCCL",
)


PARTED = "the last passes of the ranks ran other modules, which this engine cannot do"


def short_cause(text: str) -> str:
    """Return the first sentence of a backend's message, without the leading source location."""
    return re.sub(r"^\[[^\]]*:\d+\] ", "", text).split(". ")[0]


def is_communication(error: BaseException) -> bool:
    """Return whether an exception means that other ranks could not be reached, rather than that this rank failed."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def cause_of(error: BaseException) -> str:
    """Return the root cause of an exception in one line, also of one by torch.distributed.checkpoint for several ranks."""
    failures = getattr(error, "failures", None)
    if failures:
        rank, wrapped = sorted(failures.items())[0]
        cause = cause_of(wrapped[0] if isinstance(wrapped, tuple) else wrapped)
        return cause if cause.startswith("rank ") else f"rank {rank}: {cause}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip()
    lines = (short_cause(text) if is_communication(error) else text).splitlines()
    return lines[0] if lines else type(error).__name__


class RankWatch:
    """Accounts that failed ranks leave in a store that all ranks can reach.

    Args:
        store: store of the process group; None if it is not known, in which case no accounts are exchanged.
        rank: rank of this process.
        world_size: number of ranks.

    Attributes:
        where: returns text about the position of this rank to append to an explanation, or an empty string.
        found_mistake: whether `explain` found only a user's mistake, reported by other ranks.
    """

    def __init__(self, store: dist.Store | None, rank: int, world_size: int) -> None:
        self.store = None if store is None else dist.PrefixStore("largebatch/watch", store)
        self.rank, self.world_size = rank, world_size
        self.where: Callable[[], str] = str
        self.found_mistake = False
        if self.store is not None:
            self.store.set(f"place/{rank}", f"{platform.node()}, process {os.getpid()}")

    def report(self, cause: str, is_own: bool, is_mistake: bool = False) -> None:
        """Write this rank's account: the cause, whether this rank failed on its own, and whether it is a user's mistake."""
        if self.store is not None:
            # If the rank that keeps the store is gone, the other ranks notice this too.
            with suppress(RuntimeError):
                self.store.set(
                    f"account/{self.rank}", f"{'mistake' if is_mistake else 'own' if is_own else 'peer'} {cause}"
                )

    def announce(self, line: str) -> None:
        """Publish a line on how this rank's pass differs from its previous one; it begins with the number of the pass."""
        if self.store is not None:
            with suppress(RuntimeError):
                self.store.set(f"route/{self.rank}", line)

    def _parted(self) -> str:
        """Return a description of ranks whose last passes ran different modules, a possible cause; else an empty string."""
        assert self.store is not None
        lines = {
            r: self.store.get(f"route/{r}").decode() for r in range(self.world_size) if self.store.check([f"route/{r}"])
        }
        last = max((int(line.split()[0]) for line in lines.values()), default=0)
        told = {rank: line.partition(" ")[2] for rank, line in lines.items() if int(line.split()[0]) == last}
        if not told or (len(told) == self.world_size and len(set(told.values())) == 1):
            return ""
        listed = "; ".join(f"rank {rank} {line}" for rank, line in told.items())
        return f"; {PARTED}: {listed}"

    def explain(self, cause: str, grace_seconds: float = GRACE_SECONDS) -> str:
        """Wait for the accounts of the other ranks, and return a line on which ranks are missing or failed on their own.

        Args:
            cause: message of the collective that failed on this rank.
            grace_seconds: how long to wait.
        """
        cause = short_cause(cause)
        if self.store is None:
            return f"another rank is dead, hangs or cannot be reached ({cause})"
        answers: list[str] = []
        # If the rank that keeps the store hangs or is cut off, a request to the store blocks beyond its own timeout, and
        # cannot be interrupted.
        asking = threading.Thread(target=lambda: answers.append(self._ask(cause, grace_seconds)), daemon=True)
        # A launcher that has noticed the failure too must not end this process before it has reported the missing ranks.
        with handled_by(signal.SIGTERM, signal.SIG_IGN):
            asking.start()
            asking.join(grace_seconds + 2.0)
        silent = f"no word from rank 0, which keeps the ranks' meeting place: dead, hanging or cut off ({cause})"
        said = answers[0] if answers else silent
        return said if PARTED in said else said + self.where()

    def _ask(self, cause: str, grace_seconds: float) -> str:
        assert self.store is not None
        self.report(cause, is_own=False)
        try:
            waiting = self._wait_for_accounts(grace_seconds)
            accounts = {r: self.store.get(f"account/{r}").decode() for r in range(self.world_size) if r not in waiting}
            parted = self._parted()
            missing = [f"rank {rank} ({self.store.get(f'place/{rank}').decode()})" for rank in waiting]
        except RuntimeError:
            return f"rank 0, which keeps the ranks' meeting place, is gone or cannot be reached: its own log says why ({cause})"
        own = {rank: text.split(" ", 1) for rank, text in accounts.items() if not text.startswith("peer ")}
        if own:
            self.found_mistake = all(kind == "mistake" for kind, _ in own.values())
            return "; ".join(f"rank {rank}: {text}" for rank, (_, text) in own.items())
        if missing:
            return f"no word from {', '.join(missing)}: dead, hanging or cut off ({cause}){parted}"
        return f"the link between the ranks broke ({cause}){parted}"

    def _wait_for_accounts(self, grace_seconds: float) -> list[int]:
        """Return the other ranks that write no account within this time."""
        assert self.store is not None
        waiting = [rank for rank in range(self.world_size) if rank != self.rank]
        deadline = time.monotonic() + grace_seconds
        while waiting and time.monotonic() < deadline:
            waiting = [rank for rank in waiting if not self.store.check([f"account/{rank}"])]
            time.sleep(0.05)
        return waiting


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Poll a condition at growing intervals, and return whether it held before the timeout; Ctrl-C can interrupt it."""
    deadline, pause = time.monotonic() + seconds, 0.001
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause)
        pause = min(0.25, 1.5 * pause)
    return True


def name_ranks(ranks: list[int]) -> str:
    """Return text such as "rank 3" or "ranks 1, 4 to 7" for ranks in ascending order."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    names = [str(run[0]) if len(run) == 1 else f"{run[0]}{' to ' if len(run) > 2 else ', '}{run[-1]}" for run in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(names)}"

"""What asks a run to save and stop, pre-emption by Slurm or Kubernetes, Ctrl-C or a time limit, and how ranks agree on it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor

from largebatch.process.launched import is_under_torchrun

Reason = Literal["interrupted", "signal", "time_limit"]
# In the order in which they count where several ask at once.
REASONS: tuple[Reason, ...] = ("interrupted", "signal", "time_limit")

# A launcher passes Ctrl-C on, so that its processes get it twice at once; a person presses it again later.
IMPATIENCE_SECONDS = 2.0

# A closed terminal and Ctrl-C say nothing to a run that was started under nohup or in a script's background. What schedulers
# send is heard even where a script ignores it for itself.
STAY_IGNORED = (signal.SIGHUP, signal.SIGINT)

# Ranks ask each other about this often whether to stop or to save: a signal reaches one of them.
AGREE_SECONDS = 0.5


class StopRequest:
    """Catches the signals while it is entered; the first one only takes note, so that the update can be finished.

    Slurm and Kubernetes send SIGTERM before they take the machine away, Slurm SIGUSR1 too where asked to. A second Ctrl-C,
    two seconds after the first or later, stops at once.

    Args:
        time_limit_minutes: ask for a stop after so long; None for no limit.
    """

    def __init__(self, time_limit_minutes: float | None = None) -> None:
        self.deadline = None if time_limit_minutes is None else time.monotonic() + 60.0 * time_limit_minutes
        self.noted: Reason | None = None
        self.noted_at = 0.0
        # A rank whose torchrun is gone is no longer watched or restarted, and its job may already be running again elsewhere.
        self.launcher = os.getppid() if is_under_torchrun() else None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # others cannot have handlers
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
                if number in STAY_IGNORED and signal.getsignal(number) == signal.SIG_IGN:
                    continue
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self.noted == "interrupted" and now - self.noted_at > IMPATIENCE_SECONDS:
            raise KeyboardInterrupt
        if self.noted is None:
            self.noted, self.noted_at = "interrupted" if number == signal.SIGINT else "signal", now

    def reason(self) -> Reason | None:
        """Return why this process should stop; None while it should not."""
        if self.noted is not None:
            return self.noted
        if self.launcher is not None and os.getppid() != self.launcher:
            return "signal"
        return "time_limit" if self.deadline is not None and time.monotonic() >= self.deadline else None


class StopCoordinator:
    """Lets ranks decide alike, at the same update, what each of them knows by itself: a signal, a clock.

    Args:
        sum_over_ranks: elementwise sum of a tensor over all ranks; a collective.
        rank: this rank; rank 0's clock is the one that counts for saving.
        world_size: number of ranks.
    """

    def __init__(self, sum_over_ranks: Callable[[Tensor], Tensor], rank: int, world_size: int) -> None:
        self.sum, self.rank, self.world_size = sum_over_ranks, rank, world_size
        self.restart(0)

    def restart(self, step: int) -> None:
        """Ask at the next update: the run goes on from update ``step``."""
        self.asked_at, self.asked_time, self.ask_next = step, time.monotonic(), step + 1

    def ask(self, step: int, reason: Reason | None, overdue: bool) -> tuple[Reason | None, bool]:
        """Return why all ranks stop, or None, and whether all save; twice a second, else nothing.

        Args:
            step: updates done.
            reason: why this rank should stop.
            overdue: whether a checkpoint is due by this rank's clock.
        """
        if step < self.ask_next:
            return None, False
        now = time.monotonic()
        wishes = [float(reason == known) for known in REASONS]
        wishes += [float(overdue and self.rank == 0), now - self.asked_time]
        if self.world_size > 1:
            wishes = self.sum(torch.tensor(wishes, dtype=torch.float64)).tolist()
        *reasons, save, seconds = wishes
        agreed = next((known for known, wish in zip(REASONS, reasons, strict=True) if wish), None)
        # All ranks compute the next time alike, from the mean of their clocks.
        pace = seconds / self.world_size / max(1, step - self.asked_at)
        waits = 1 if agreed or self.world_size == 1 else min(max(1, int(AGREE_SECONDS / max(pace, 1e-9))), 1000)
        self.asked_at, self.asked_time, self.ask_next = step, now, step + waits
        return agreed, save > 0

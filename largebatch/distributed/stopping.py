"""Requests to save and stop a run (pre-emption by Slurm or Kubernetes, Ctrl-C, a time limit), and the agreement of ranks."""

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
# In order of precedence, if there are several at once.
REASONS: tuple[Reason, ...] = ("interrupted", "signal", "time_limit")

# A launcher forwards Ctrl-C, so its processes receive it twice at nearly the same time; a user presses it again later.
IMPATIENCE_SECONDS = 2.0

# Signals that stay ignored if they were ignored at the start (nohup, background jobs of a script): a closed terminal and
# Ctrl-C. Signals of schedulers are handled even if a script ignores them.
STAY_IGNORED = (signal.SIGHUP, signal.SIGINT)

# Approximate interval at which ranks agree on stopping or saving, because a signal may reach only one of them.
AGREE_SECONDS = 0.5


class StopRequest:
    """Context manager that handles the signals; the first one is only recorded, so that the update can be finished.

    Slurm and Kubernetes send SIGTERM before they end a job; Slurm can also be configured to send SIGUSR1. A second Ctrl-C more
    than two seconds after the first stops the run immediately.

    Args:
        time_limit_minutes: time after which a stop is requested; None for no limit.
    """

    def __init__(self, time_limit_minutes: float | None = None) -> None:
        self.deadline = None if time_limit_minutes is None else time.monotonic() + 60.0 * time_limit_minutes
        self.noted: Reason | None = None
        self.noted_at = 0.0
        # A rank whose torchrun has ended is no longer monitored, and its job may already be running again elsewhere.
        self.launcher = os.getppid() if is_under_torchrun() else None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # only the main thread can set handlers
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
        """Return why this process should stop; None if it should not."""
        if self.noted is not None:
            return self.noted
        if self.launcher is not None and os.getppid() != self.launcher:
            return "signal"
        return "time_limit" if self.deadline is not None and time.monotonic() >= self.deadline else None


class StopCoordinator:
    """Makes all ranks decide the same at the same update, from the signals and the clock of each rank.

    Args:
        sum_over_ranks: returns the elementwise sum of a tensor over all ranks; a collective.
        rank: this rank; only rank 0's clock decides when to save.
        world_size: number of ranks.
    """

    def __init__(self, sum_over_ranks: Callable[[Tensor], Tensor], rank: int, world_size: int) -> None:
        self.sum, self.rank, self.world_size = sum_over_ranks, rank, world_size
        self.restart(0)

    def restart(self, step: int) -> None:
        """Continue from update ``step``, and let the ranks agree again at the next update."""
        self.asked_at, self.asked_time, self.ask_next = step, time.monotonic(), step + 1

    def ask(self, step: int, reason: Reason | None, overdue: bool) -> tuple[Reason | None, bool]:
        """Return why all ranks stop (or None), and whether all save; about twice a second, otherwise (None, False).

        Args:
            step: number of completed updates.
            reason: why this rank should stop; None if it should not.
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
        # All ranks compute the same next update, from the mean of their clocks.
        pace = seconds / self.world_size / max(1, step - self.asked_at)
        waits = 1 if agreed or self.world_size == 1 else min(max(1, int(AGREE_SECONDS / max(pace, 1e-9))), 1000)
        self.asked_at, self.asked_time, self.ask_next = step, now, step + waits
        return agreed, save > 0

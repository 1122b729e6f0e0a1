"""The rows that a run writes to its loggers about updates, evaluations and events."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from largebatch.reporting.progress import Logger, Progress, Row
from largebatch.scaling.rules import temperature
from largebatch.training.metering import NoiseMeter
from largebatch.training.step import Update


class Stopwatch:
    """Measures the wall time between rows, without the time spent in `paused`."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time spent in the block."""
        begin = time.perf_counter()
        yield
        self._since += time.perf_counter() - begin

    def lap(self) -> float:
        """Return the seconds since the last lap, and begin the next."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        return seconds


class RunLog:
    """Writes rows, each of which begins with the progress of the run.

    Args:
        logger: the logger that receives the rows.
        meter: the meter of the gradient noise; None if the noise is not measured.
        samples_per_epoch: number of samples in an epoch.
    """

    def __init__(self, logger: Logger, meter: NoiseMeter | None, samples_per_epoch: int) -> None:
        self.logger, self.meter, self.samples_per_epoch = logger, meter, samples_per_epoch
        self.stopwatch = Stopwatch()

    def _place(self, progress: Progress, samples: int | None = None) -> Row:
        epoch = progress.samples_seen / self.samples_per_epoch
        samples = progress.samples_seen if samples is None else samples
        row = {"step": progress.step, "samples": samples, "epoch": round(epoch, 6)}
        clock = None if self.meter is None else self.meter.clock
        return row if clock is None else {**row, "clock_samples": clock}

    def event(self, progress: Progress, text: str, samples: int | None = None) -> None:
        """Write a row about an event.

        Args:
            progress: the progress of the run.
            text: a sentence that describes the event.
            samples: number of samples to write in the row, if not the number seen. A run that resumes from a checkpoint before
                that number removes the row.
        """
        self.logger.log({**self._place(progress, samples), "event": text})

    def evaluation(self, progress: Progress, scores: Row) -> None:
        """Write a row with the scores of an evaluation."""
        if self.meter is not None:
            scores = {**scores, "noise_scale_by_layer": self.meter.by_layer()}
            if shares := self.meter.shares_by_layer():
                scores["stability_share_by_layer"] = shares
        self.logger.log({**self._place(progress), **scores})

    def update(self, progress: Progress, losses: float, update: Update) -> None:
        """Write a row about the updates since the last row, and begin to count for the next.

        Args:
            progress: the progress of the run.
            losses: sum of the losses of all samples since the last row, over all ranks.
            update: the last of these updates.
        """
        batch_size, values = update.batch_size, update.values
        seconds = self.stopwatch.lap()
        progress.train_seconds += seconds
        progress.loss = losses / progress.loss_samples if progress.loss_samples else math.nan
        row = {
            **self._place(progress),
            "loss": progress.loss,
            **{name: list(value) if isinstance(value, tuple) else value for name, value in values.items()},
            "batch_size": batch_size,
            "temperature": temperature(values["lr"], batch_size, values.get("momentum", 0.0)),
            "grad_norm": update.grad_norm,
            "samples_per_second": (progress.samples_seen - progress.row_samples) / seconds,
        }
        if progress.skipped:
            row["skipped"] = progress.skipped
        if progress.unreadable:
            row["unreadable"] = len(progress.unreadable)
        if self.meter is not None:
            row |= self.meter.row(batch_size)
        progress.loss_samples, progress.row_samples = 0, progress.samples_seen
        self.logger.log(row)

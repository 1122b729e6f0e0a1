"""The plan of a whole run, known before training: batch size and hyper-parameters at every number of samples seen."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from largebatch.scaling.rules import Reference, enough_units, temperature
from largebatch.scaling.schedules import Constant, Realization, Schedule, Warmup, batch_size_at


@dataclass(frozen=True)
class Stage:
    """Successive updates with one batch size and one formula for the learning rate.

    Args:
        first_sample: samples seen before the stage's first update.
        samples: number of samples in the stage.
        updates: number of optimizer steps in the stage.
        batch_size: B of the stage's full updates.
        lr_first: learning rate of the stage's first update.
        lr_last: learning rate of the stage's last full update.
        averaging: momentum, betas or alpha, under the name of the optimizer's argument.
    """

    first_sample: int
    samples: int
    updates: int
    batch_size: int
    lr_first: float
    lr_last: float
    averaging: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """Batch size and hyper-parameters as functions of samples seen.

    Args:
        reference: the hyper-parameters at the batch size they were tuned at.
        batch_size_at_start: B in samples before the schedule or a warm-up changes it.
        total_samples: number of samples in the whole run.
        samples_per_epoch: N_train, the number of training samples.
        schedule: factor of the reference temperature.
        warmup: factor of the learning rate at the start.
        realize: whether the schedule changes the learning rate, the batch size, or first the batch size and then the rate.
        max_batch_size: the batch size at which growth stops.
        multiple_of: grown batch sizes are multiples of this.
        at_epoch_end: ``carry`` lets a batch reach into the next epoch; ``cut`` ends each epoch with a smaller batch, whose
            learning rate follows from the scaling rule at that smaller size.
        growth: (samples seen, new batch size) of each change of the batch size that was decided during the run, in order.
        least_units: smallest number of micro-batches, over all ranks, that an update is split into to square gradients.
        wants_units: whether the second moment comes from these squares, so that a short average needs more micro-batches
            (`rules.enough_units`).

    Under the rule ``adascale`` the schedule, the warm-up and the end of the run are evaluated on AdaScale's clock, in samples
    of the reference run (`largebatch.noise.AdaScale`). Without that clock the plan assumes a gain of kappa.

    Example:
        >>> plan = Plan(Reference(256, 0.1, momentum=0.9), 8192, total_samples=81920, samples_per_epoch=40960)
        >>> plan.batch_size(0), round(plan.at(0)["lr"], 6), plan.num_updates()
        (8192, 3.2, 10)
    """

    reference: Reference
    batch_size_at_start: int
    total_samples: int
    samples_per_epoch: int
    schedule: Schedule = field(default_factory=Constant)
    warmup: Warmup = field(default_factory=Warmup)
    realize: Realization = "lr"
    max_batch_size: int | None = None
    multiple_of: int = 1
    at_epoch_end: Literal["carry", "cut"] = "carry"
    growth: tuple[tuple[int, int], ...] = ()
    least_units: int = 1
    wants_units: bool = False

    @property
    def most_samples(self) -> float:
        """The largest number of samples that the run may use; infinite where AdaScale's clock ends the run."""
        return math.inf if self.reference.rule == "adascale" else self.total_samples

    def full_batch_size(self, samples_seen: int) -> int:
        """Return B without the reduction of the last batch of an epoch or of the run."""
        decided = bisect_right(self.growth, samples_seen, key=lambda change: change[0])
        if decided:
            return self.growth[decided - 1][1]
        return batch_size_at(
            samples_seen,
            self.batch_size_at_start,
            self.schedule,
            self.warmup,
            self.realize,
            self.max_batch_size,
            self.multiple_of,
        )

    def units(self, batch_size: int) -> int:
        """Return the smallest number of micro-batches, over all ranks, that an update of ``batch_size`` is split into."""
        if not self.wants_units:
            return self.least_units
        values = self.reference.at(batch_size)
        beta2 = float(values["betas"][1] if "betas" in values else values.get("alpha", 1.0))
        return max(self.least_units, enough_units(beta2, batch_size / self.reference.batch_size))

    def batch_size(self, samples_seen: int) -> int:
        """Return the batch size of the update that starts after ``samples_seen`` samples."""
        size = int(min(self.full_batch_size(samples_seen), self.most_samples - samples_seen))
        if self.at_epoch_end == "cut":
            size = min(size, self.samples_per_epoch - samples_seen % self.samples_per_epoch)
        return size

    def at(self, samples_seen: int, clock: float | None = None) -> dict[str, Any]:
        """Return the optimizer's arguments for the update that starts after ``samples_seen`` samples.

            eta = eta(B) * schedule(s) * warmup(s)

        where eta(B) is the scaling rule's learning rate at this update's own batch size, so that under the linear rule a sample
        in a smaller last batch moves the weights as much as any other sample. With momentum this holds for SGD's form
        ``velocity``, but not where the buffer is a running average of mean gradients.

        Args:
            samples_seen: samples used by the updates before it.
            clock: AdaScale's clock in samples, at which the schedule and the warm-up are evaluated; ``samples_seen`` if None.
        """
        values = self.reference.at(self.batch_size(samples_seen))
        at = samples_seen if clock is None else clock
        values["lr"] *= self.schedule(at) * self.warmup.of_lr(at)
        return values

    def temperature(self, samples_seen: int) -> float:
        """Return eta0(s) = eta / ((1 - mu) * B) of the update that starts after ``samples_seen`` samples."""
        values = self.at(samples_seen)
        return temperature(values["lr"], self.batch_size(samples_seen), values.get("momentum", 0.0))

    def updates(self) -> Iterator[tuple[int, int]]:
        """Yield (samples seen before the update, batch size) for every update of the run."""
        samples_seen = 0
        while samples_seen < self.total_samples:
            size = min(self.batch_size(samples_seen), self.total_samples - samples_seen)
            yield samples_seen, size
            samples_seen += size

    def num_updates(self) -> int:
        """Return the number of optimizer steps in the whole run."""
        return sum(updates for _, _, updates, *_ in self._rows)

    def largest_batch(self) -> int:
        """Return the largest batch size of the run."""
        return max(full for *_, full, _ in self._rows)

    def num_stages(self) -> int:
        """Return the number of stages."""
        return len(self._rows)

    @cached_property
    def _rows(self) -> tuple[tuple[int, int, int, int, int], ...]:
        return tuple(self._walk())

    def _walk(self) -> Iterator[tuple[int, int, int, int, int]]:
        """Yield (first sample, samples, updates, batch size, start of the last full update) of each stage.

        Between two breakpoints the batch size is monotonic, so the end of each stage is found by bisection, and the running
        time depends on the number of stages, not of updates.
        """
        breaks = sorted({math.ceil(at) for at in (*self.schedule.breakpoints(), *self.warmup.breakpoints())})
        changes = sorted({*breaks, *(at for at, _ in self.growth), self.total_samples})
        row: tuple[int, int, int, int, int] | None = None
        samples_seen = segment = 0
        step = 1  # first stride of the search for a change, in updates (in samples, where epoch ends cut batches)
        while samples_seen < self.total_samples:
            full = self.full_batch_size(samples_seen)
            limit = min(changes[bisect_right(changes, samples_seen)], self.total_samples)
            if self.full_batch_size(limit - 1) != full:
                starts = range(samples_seen, limit, full if self.at_epoch_end == "carry" else 1)
                low, high = 1, step
                while high < len(starts) and self.full_batch_size(starts[high]) == full:
                    low, high = high, high + step
                    step *= 2
                near = starts[low : high + 1]
                changed = low + bisect_left(near, True, key=lambda at: self.full_batch_size(at) != full)
                limit = starts[changed] if changed < len(starts) else limit
                step = max(1, changed // 2)
            end, updates, last = self._run(samples_seen, limit, full)
            here = bisect_right(breaks, samples_seen)
            if row is not None and (row[3], segment) == (full, here):
                row = (row[0], end - row[0], row[2] + updates, full, row[4] if last is None else last)
            else:
                if row is not None:
                    yield row
                row = (samples_seen, end - samples_seen, updates, full, samples_seen if last is None else last)
            samples_seen, segment = end, here
        if row is not None:
            yield row

    def _run(self, start: int, limit: int, size: int) -> tuple[int, int, int | None]:
        """For updates of ``size`` that start before ``limit``, return their end, their number and the last full one's start."""
        epoch = self.samples_per_epoch if self.at_epoch_end == "cut" else self.total_samples
        updates, last = 0, None
        while start < limit:
            stop = min((start // epoch + 1) * epoch, self.total_samples)  # no update crosses it
            whole = 1
            if start % epoch == 0 and limit > start + 2 * epoch:  # whole epochs, all split alike
                whole = (limit - start) // epoch - 1
                stop = start + epoch
            count = -(-(min(stop, limit) - start) // size)
            full = min(count, (stop - start) // size)
            if full:
                last = start + (whole - 1) * epoch + (full - 1) * size
            updates += whole * count
            start = start + whole * epoch if whole > 1 else min(start + count * size, stop)
        return start, updates, last

    def batch_sizes(self) -> set[int]:
        """Return the batch sizes of all updates, including smaller last batches of an epoch or of the run."""
        sizes = set()
        for first, samples, updates, full, _ in self._rows:
            epoch = self.samples_per_epoch if self.at_epoch_end == "cut" else self.total_samples
            lasts = {
                min(epoch, self.total_samples) % full,
                (first + samples) % epoch % full,
                samples - (updates - 1) * full,
            }
            sizes |= {full} | {size for size in lasts if 0 < size < full}
        return sizes

    def stages(self, which: slice = slice(None)) -> list[Stage]:
        """Return the stages of the run, or those selected by ``which``."""
        stages = []
        for first, samples, updates, full, last in self._rows[which]:
            averaging = {k: v for k, v in self.at(last).items() if k in ("momentum", "betas", "alpha")}
            lr_first, lr_last = self.at(first)["lr"], self.at(last)["lr"]
            stages.append(Stage(first, samples, updates, full, lr_first, lr_last, averaging))
        return stages

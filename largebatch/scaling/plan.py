"""The plan of a whole run, known before training: which batch size and which hyper-parameters at which sample."""

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
    """Successive updates with one batch size and one formula of the learning rate.

    Args:
        first_sample: samples seen before its first update.
        samples: samples it uses.
        updates: its optimizer steps.
        batch_size: B of its full updates.
        lr_first: learning rate of its first full update.
        lr_last: learning rate of its last full update.
        averaging: momentum, or betas, or alpha, by the optimizer's name for it.
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
        batch_size_at_start: B where the factors of schedule and warm-up are 1, in samples.
        total_samples: samples of the whole run.
        samples_per_epoch: N_train.
        schedule: factor of the reference temperature.
        warmup: factor of the learning rate at the start.
        realize: whether the schedule moves the learning rate or the batch size.
        max_batch_size: where the batch size stops growing.
        multiple_of: grown batch sizes are multiples of this.
        at_epoch_end: ``carry`` lets a batch reach into the next epoch; ``cut`` ends each epoch with a smaller batch, whose
            learning rate is the rule's at its own size.
        growth: (samples seen, batch size) of each change that was decided during the run, in order.
        least_units: micro-batches that an update is cut into at the least, over all ranks, for the squares of their gradients.
        wants_units: whether the second moment comes from them, so that a short average of it needs more (`rules.enough_units`).

    Under the rule ``adascale`` the schedule, the warm-up and the end of the run are read on AdaScale's clock, in samples
    of the reference run (`largebatch.noise.AdaScale`); what the plan says without that clock holds if the gain is kappa.

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
        """Samples that the run uses at most; infinite where AdaScale's clock ends it."""
        return math.inf if self.reference.rule == "adascale" else self.total_samples

    def full_batch_size(self, samples_seen: int) -> int:
        """Return B before any cut at the end of an epoch or of the run."""
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
        """Return the micro-batches that an update of a batch size is cut into at the least, over all ranks."""
        if not self.wants_units:
            return self.least_units
        values = self.reference.at(batch_size)
        beta2 = float(values["betas"][1] if "betas" in values else values.get("alpha", 1.0))
        return max(self.least_units, enough_units(beta2, batch_size / self.reference.batch_size))

    def batch_size(self, samples_seen: int) -> int:
        """Return the samples of the update that starts after ``samples_seen`` samples."""
        size = int(min(self.full_batch_size(samples_seen), self.most_samples - samples_seen))
        if self.at_epoch_end == "cut":
            size = min(size, self.samples_per_epoch - samples_seen % self.samples_per_epoch)
        return size

    def at(self, samples_seen: int, clock: float | None = None) -> dict[str, Any]:
        """Return the optimizer's arguments for the update that starts after ``samples_seen`` samples.

            eta = eta(B) * schedule(s) * warmup(s)

        with eta(B) the reference's rule at this update's own batch size: under the linear rule a sample in a smaller last
        batch moves the weights as much as any other. A momentum buffer may weigh it otherwise: SGD's form ``velocity`` keeps
        that weight, a running average of mean gradients does not.

        Args:
            samples_seen: samples used by the updates before it.
            clock: where the schedule and the warm-up are read, if elsewhere: AdaScale's clock.
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
        """Yield (samples seen before it, batch size) of every update of the run."""
        samples_seen = 0
        while samples_seen < self.total_samples:
            size = min(self.batch_size(samples_seen), self.total_samples - samples_seen)
            yield samples_seen, size
            samples_seen += size

    def num_updates(self) -> int:
        """Return the optimizer steps of the whole run."""
        return sum(updates for _, _, updates, *_ in self._rows)

    def largest_batch(self) -> int:
        """Return the most samples of an update."""
        return max(full for *_, full, _ in self._rows)

    def num_stages(self) -> int:
        """Return how many stages there are."""
        return len(self._rows)

    @cached_property
    def _rows(self) -> tuple[tuple[int, int, int, int, int], ...]:
        return tuple(self._walk())

    def _walk(self) -> Iterator[tuple[int, int, int, int, int]]:
        """Yield (first sample, samples, updates, batch size, start of the last full update) of each stage.

        Between two breakpoints a batch size only grows or only falls, so that the end of each is found by bisection: the
        time goes with the stages, not with the updates.
        """
        breaks = sorted({math.ceil(at) for at in (*self.schedule.breakpoints(), *self.warmup.breakpoints())})
        changes = sorted({*breaks, *(at for at, _ in self.growth), self.total_samples})
        row: tuple[int, int, int, int, int] | None = None
        samples_seen = segment = 0
        step = 1  # updates (samples, where an epoch's end cuts them) that the batch size stayed what it was
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
        """Return where the updates of one batch size end that start before a limit, how many, and the last full one's start."""
        epoch = self.samples_per_epoch if self.at_epoch_end == "cut" else self.total_samples
        updates, last = 0, None
        while start < limit:
            stop = min((start // epoch + 1) * epoch, self.total_samples)  # no update goes past it
            whole = 1
            if start % epoch == 0 and limit > start + 2 * epoch:  # epochs that are all alike
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
        """Return the samples that an update may have, a smaller last one of an epoch or of the run among them."""
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

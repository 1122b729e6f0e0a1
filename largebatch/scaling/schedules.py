"""Schedules: factors of the reference temperature as functions of samples seen, and how a temperature is realised.

A schedule maps the number of samples seen to a factor of eta0. It is not a function of steps, because the number of samples in
a step changes as the batch grows.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

Realization = Literal["lr", "batch", "batch_then_lr"]


class Schedule(Protocol):
    """A factor of the reference temperature as a function of samples seen.

    ``robbins_monro`` says whether the schedule, if it never ended, would satisfy the classical conditions for convergence,
    eta_t > 0, eta_t -> 0, sum eta_t = infinity, sum eta_t^2 < infinity (McAllester, TTIC 31230), and ``why`` explains it.
    """

    robbins_monro: ClassVar[bool]
    why: ClassVar[str]

    def __call__(self, samples_seen: float) -> float:
        """Return the factor for the update that starts after ``samples_seen`` samples."""
        ...

    def breakpoints(self) -> tuple[int, ...]:
        """Return the numbers of samples at which the formula changes, for the table of stages."""
        ...


@dataclass(frozen=True)
class Constant:
    """The factor 1."""

    robbins_monro: ClassVar[bool] = False
    why: ClassVar[str] = "eta does not go to 0"

    def __call__(self, samples_seen: float) -> float:
        """Return 1."""
        return 1.0

    def breakpoints(self) -> tuple[int, ...]:
        """Return the empty tuple: the formula never changes."""
        return ()


@dataclass(frozen=True)
class Step:
    """factor**k after the k-th milestone (Goyal et al. 2017: 0.1 at epochs 30, 60 and 80 of 90)."""

    milestones_samples: tuple[int, ...]
    factor: float = 0.1
    robbins_monro: ClassVar[bool] = False
    why: ClassVar[str] = "eta stays at its last step and does not go to 0"

    def __call__(self, samples_seen: float) -> float:
        """Return factor ** (number of milestones reached)."""
        return self.factor ** bisect_right(self.milestones_samples, samples_seen)

    def breakpoints(self) -> tuple[int, ...]:
        """Return the milestones."""
        return self.milestones_samples


@dataclass(frozen=True)
class Polynomial:
    """final + (1 - final) * (1 - s/total)**power; power 1 is linear decay."""

    total_samples: int
    power: float = 1.0
    final: float = 0.0
    robbins_monro: ClassVar[bool] = False
    why: ClassVar[str] = "the sum of eta is finite: it ends at a fixed number of samples"

    def __call__(self, samples_seen: float) -> float:
        """Return the factor; constant after the end."""
        left = max(0.0, 1.0 - samples_seen / self.total_samples)
        return self.final + (1.0 - self.final) * float(left**self.power)

    def breakpoints(self) -> tuple[int, ...]:
        """Return the empty tuple: the formula never changes."""
        return ()


@dataclass(frozen=True)
class Cosine:
    """final + (1 - final) * (1 + cos(pi*s/total)) / 2 (Loshchilov and Hutter 2017, arXiv:1608.03983)."""

    total_samples: int
    final: float = 0.0
    robbins_monro: ClassVar[bool] = False
    why: ClassVar[str] = "the sum of eta is finite: it ends at a fixed number of samples"

    def __call__(self, samples_seen: float) -> float:
        """Return the factor; constant after the end."""
        progress = min(1.0, samples_seen / self.total_samples)
        return self.final + (1.0 - self.final) * 0.5 * (1.0 + math.cos(math.pi * progress))

    def breakpoints(self) -> tuple[int, ...]:
        """Return the empty tuple: the formula never changes."""
        return ()


@dataclass(frozen=True)
class InverseSqrt:
    """1 up to ``timescale_samples``, then sqrt(timescale/s) (Vaswani et al. 2017, arXiv:1706.03762)."""

    timescale_samples: int
    robbins_monro: ClassVar[bool] = False
    why: ClassVar[str] = "eta^2 falls as 1/t and its sum is infinite"

    def __call__(self, samples_seen: float) -> float:
        """Return the factor."""
        return math.sqrt(self.timescale_samples / max(samples_seen, self.timescale_samples))

    def breakpoints(self) -> tuple[int, ...]:
        """Return the end of the constant part."""
        return (self.timescale_samples,)


@dataclass(frozen=True)
class RobbinsMonro:
    """1 / (1 + s/tau)**p with 1/2 < p <= 1: the schedule that satisfies the classical conditions for convergence."""

    timescale_samples: int
    power: float = 1.0
    robbins_monro: ClassVar[bool] = True
    why: ClassVar[str] = "eta ~ t^-p with 1/2 < p <= 1"

    def __post_init__(self) -> None:
        if not 0.5 < self.power <= 1.0:
            raise ValueError(f"power: expected 1/2 < p <= 1 (else a sum condition fails), got {self.power}")

    def __call__(self, samples_seen: float) -> float:
        """Return the factor."""
        return float((1.0 + samples_seen / self.timescale_samples) ** -self.power)

    def breakpoints(self) -> tuple[int, ...]:
        """Return the empty tuple: the formula never changes."""
        return ()


@dataclass(frozen=True)
class Trapezoid:
    """1, then a linear fall to ``final`` over the last ``decay_samples``; with a warm-up, its graph is a trapezoid."""

    total_samples: int
    decay_samples: int
    final: float = 0.0
    robbins_monro: ClassVar[bool] = False
    why: ClassVar[str] = "the sum of eta is finite: it ends at a fixed number of samples"

    def __call__(self, samples_seen: float) -> float:
        """Return the factor; constant after the end."""
        left = max(0.0, (self.total_samples - samples_seen) / self.decay_samples)
        return self.final + (1.0 - self.final) * min(1.0, left)

    def breakpoints(self) -> tuple[int, ...]:
        """Return the start of the decay."""
        return (self.total_samples - self.decay_samples,)


@dataclass(frozen=True)
class Warmup:
    """A factor of the learning rate at the start of a run (Goyal et al. 2017, section 2.2).

    Args:
        name: ``gradual`` rises linearly, update by update, from ``start`` to 1; ``constant`` stays at ``start``; ``none`` is 1.
        samples: length in samples.
        start: factor at the first update; at eta_ref / eta the run starts from the reference's rate, as in Goyal et al.
        realize: ``lr`` applies the factor to the learning rate; ``batch`` applies it to the batch size, in doublings, and the
            learning rate follows the batch size by the scaling rule (Merrill et al. 2025, arXiv:2505.23971).

    Example:
        >>> warmup = Warmup("gradual", samples=1000, start=0.25, realize="batch")
        >>> [warmup.of_batch(samples) for samples in (0, 500, 1000)]
        [0.25, 0.5, 1.0]
    """

    name: Literal["gradual", "constant", "none"] = "none"
    samples: int = 0
    start: float = 1.0
    realize: Literal["lr", "batch"] = "lr"

    def of_lr(self, samples_seen: float) -> float:
        """Return the factor of the learning rate for the update that starts after ``samples_seen`` samples."""
        return self(samples_seen) if self.realize == "lr" else 1.0

    def of_batch(self, samples_seen: float) -> float:
        """Return the factor of the batch size, a power of 1/2."""
        if self.realize == "lr":
            return 1.0
        factor = self(samples_seen)
        if factor <= 0:
            raise ValueError("start: a batch cannot begin at 0 samples")
        # Rounding must not halve a batch whose factor is a power of 1/2.
        return 0.5 ** max(0, math.ceil(-math.log2(factor) - 1e-9))

    def __call__(self, samples_seen: float) -> float:
        """Return the factor, of the rate or of the batch size, for the update that starts after ``samples_seen`` samples."""
        if self.name == "none" or samples_seen >= self.samples:
            return 1.0
        if self.name == "constant":
            return self.start
        return self.start + (1.0 - self.start) * samples_seen / self.samples

    def breakpoints(self) -> tuple[int, ...]:
        """Return the end of the warm-up."""
        return () if self.name == "none" else (self.samples,)


def realized_batch_size(
    factor: float, realize: Realization, batch_size: int, max_batch_size: int | None = None, multiple_of: int = 1
) -> int:
    """Return the batch size that realises a factor of the temperature.

    If the temperature is to be divided by a, ``lr`` divides the learning rate by a; ``batch`` and ``batch_then_lr`` multiply
    the batch size by a, up to ``max_batch_size`` (meant for ``batch_then_lr``). The learning rate takes the part of the factor
    that the batch size does not: under the linear rule
    eta = (1 - mu) * B * eta0 * factor holds for all three.

    Args:
        factor: factor of the reference temperature; the batch grows where it is below 1.
        realize: ``lr``, ``batch`` or ``batch_then_lr``.
        batch_size: B at factor 1, in samples.
        max_batch_size: the largest batch size, in samples; about N_train/10 in Smith et al.
        multiple_of: B is rounded to a multiple of this.

    References:
        Smith et al. 2018, arXiv:1711.00489.
    """
    if realize == "lr":
        return batch_size
    wanted = math.inf if factor <= 0 else batch_size / factor
    limit = math.inf if max_batch_size is None else max_batch_size
    wanted = min(wanted, limit)
    if math.isinf(wanted):
        raise ValueError("factor: a temperature of 0 needs an infinite batch; set max_batch_size, or realize it by lr")
    rounded = max(1, round(wanted / multiple_of)) * multiple_of
    return rounded if rounded <= limit else rounded - multiple_of


def batch_size_at(
    samples_seen: float,
    batch_size: int,
    schedule: Schedule,
    warmup: Warmup,
    realize: Realization = "lr",
    max_batch_size: int | None = None,
    multiple_of: int = 1,
) -> int:
    """Return the batch size of the update that starts after ``samples_seen`` samples.

    Args:
        samples_seen: samples used by the updates before it.
        batch_size: B after the warm-up, where the schedule is 1.
        schedule: factor of the reference temperature.
        warmup: warm-up, applied to the batch size if its ``realize`` is ``batch``.
        realize: whether the schedule changes the learning rate or the batch size, as in `realized_batch_size`.
        max_batch_size: the largest batch size, in samples.
        multiple_of: B is rounded to a multiple of this.

    Example:
        >>> batch_size_at(500, 64, Step((400,), 0.5), Warmup(), "batch")
        128
    """
    factor = warmup.of_batch(samples_seen)
    if factor != 1.0:
        batch_size = max(1, round(batch_size * factor / multiple_of)) * multiple_of
    return realized_batch_size(schedule(samples_seen), realize, batch_size, max_batch_size, multiple_of)

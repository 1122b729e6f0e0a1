"""Sections of a config that name a schedule and a warm-up, in epochs; what they build counts in samples."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Literal

from pydantic import Field

from largebatch.errors import UserError
from largebatch.scaling import schedules
from largebatch.scaling.schedules import Realization, Schedule
from largebatch.section import NonNegative, Positive, Section


class ScheduleBase(Section):
    """What every schedule has."""

    name: str
    """Schedule: constant, step, linear, polynomial, cosine, inverse_sqrt, robbins_monro or trapezoid."""
    epochs: Positive
    """Length of the run in epochs."""
    realize: Realization = "lr"
    """A falling temperature falls by the lr, by a growing batch, or by batch_then_lr (Smith et al. 2018)."""

    @abstractmethod
    def build(self, samples_per_epoch: int) -> Schedule:
        """Return the factor of the temperature as a function of samples seen."""

    def total_samples(self, samples_per_epoch: int) -> int:
        """Return the samples of the whole run."""
        return round(self.epochs * samples_per_epoch)


class ConstantConfig(ScheduleBase):
    """A constant temperature."""

    name: Literal["constant"] = "constant"
    """Schedule: constant, step, linear, polynomial, cosine, inverse_sqrt, robbins_monro or trapezoid."""

    def build(self, samples_per_epoch: int) -> Schedule:
        """Return the schedule."""
        return schedules.Constant()


class StepConfig(ScheduleBase):
    """Steps at milestones."""

    name: Literal["step"]
    """Schedule: constant, step, linear, polynomial, cosine, inverse_sqrt, robbins_monro or trapezoid."""
    milestones_epochs: list[Positive]
    """Epochs after which the temperature is multiplied by the factor."""
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Factor at each milestone."""

    def build(self, samples_per_epoch: int) -> Schedule:
        """Return the schedule."""
        milestones = tuple(round(epoch * samples_per_epoch) for epoch in self.milestones_epochs)
        if list(milestones) != sorted(set(milestones)):
            raise UserError(f"schedule.milestones_epochs: expected rising epochs, got {self.milestones_epochs}")
        if milestones and milestones[-1] >= self.total_samples(samples_per_epoch):
            raise UserError(
                f"schedule.milestones_epochs: {self.milestones_epochs[-1]:g} lies at or past the end of the run "
                f"(schedule.epochs: {self.epochs:g}) and would never be reached"
            )
        return schedules.Step(milestones, self.factor)


class DecayConfig(ScheduleBase):
    """A fall over the whole run: linear, or polynomial, or along a cosine."""

    name: Literal["linear", "cosine"]
    """Schedule: constant, step, linear, polynomial, cosine, inverse_sqrt, robbins_monro or trapezoid."""
    final: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Factor of the temperature at the end."""

    def build(self, samples_per_epoch: int) -> Schedule:
        """Return the schedule."""
        total = self.total_samples(samples_per_epoch)
        return (
            schedules.Cosine(total, self.final)
            if self.name == "cosine"
            else schedules.Polynomial(total, 1.0, self.final)
        )


class PolynomialConfig(ScheduleBase):
    """A polynomial fall over the whole run."""

    name: Literal["polynomial"]
    """Schedule: constant, step, linear, polynomial, cosine, inverse_sqrt, robbins_monro or trapezoid."""
    power: Positive = 2.0
    """Power of the remaining share of the run."""
    final: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Factor of the temperature at the end."""

    def build(self, samples_per_epoch: int) -> Schedule:
        """Return the schedule."""
        return schedules.Polynomial(self.total_samples(samples_per_epoch), self.power, self.final)


class InverseSqrtConfig(ScheduleBase):
    """Constant, then falling as the inverse square root of samples."""

    name: Literal["inverse_sqrt"]
    """Schedule: constant, step, linear, polynomial, cosine, inverse_sqrt, robbins_monro or trapezoid."""
    timescale_epochs: Positive = 1.0
    """Epochs before the fall begins."""

    def build(self, samples_per_epoch: int) -> Schedule:
        """Return the schedule."""
        return schedules.InverseSqrt(max(1, round(self.timescale_epochs * samples_per_epoch)))


class RobbinsMonroConfig(ScheduleBase):
    """1 / (1 + s/tau)^p, which satisfies the classical conditions for convergence."""

    name: Literal["robbins_monro"]
    """Schedule: constant, step, linear, polynomial, cosine, inverse_sqrt, robbins_monro or trapezoid."""
    timescale_epochs: Positive = 1.0
    """tau in epochs."""
    power: Annotated[float, Field(gt=0.5, le=1)] = 1.0
    """p in (1/2, 1]."""

    def build(self, samples_per_epoch: int) -> Schedule:
        """Return the schedule."""
        return schedules.RobbinsMonro(max(1, round(self.timescale_epochs * samples_per_epoch)), self.power)


class TrapezoidConfig(ScheduleBase):
    """Stable, then a linear fall at the end; the warm-up section gives the rising edge."""

    name: Literal["trapezoid"]
    """Schedule: constant, step, linear, polynomial, cosine, inverse_sqrt, robbins_monro or trapezoid."""
    decay_epochs: Positive
    """Length of the fall at the end."""
    final: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Factor of the temperature at the end."""

    def build(self, samples_per_epoch: int) -> Schedule:
        """Return the schedule."""
        if self.decay_epochs > self.epochs:
            raise UserError(
                f"schedule.decay_epochs: expected at most schedule.epochs ({self.epochs:g}), got {self.decay_epochs:g}"
            )
        decay = max(1, round(self.decay_epochs * samples_per_epoch))
        return schedules.Trapezoid(self.total_samples(samples_per_epoch), decay, self.final)


class WarmupConfig(Section):
    """The learning rate at the start of a run (Goyal et al. 2017)."""

    name: Literal["gradual", "constant", "none"] = "none"
    """gradual: linear from the start value; constant: the start value throughout; none."""
    epochs: NonNegative = 0.0
    """Length in epochs."""
    start: Annotated[float, Field(ge=0, le=1)] | None = None
    """Start value as a factor of the scaled learning rate. None: the reference learning rate."""
    realize: Literal["lr", "batch"] = "lr"
    """What rises: lr, or batch, in doublings up to batch.size, with the lr following it (Merrill et al. 2025)."""

    def grows_batch(self) -> bool:
        """Return whether it is the batch that rises."""
        return self.name != "none" and self.realize == "batch"


SCHEDULES = (
    ConstantConfig,
    StepConfig,
    DecayConfig,
    PolynomialConfig,
    InverseSqrtConfig,
    RobbinsMonroConfig,
    TrapezoidConfig,
)

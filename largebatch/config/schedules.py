"""Config sections of schedules and warm-ups. Their lengths are in epochs; the objects they build use samples."""

from __future__ import annotations

from inspect import signature
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, get_args

from pydantic import Field

from largebatch.errors import UserError
from largebatch.scaling import schedules
from largebatch.scaling.schedules import Realization, Schedule
from largebatch.section import Epochs, NonNegative, Positive, Section

NAME = Field(
    description="Schedule: constant, step, linear, polynomial, cosine, inverse_sqrt, robbins_monro or trapezoid."
)
Factor = Annotated[float, Field(ge=0, lt=1)]


class ScheduleBase(Section):
    """Fields that all schedules have in common."""

    schedule_class: ClassVar[type[Schedule]]
    """Class of the schedule: a dataclass with the fields of the section, in samples instead of epochs."""

    name: Annotated[str, NAME]
    epochs: Epochs
    """Length of the run in epochs."""
    realize: Realization = "lr"
    """A falling temperature falls by the lr, by a growing batch, or by batch_then_lr (Smith et al. 2018)."""

    def total_samples(self, samples_per_epoch: int) -> int:
        """Return the number of samples in the whole run."""
        return round(self.epochs * samples_per_epoch)

    def build(self, samples_per_epoch: int) -> Schedule:
        """Return the schedule, a function from samples seen to the factor of the temperature.

        Raises:
            UserError: if part of the schedule lies after the end of the run.
        """
        values: dict[str, Any] = {"total_samples": self.total_samples(samples_per_epoch)}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if name.endswith("_epochs"):
                name, value = name.removesuffix("_epochs") + "_samples", self._samples(value, samples_per_epoch)
            values[name] = value
        known = signature(self.schedule_class).parameters
        return self.schedule_class(**{name: value for name, value in values.items() if name in known})

    def _samples(self, epochs: Any, samples_per_epoch: int) -> int | tuple[int, ...]:
        return max(1, round(float(epochs) * samples_per_epoch))


class ConstantConfig(ScheduleBase):
    """A constant temperature."""

    schedule_class: ClassVar = schedules.Constant

    name: Annotated[Literal["constant"], NAME] = "constant"


class StepConfig(ScheduleBase):
    """Steps at milestones."""

    schedule_class: ClassVar = schedules.Step

    name: Annotated[Literal["step"], NAME]
    milestones_epochs: list[Epochs]
    """Epochs after which the temperature is multiplied by the factor."""
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Factor at each milestone."""

    def _samples(self, epochs: Any, samples_per_epoch: int) -> tuple[int, ...]:
        milestones = tuple(round(epoch * samples_per_epoch) for epoch in epochs)
        if list(milestones) != sorted(set(milestones)):
            raise UserError(f"schedule.milestones_epochs: expected rising epochs, got {epochs}")
        if milestones and milestones[-1] >= self.total_samples(samples_per_epoch):
            raise UserError(
                f"schedule.milestones_epochs: {epochs[-1]:g} lies at or past the end of the run "
                f"(schedule.epochs: {self.epochs:g}) and would never be reached"
            )
        return milestones


class LinearConfig(ScheduleBase):
    """A linear fall over the whole run."""

    schedule_class: ClassVar = schedules.Polynomial

    name: Annotated[Literal["linear"], NAME]
    final: Factor = 0.0
    """Factor of the temperature at the end."""


class CosineConfig(ScheduleBase):
    """A fall along half a cosine over the whole run."""

    schedule_class: ClassVar = schedules.Cosine

    name: Annotated[Literal["cosine"], NAME]
    final: Factor = 0.0
    """Factor of the temperature at the end."""


class PolynomialConfig(ScheduleBase):
    """A polynomial fall over the whole run."""

    schedule_class: ClassVar = schedules.Polynomial

    name: Annotated[Literal["polynomial"], NAME]
    power: Positive = 2.0
    """Power of the remaining share of the run."""
    final: Factor = 0.0
    """Factor of the temperature at the end."""


class InverseSqrtConfig(ScheduleBase):
    """Constant, then falling as the inverse square root of samples."""

    schedule_class: ClassVar = schedules.InverseSqrt

    name: Annotated[Literal["inverse_sqrt"], NAME]
    timescale_epochs: Epochs = 1.0
    """Epochs before the fall begins."""


class RobbinsMonroConfig(ScheduleBase):
    """1 / (1 + s/tau)^p, which satisfies the classical conditions for convergence."""

    schedule_class: ClassVar = schedules.RobbinsMonro

    name: Annotated[Literal["robbins_monro"], NAME]
    timescale_epochs: Epochs = 1.0
    """tau in epochs."""
    power: Annotated[float, Field(gt=0.5, le=1)] = 1.0
    """p in (1/2, 1]."""


class TrapezoidConfig(ScheduleBase):
    """Stable, then a linear fall at the end; the warm-up section gives the rising edge."""

    schedule_class: ClassVar = schedules.Trapezoid

    name: Annotated[Literal["trapezoid"], NAME]
    decay_epochs: Epochs
    """Length of the fall at the end."""
    final: Factor = 0.0
    """Factor of the temperature at the end."""

    def _samples(self, epochs: Any, samples_per_epoch: int) -> int | tuple[int, ...]:
        if epochs > self.epochs:
            raise UserError(
                f"schedule.decay_epochs: expected at most schedule.epochs ({self.epochs:g}), got {epochs:g}"
            )
        return super()._samples(epochs, samples_per_epoch)


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
        """Return whether the warm-up raises the batch size."""
        return self.name != "none" and self.realize == "batch"


ScheduleConfig: TypeAlias = (
    ConstantConfig
    | StepConfig
    | LinearConfig
    | CosineConfig
    | PolynomialConfig
    | InverseSqrtConfig
    | RobbinsMonroConfig
    | TrapezoidConfig
)
SCHEDULES: tuple[type[ScheduleBase], ...] = get_args(ScheduleConfig)

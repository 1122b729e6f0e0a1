"""How hyper-parameters follow the batch size: scaling rules, schedules and plans, in plain arithmetic without torch."""

from largebatch.scaling.rules import (
    AveragingRule,
    LrRule,
    Reference,
    adam_per_sample,
    averaging_coefficient,
    averaging_length,
    averaging_updates,
    noise_scale,
    scaled_coefficient,
    scaled_lr,
    scaled_momentum,
    second_moment_coefficient,
    temperature,
)

__all__ = [
    "AveragingRule",
    "LrRule",
    "Reference",
    "adam_per_sample",
    "averaging_coefficient",
    "averaging_length",
    "averaging_updates",
    "noise_scale",
    "scaled_coefficient",
    "scaled_lr",
    "scaled_momentum",
    "second_moment_coefficient",
    "temperature",
]

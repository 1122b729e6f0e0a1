"""How hyper-parameters follow the batch size: rules, schedules and plans, arithmetic without torch."""

from largebatch.scaling.rules import (
    SHORTEST_SECOND_MOMENT,
    UNITS_SPANNED,
    AveragingRule,
    LrRule,
    Reference,
    adam_per_sample,
    averaging_coefficient,
    averaging_length,
    averaging_updates,
    micro_batches_needed,
    noise_scale,
    scaled_coefficient,
    scaled_lr,
    scaled_momentum,
    second_moment_coefficient,
    temperature,
)

__all__ = [
    "SHORTEST_SECOND_MOMENT",
    "UNITS_SPANNED",
    "AveragingRule",
    "LrRule",
    "Reference",
    "adam_per_sample",
    "averaging_coefficient",
    "averaging_length",
    "averaging_updates",
    "micro_batches_needed",
    "noise_scale",
    "scaled_coefficient",
    "scaled_lr",
    "scaled_momentum",
    "second_moment_coefficient",
    "temperature",
]

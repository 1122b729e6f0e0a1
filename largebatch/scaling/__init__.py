"""How hyper-parameters follow the batch size: rules, schedules and plans, arithmetic without torch."""

from largebatch.scaling.rules import (
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
    temperature,
)

__all__ = [
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
    "temperature",
]

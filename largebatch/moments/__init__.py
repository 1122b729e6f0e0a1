"""Per-sample squares of gradients: the statistic behind batch-invariant second moments."""

from largebatch.moments.presence import FirstUpdates, check_statistics
from largebatch.moments.tracking import (
    chosen_samples,
    grad_sample_sq,
    is_shadow,
    shadows,
    statistic_scale,
    track,
    tracked_parameters,
    untrack,
)
from largebatch.moments.verify import verify

__all__ = [
    "FirstUpdates",
    "check_statistics",
    "chosen_samples",
    "grad_sample_sq",
    "is_shadow",
    "shadows",
    "statistic_scale",
    "track",
    "tracked_parameters",
    "untrack",
    "verify",
]

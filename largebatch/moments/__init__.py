"""Per-sample squares of gradients: the statistic behind batch-invariant second moments."""

from largebatch.moments import conv, embedding, linear, norm
from largebatch.moments.tracking import (
    check_statistics,
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
    "check_statistics",
    "conv",
    "embedding",
    "grad_sample_sq",
    "is_shadow",
    "linear",
    "norm",
    "shadows",
    "statistic_scale",
    "track",
    "tracked_parameters",
    "untrack",
    "verify",
]

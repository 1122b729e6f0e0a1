"""The gradient noise scale, and AdaScale, from squares of gradients."""

from largebatch.noise.adascale import AVERAGING_UPDATES, AdaScale, adascale_gain
from largebatch.noise.estimator import (
    FEWEST_UPDATES,
    Noise,
    NoiseScale,
    efficiency,
    noise_estimates,
    partial_sums,
    power_sums,
    progress,
    ratio_band,
    reference_norm_ratio,
    student_quantile,
    sums_with,
)

__all__ = [
    "AVERAGING_UPDATES",
    "FEWEST_UPDATES",
    "AdaScale",
    "Noise",
    "NoiseScale",
    "adascale_gain",
    "efficiency",
    "noise_estimates",
    "partial_sums",
    "power_sums",
    "progress",
    "ratio_band",
    "reference_norm_ratio",
    "student_quantile",
    "sums_with",
]

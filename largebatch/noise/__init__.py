"""The gradient noise scale, AdaScale, and the stability limit of the step, from squared gradients."""

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
from largebatch.noise.limit import (
    change_ratio,
    curvature_of_steps,
    largest_kappa,
    share_of_change,
    stability_share,
    temperature_excess,
)

__all__ = [
    "AVERAGING_UPDATES",
    "FEWEST_UPDATES",
    "AdaScale",
    "Noise",
    "NoiseScale",
    "adascale_gain",
    "change_ratio",
    "curvature_of_steps",
    "efficiency",
    "largest_kappa",
    "noise_estimates",
    "partial_sums",
    "power_sums",
    "progress",
    "ratio_band",
    "reference_norm_ratio",
    "share_of_change",
    "stability_share",
    "student_quantile",
    "sums_with",
    "temperature_excess",
]

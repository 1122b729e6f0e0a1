"""Gradient noise: the batch size that a problem can use, from the squared gradients that training tracks anyway.

Notation: B is the global batch size in samples, ghat the mean gradient of one update, G the gradient over all data, Sigma
the covariance of one sample's gradient, n the independent units whose squares were tracked (samples, or micro-batches),
W the ranks over which gradients were averaged.

    tr(Sigma) = B/(n-1) * (q - |ghat|^2)        q = scale * (the shadow's gradient summed over elements), scale = n/W
    |G|^2     = |ghat|^2 - tr(Sigma)/B          both estimates are unbiased
    B_simple  = tr(Sigma) / |G|^2               both are averaged over time before dividing

An update with B_simple samples makes half the progress of an update without noise, and each of its samples contributes half of
what it would in a small batch. A larger batch brings little more: it is the critical batch size (McCandlish et al. 2018,
arXiv:1812.06162, section 2 and appendix A). Their estimator needs gradients at two batch sizes; tracked squares need only one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from largebatch.errors import UserError
from largebatch.scaling.rules import averaging_updates

# With fewer updates their spread cannot be estimated; from this number on, `student_quantile` is accurate to 0.2 %.
FEWEST_UPDATES = 8


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, and any other tensor unchanged."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@torch.no_grad()
def partial_sums(params: Iterable[Tensor], shadows: Iterable[Tensor]) -> Tensor:
    """Return this rank's part of |ghat|^2 and of the sum of tracked squares of each parameter, in one pass over the tensors.

    Where every rank holds whole gradients (one device, DDP), the part is the whole sum; where gradients are sharded, add the
    results over the ranks that hold the shards. Call it before gradients are clipped and after any loss scale is divided out.

    Args:
        params: P parameters, after the update's last backward pass and the reduction of gradients.
        shadows: the parameters' shadows, in the same order.

    Returns:
        (2, P), float64: |ghat|^2 in the first row, the sum of shadow.grad in the second; zero where there is no gradient.

    Raises:
        UserError: if a parameter has a gradient and its shadow none.
    """
    pairs = list(zip(params, shadows, strict=True))
    for index, (p, shadow) in enumerate(pairs):
        if p.grad is not None and shadow.grad is None:
            raise UserError(
                f"noise: parameter {index} of shape {tuple(p.shape)} has a gradient and its shadow none; "
                "call largebatch.track(model) before wrapping the model"
            )
    return sums_with((p, shadow.grad) for p, shadow in pairs)


@torch.no_grad()
def sums_with(squares: Iterable[tuple[Tensor, Tensor | None]]) -> Tensor:
    """Return the sums of `partial_sums`, given pairs of a parameter and the sum of its squared gradients."""
    pairs = list(squares)
    indices, grads, found = [], [], []
    for index, (p, square) in enumerate(pairs):
        if p.grad is not None and square is not None:
            indices.append(index)
            grads.append(_local(p.grad))
            found.append(_local(square))
    device = pairs[0][0].device if pairs else torch.device("cpu")
    sums = torch.zeros(2, len(pairs), dtype=torch.float64, device=device)
    if not indices:
        return sums
    columns = torch.tensor(indices, device=device)
    sums[0, columns] = power_sums(grads, 2)
    sums[1, columns] = power_sums(found, 1)
    return sums


def power_sums(tensors: list[Tensor], power: int) -> Tensor:
    """Return sum |x|^power of each tensor, (len(tensors),), float64; power is 1 (for nonnegative tensors only) or 2."""
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    if tensors[0].device.type == "cpu":
        # Norms on the CPU add one element after the other, with an error of 1e-4 in float32 for a million; sum() does not.
        widened = [t.to(dtype) for t in tensors]
        return torch.stack([(t if power == 1 else t * t).sum() for t in widened]).double()
    # One kernel for all tensors, which sums block by block.
    return torch.stack(torch._foreach_norm(tensors, power, dtype=dtype)).double() ** power


def noise_estimates(
    sums: Tensor, batch_size: int, num_units: float | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return one update's unbiased estimates of tr(Sigma) and |G|^2 for each parameter.

    The estimates are additive: their sum over a layer's parameters, or over all parameters, is the estimate for the layer or
    for the model.

    Args:
        sums: (2, P), `partial_sums` over all shards.
        batch_size: B, number of samples in the update's mean, >= 1.
        num_units: n > 1: for squares of samples B (the default); for squares of micro-batches their number, or 1/sum(w^2)
            where their weights w in the mean differ.
        scale: factor from the shadow's gradient to a mean of squares, n/W (`largebatch.moments.statistic_scale`); default n.

    Returns:
        tr(Sigma) of one sample, and |G|^2, (P,) each. The estimate of |G|^2 may be negative, and so may that of tr(Sigma) where
        the weights differ.

    Raises:
        UserError: if num_units is not above 1: a single unit has no variance.
    """
    units = float(batch_size if num_units is None else num_units)
    if not units > 1:
        raise UserError(
            f"noise: expected at least 2 independent samples or micro-batches in an update, got {units:g}; "
            "raise batch.size, or lower batch.micro_size where micro-batches are tracked"
        )
    mean_square = sums[0]
    trace = batch_size / (units - 1.0) * (sums[1] * (units if scale is None else scale) - mean_square)
    return trace, mean_square - trace / batch_size


def progress(batch_size: float, noise_scale: float) -> float:
    """Return the progress of an update at B relative to one without noise: 1 / (1 + B_simple/B), in [0, 1].

    Example:
        >>> progress(512, 512), progress(512, float("inf"))
        (0.5, 0.0)
    """
    return 1.0 / (1.0 + noise_scale / batch_size)


def efficiency(batch_size: float, noise_scale: float) -> float:
    """Return the progress per sample at B relative to that of a tiny batch: 1 / (1 + B/B_simple), in [0, 1].

    Example:
        >>> efficiency(512, 512), efficiency(512, float("inf"))
        (0.5, 1.0)
    """
    return 1.0 / (1.0 + batch_size / noise_scale) if noise_scale > 0 else 0.0


@dataclass(frozen=True)
class Noise:
    """The noise of a model or of one parameter, averaged over the last updates.

    Args:
        trace: tr(Sigma) of one sample's gradient; the average of few estimates from unequal micro-batches may be negative.
        signal: |G|^2; the estimate may be negative where noise dominates.
        noise_scale: B_simple in samples, >= 0; infinite where |G|^2 is not above zero.
        low: lower end of the confidence band of B_simple, >= 0.
        high: upper end; infinite where |G|^2 = 0 cannot be excluded.
    """

    trace: float
    signal: float
    noise_scale: float
    low: float
    high: float


def reference_norm_ratio(sums: Tensor, num_units: float, scale: float, kappa: float) -> float:
    """Return the ratio of a mean gradient's norm to that of a gradient of the reference batch, from one update's sums.

        |ghat|^2 / E|g_ref|^2,   E|g_ref|^2 = |ghat|^2 + (kappa - 1) * sum(V),   V = (q - ghat^2) / (n - 1)

    is the square of the ratio. With a clipping threshold tuned at the reference and multiplied by the ratio, clipping scales
    the mean gradient by the same factor by which it would have scaled a gradient of the reference batch.

    Args:
        sums: as in `noise_estimates`.
        num_units: n; for a single unit the ratio is 1.
        scale: n/W.
        kappa: B / B_ref.

    Returns:
        A value in [1, 1/sqrt(kappa)] below the reference batch size and in (0, 1] above; 1 for sums that are not finite.
    """
    signal, squares = sums.sum(dim=1).tolist()
    if not num_units > 1 or not signal > 0:
        return 1.0
    variance = max(0.0, scale * squares - signal) / (num_units - 1.0)
    expected = max(signal + (kappa - 1.0) * variance, min(1.0, kappa) * signal)
    return math.sqrt(signal / expected) if math.isfinite(expected) else 1.0


def student_quantile(probability: float, degrees: float) -> float:
    """Return Student's t quantile for real degrees of freedom >= 7, by its expansion about the normal quantile.

    References:
        Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5.
    """
    z = NormalDist().inv_cdf(probability)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / degrees**power for power, term in enumerate(terms))


def ratio_band(
    numerator: float, denominator: float, variances: tuple[float, float, float], quantile: float
) -> tuple[float, float]:
    """Return Fieller's confidence band of a ratio X/Y of two means, known to lie in [0, inf].

    At the true ratio X - rho*Y has the mean 0. The band contains every rho for which it lies within t of its own standard
    deviations of 0:

        (X - rho*Y)^2 <= t^2 * (v_X - 2*rho*v_XY + rho^2*v_YY)

    This is a quadratic in rho. The band is bounded above only where Y differs from 0 by more than t standard deviations; where
    it does not, the delta method, with its symmetric band about X/Y, fails. A negative X or Y counts as 0.

    Args:
        numerator: X.
        denominator: Y.
        variances: variance of X, variance of Y, and their covariance.
        quantile: t.

    References:
        Fieller, "Some problems in interval estimation", J. Royal Statistical Society B 16 (1954).
    """
    of_numerator, of_denominator, joint = variances
    x, y = max(numerator, 0.0), max(denominator, 0.0)
    # a*rho^2 - 2*b*rho + c <= 0
    # Products, because Python's powers raise an error where they overflow, as in a run that has diverged.
    a = y * y - quantile**2 * of_denominator
    b = x * y - quantile**2 * joint
    c = x * x - quantile**2 * of_numerator
    square = b * b - a * c
    if not math.isfinite(square):
        return 0.0, math.inf
    root = math.sqrt(max(square, 0.0))
    # (b - root)/a, written so that a may pass through zero
    low = c / (b + root) if c > 0 and b + root > 0 else 0.0
    return low, (b + root) / a if a > 0 else math.inf


class NoiseScale:
    """Running averages of tr(Sigma) and |G|^2, for the model and for each parameter, and the noise scale with its band.

    The averages span a fixed number of samples, that is N = max(1, N0/B) updates, with weights 1/min(t, N): for the first N
    updates they are plain means. Both are averaged before dividing. The spread of single estimates gives the covariance of the
    two averages, and Fieller's interval gives the band. Updates are assumed to vary independently, as they do with fresh
    samples; a drift of tr(Sigma) and |G|^2 within the length counts as spread and widens the band.

    Args:
        names: names of the sums' columns: the parameters, in the order of `partial_sums`, or the layers they were summed over.
        length_samples: N0, number of samples that the averages span, >= 1.
        level: confidence level of the band, in (0, 1).
        least_updates: smallest number of updates that the averages span, however large the batch, >= 1; with fewer than
            `FEWEST_UPDATES` the band is [0, inf].

    Example:
        >>> noise = NoiseScale(["weight"], length_samples=10_000)
        >>> noise.update(torch.tensor([[1.375], [0.5]]), batch_size=8)
        >>> noise.whole.noise_scale, noise.whole.high
        (3.0, inf)
    """

    def __init__(
        self, names: Sequence[str], length_samples: float, level: float = 0.99, least_updates: float = 1.0
    ) -> None:
        if not length_samples >= 1:
            raise UserError(f"noise: length_samples: expected at least 1 sample, got {length_samples}")
        if not 0 < level < 1:
            raise UserError(f"noise: level: expected a value in (0, 1), got {level}")
        self.names, self.length_samples, self.level = list(names), length_samples, level
        self.least_updates = least_updates
        self.count = 0.0
        # The sum of the squared weights: 1 / (the number of equally weighted updates whose mean has the same variance).
        self.weights_sq = 1.0
        # One column for each parameter, then one for the model, whose spread is not the sum of the parameters'.
        self.means = torch.zeros(2, len(self.names) + 1, dtype=torch.float64)
        self.covariances = torch.zeros(3, len(self.names) + 1, dtype=torch.float64)

    def update(self, sums: Tensor, batch_size: int, num_units: float | None = None, scale: float | None = None) -> None:
        """Add one update to the averages, unless its sums are not finite (an overflow, for which the step is skipped).

        Args:
            sums: (2, P) over all shards; the other arguments as in `noise_estimates`.
            batch_size: B.
            num_units: n.
            scale: n/W.
        """
        per_parameter = torch.stack(noise_estimates(sums.to("cpu", torch.float64), batch_size, num_units, scale))
        estimates = torch.cat([per_parameter, per_parameter.sum(dim=1, keepdim=True)], dim=1)
        if not bool(estimates.isfinite().all()):
            return
        self.count = min(self.count + 1.0, max(self.least_updates, averaging_updates(self.length_samples, batch_size)))
        weight = 1.0 / self.count
        self.weights_sq = (1.0 - weight) ** 2 * self.weights_sq + weight**2
        deviations = estimates - self.means
        products = torch.stack([*deviations.square(), deviations.prod(dim=0)])
        self.means += weight * deviations
        self.covariances = (1.0 - weight) * (self.covariances + weight * products)

    @property
    def whole(self) -> Noise:
        """The noise of the model, over all parameters."""
        return self._noise(len(self.names))

    @property
    def by_name(self) -> dict[str, Noise]:
        """The noise of each parameter."""
        return {name: self._noise(column) for column, name in enumerate(self.names)}

    def _noise(self, column: int) -> Noise:
        trace, signal = self.means[:, column].tolist()
        scale = max(trace, 0.0) / signal if signal > 0 else math.inf
        num_updates = 1.0 / self.weights_sq
        if num_updates < FEWEST_UPDATES - 1e-9:
            return Noise(trace, signal, scale, 0.0, math.inf)
        # Unbiased variances of single estimates are covariances / (1 - sum w^2); of their average, sum w^2 times that.
        of_mean = self.weights_sq / (1.0 - self.weights_sq)
        of_trace, of_signal, joint = (of_mean * self.covariances[:, column]).tolist()
        quantile = student_quantile(0.5 + 0.5 * self.level, num_updates - 1.0)
        return Noise(trace, signal, scale, *ratio_band(trace, signal, (of_trace, of_signal, joint), quantile))

    def state_dict(self) -> dict[str, Any]:
        """Return the averages, for a checkpoint, as numbers, strings and lists of these."""
        return {
            "names": list(self.names),
            "count": self.count,
            "weights_sq": self.weights_sq,
            "means": self.means.tolist(),
            "covariances": self.covariances.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned.

        Raises:
            UserError: if the state is of other parameters.
        """
        if list(state["names"]) != self.names:
            raise UserError(
                f"noise: the checkpoint's averages are of {len(state['names'])} parameters that are not this model's "
                f"{len(self.names)}; resume with the model that was saved"
            )
        self.count, self.weights_sq = float(state["count"]), float(state["weights_sq"])
        self.means, self.covariances = (
            torch.tensor(state[name], dtype=torch.float64) for name in ("means", "covariances")
        )

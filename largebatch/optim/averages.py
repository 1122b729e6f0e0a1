"""Running averages of adaptive optimizers: the weight of the newest value, and the second moment that is averaged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


def advance_average(
    counts: dict[str, float],
    key: str,
    beta: float,
    correction: Literal["published", "running_mean", "none"],
) -> tuple[float, float]:
    """Count an update of a running average; return the newest value's weight, and the divisor that corrects the bias.

    ``published``: weight 1 - beta, divided by 1 - prod(beta), which is Adam's 1 - beta^t while beta is constant.
    ``running_mean``: weight 1/min(t, N) with N = 1/(1 - beta), divided by 1; for t <= N exactly the mean of x_1..x_t
    (McAllester, TTIC 31230). Both remain right when beta changes, as with a growing batch. ``none``: weight 1 - beta.

    Args:
        counts: counts of the parameters that are averaged, changed in place.
        key: name of the average's count.
        beta: coefficient of one update, in [0, 1).
        correction: ``published``, ``running_mean`` or ``none``.
    """
    if correction == "running_mean":
        counts[key] = min(counts.get(key, 0.0) + 1.0, 1.0 / (1.0 - beta))
        return 1.0 / counts[key], 1.0
    if correction == "published":
        counts[key] = counts.get(key, 1.0) * beta
        return 1.0 - beta, 1.0 - counts[key]
    return 1.0 - beta, 1.0


def divisor_of(counts: dict[str, float], key: str, correction: Literal["published", "running_mean", "none"]) -> float:
    """Return the current divisor of a running average, after at least one update."""
    return 1.0 - counts[key] if correction == "published" and key in counts else 1.0


def smallest_ratio(beta1: float, beta2: float) -> float:
    """Return c such that s >= c * m^2 for averages s of squares and m of values, in the limit of many updates.

    Cauchy-Schwarz: (sum v_i g_i)^2 <= sum(v_i^2/w_i) * sum(w_i g_i^2) for the averages' weights v and w.
    """
    return (1.0 - beta2) * max(1.0 - beta1, 1.0 - beta1**2 / beta2 if beta2 else 0.0) / (1.0 - beta1) ** 2


def smallest_with_mean(kept: Tensor, mean: Tensor, newest: Tensor, weight: float, share: float) -> Tensor:
    """Return a lower bound of s: there the variance s - m^2 is ``share`` times that of the batch's own gradients.

    Rounding cannot make the variance negative.

    With averages s of squares and m of values, both of weight w, the variance after the newest value is

        (1-w) * (s - m^2)_before + w*(1-w) * (x - m_before)^2

    Args:
        kept: (1-w) * s before.
        mean: m before.
        newest: x.
        weight: w.
        share: in (0, 1].
    """
    after = torch.lerp(mean, newest, weight)
    variance = (kept - mean.square() * (1.0 - weight)).clamp_min_(0.0)
    variance.addcmul_(newest - mean, newest - mean, value=weight * (1.0 - weight)).mul_(share)
    return variance.addcmul_(after, after, value=1.0 + 16.0 * torch.finfo(after.dtype).eps)


@dataclass(frozen=True)
class Moment:
    """The second moment of one update, as a combination of squares of the mean gradient and of the tracked squares.

        s_ref = (1 - a) * ghat^2 + a * q,   q = scale * squares,   a = (kappa - 1) / (n - 1)

    an unbiased estimate of the square that plain Adam would have averaged at the reference batch size: with n
    independent units (samples, or micro-batches) in the mean, sigma^2/B = (q - ghat^2)/(n - 1), and s_ref = ghat^2 +
    sigma^2*(1/B_ref - 1/B) = ghat^2 + (kappa - 1)*sigma^2/B. B_ref = 1 gives q, B_ref = B gives ghat^2. Where sigma^2 is
    given instead of squares,

        s_ref = ghat^2 + a * sigma^2,   a = (kappa - 1) / B

    Args:
        squares: sums of squares, such as the shadows' gradients, or sigma^2, in the order of the parameters; None for plain
            second moments.
        share: a.
        scale: factor from a sum of squares to their mean over units: n / W for a shadow's gradient.
        kappa: B / B_ref, the number of updates at the reference that this update stands for.
        of_variance: whether ``squares`` are sigma^2.
        equal: whether q >= ghat^2 in every element: true if all units are squared in full precision and have the same size.
    """

    squares: list[Tensor] | None = None
    share: float = 0.0
    scale: float = 1.0
    kappa: float = 1.0
    of_variance: bool = False
    equal: bool = True

    @property
    def is_bounded(self) -> bool:
        """Whether single estimates may be negative, so that the average is kept above a bound."""
        return self.squares is not None and (self.share < 0.0 or (self.share > 0.0 and not self.equal))

    def add_to(
        self,
        average: list[Tensor],
        grads: list[Tensor],
        decayed: list[Tensor],
        weight: float,
        direction: list[Tensor] | None = None,
        bound: float | None = None,
        means: list[Tensor] | None = None,
    ) -> None:
        """Add weight * s_ref to a running average.

        Below the reference batch size, and where units differ in size, s_ref is a difference, so single estimates may be
        negative, and the update would be divided by an average near zero. A true average of squares satisfies s >= c * u^2.
        Because E[s_ref] >= min(1, kappa) * E[ghat^2], this average is kept at min(1, kappa) * c * u^2 or more, which bounds the
        update by lr / sqrt(min(1, kappa) * c).

        Args:
            average: the running average, changed in place.
            grads: mean gradients.
            decayed: mean gradients with L2 weight decay added, which changes the mean and not the variance.
            weight: weight of the newest value.
            direction: u, the tensor that is divided by the root of the average; None for ``decayed``.
            bound: c, such that an average of squares with these weights is at least c * u^2; None for ``weight``.
            means: running averages of gradients before this update, for an optimizer that subtracts their squares from the
                average; the average is then kept at `smallest_with_mean` or more.
        """
        with_means = []
        if means is not None and self.is_bounded:
            rows, share = zip(average, means, decayed, strict=True), min(1.0, self.kappa)
            with_means = [smallest_with_mean(kept, mean, x, weight, share) for kept, mean, x in rows]
        added = self.squares is not None and self.share != 0.0
        subtracted = self.share if added and not self.of_variance else 0.0
        if decayed is grads:
            torch._foreach_addcmul_(average, grads, grads, weight * (1.0 - subtracted))
        else:
            torch._foreach_addcmul_(average, decayed, decayed, weight)
            if subtracted:
                torch._foreach_addcmul_(average, grads, grads, -weight * subtracted)
        if self.squares is None or not added:
            return
        torch._foreach_add_(average, self.squares, alpha=weight * self.share * self.scale)
        if subtracted > 1.0 and self.equal:
            # q >= ghat^2, except where the units' squares underflow and that of their sum does not.
            torch._foreach_clamp_min_(average, 0.0)
        if self.is_bounded:
            lowest = with_means
            if means is None:
                direction, bound = direction or decayed, weight if bound is None else bound
                lowest = list(torch._foreach_mul(direction, direction))
                torch._foreach_mul_(lowest, bound * min(1.0, self.kappa))
            for value, bottom in zip(
                average, lowest, strict=True
            ):  # DTensors have no foreach maximum before torch 2.13
                value.copy_(torch.maximum(value, bottom))

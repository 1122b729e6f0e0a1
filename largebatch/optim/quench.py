"""Quenching SGD: a batch size and a learning rate for each element of a parameter, from the element's own noise.

B is the batch size of an update and ghat its mean gradient; everything below is elementwise. In one dimension, with a
loss whose curvature is at most L, the guaranteed progress of an update per sample is largest at

    Bstar = 16 * sigma2 / g^2,   eta* = 1/(2L),   and for a smaller batch eta_B = (B/Bstar) * eta*

where sigma2 is the variance of one sample's gradient g_b (McAllester, TTIC 31230, winter 2017, "A Quenching SGD
Algorithm"). So lambda_B = 16 and lambda_eta = 1/(32*L) are the theory's values of the meta-parameters.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from largebatch.errors import UserError
from largebatch.optim.adaptive import AdaptiveOptimizer, _with_decay
from largebatch.optim.averages import Moment
from largebatch.optim.groups import is_shadow_group

Variance = Literal["average", "sample"]

# Largest weight of the newest gradient in an average. At 1 the average variance would be 0 and stay 0. With squares of samples
# it would not, but a single gradient near 0 makes Bstar huge and stops the element: on quadratics 1/2 left less excess loss.
LARGEST_WEIGHT = 0.5


def critical_batch_sizes(means: list[Tensor], variances: list[Tensor], lambda_B: float, eps: float) -> list[Tensor]:
    """Return Bstar = lambda_B * sigma2 / (g^2 + eps) of every element, in samples.

    Args:
        means: running averages of the gradient.
        variances: sigma2 of one sample's gradient.
        lambda_B: 16 in the theory.
        eps: added to g^2, > 0; it bounds Bstar where the average of the gradient passes through 0.
    """
    squares = torch._foreach_mul(means, means)
    torch._foreach_add_(squares, eps)
    sizes = torch._foreach_div(variances, squares)
    torch._foreach_mul_(sizes, lambda_B)
    return list(sizes)


def learning_rates(
    means: list[Tensor], variances: list[Tensor], batch_size: int, lambda_B: float, lambda_eta: float
) -> list[Tensor]:
    """Return eta = lambda_eta * B * g^2 / sigma2 of every element, at most eta* = lambda_eta * lambda_B.

    The bound is eta_B = (B/Bstar) * eta* with B/Bstar at most 1: a batch larger than Bstar permits no larger rate.

    Args:
        means: running averages of the gradient.
        variances: sigma2 of one sample's gradient.
        batch_size: B.
        lambda_B: 16 in the theory.
        lambda_eta: 1/(32*L) in the theory.
    """
    rates = torch._foreach_mul(means, means)
    torch._foreach_mul_(rates, batch_size / lambda_B)
    least = [torch.maximum(*pair) for pair in zip(variances, rates, strict=True)]
    # Where no sample has a gradient, the rate is 0/0, and the step is to be 0.
    torch._foreach_clamp_min_(least, torch.finfo(least[0].dtype).tiny)
    torch._foreach_div_(rates, least)
    torch._foreach_mul_(rates, lambda_eta * lambda_B)
    return list(rates)


class Quench(AdaptiveOptimizer):
    """Quenching SGD (McAllester, TTIC 31230, winter 2017, "A Complete Algorithm").

        w      = min(B/Bstar, 1/2)                              with Bstar after the previous update
        g      = (1-w)*g + w*ghat
        sigma2 = B * (s - g^2),  s = (1-w)*s + w*ghat^2         ``average``: B times the variance of batch means
        sigma2 = (1-w)*sigma2 + w*B/(n-1) * (q - ghat^2)        ``sample``: from tracked squares, exact for any batch
        Bstar  = K for t <= K, else lambda_B * sigma2 / (g^2 + eps)
        eta    = 0 for t <= K, else min(lambda_eta * B * g^2 / sigma2, lambda_eta * lambda_B)
        p     -= eta * ghat

    t counts the samples of those updates in which the parameter had a gradient. The lecture's slides assume B = 1; with B in
    sigma2 and eta, Bstar and eta/B do not depend on the batch size, so no scaling rule applies. Call `set_batch` with either
    form of sigma2. The state is ``exp_avg`` (g) and ``exp_avg_sq`` (sigma2).

    No average is shorter than two updates: the variance of one batch mean about itself is 0, so with w = 1 Bstar would be 0
    and w would stay 1.

    Args:
        params: parameters or groups; of a tracked model for ``sample``.
        lambda_eta: coefficient of the rate, 1/(32*L) in the theory; > 0. It is the group's ``lr``, which a schedule can set.
        K: number of samples at the start during which only averages are taken, several times B.
        lambda_B: coefficient of Bstar, 16 in the theory; > 0.
        eps: added to g^2 in Bstar, > 0. While an element's average gradient is near 0, Bstar is large and the element hardly
            moves, for up to lambda_B * sigma2 / eps samples.
        sigma2: ``average`` or ``sample``.
        weight_decay: L2 coefficient, added to the gradient.

    Raises:
        UserError: if an argument lies outside its range.
    """

    state_names = ("exp_avg", "exp_avg_sq")
    count_names = ("samples",)

    def __init__(
        self,
        params: Iterable[Any],
        lambda_eta: float = 1e-2,
        K: int = 4096,
        lambda_B: float = 16.0,
        eps: float = 1e-8,
        sigma2: Variance = "average",
        weight_decay: float = 0.0,
    ) -> None:
        for name, value in (("lambda_eta", lambda_eta), ("K", K), ("lambda_B", lambda_B), ("eps", eps)):
            if not value > 0:
                raise UserError(f"{name}: expected a value > 0, got {value}")
        if sigma2 not in ("average", "sample"):
            raise UserError(f"sigma2: expected average or sample, got {sigma2!r}")
        defaults = {"lr": lambda_eta, "K": K, "lambda_B": lambda_B, "eps": eps, "sigma2": sigma2}
        # Bstar counts single samples, so the reference batch that `AdaptiveOptimizer` requires is one sample.
        super().__init__(params, {**defaults, "weight_decay": weight_decay, "reference_batch_size": 1})

    def update(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        state: dict[str, list[Tensor]],
        moment: Moment,
        counts: dict[str, float],
    ) -> None:
        """Apply the rule above."""
        if "batch_size" not in group:
            raise RuntimeError("call set_batch(batch_size, ...) before step(): the averages' weights depend on it")
        batch_size = group["batch_size"]
        means, variances = state["exp_avg"], state["exp_avg_sq"]
        decayed = _with_decay(grads, params, group["weight_decay"])
        seen = counts.get("samples", 0.0)
        weights = self._weights(group, means, variances, seen)
        deviations = list(torch._foreach_sub(decayed, means))
        if group["sigma2"] == "sample":
            self._average_squares(group, grads, variances, weights, moment, seen)
        else:
            # (1-w) * (V + w*B*(ghat-g)^2) is B*(s - g^2), without the difference of two large numbers.
            spreads = torch._foreach_mul(deviations, deviations)
            torch._foreach_mul_(spreads, weights)
            torch._foreach_add_(variances, spreads, alpha=batch_size)
            torch._foreach_addcmul_(variances, variances, weights, value=-1.0)
        torch._foreach_addcmul_(means, weights, deviations)
        counts["samples"] = seen + batch_size
        if counts["samples"] > group["K"]:
            rates = learning_rates(means, variances, batch_size, group["lambda_B"], group["lr"])
            torch._foreach_addcmul_(params, rates, decayed, value=-1.0)

    def _weights(
        self, group: dict[str, Any], means: list[Tensor], variances: list[Tensor], seen: float
    ) -> list[Tensor]:
        """Return min(B/Bstar, 1/2) of every element."""
        batch_size = group["batch_size"]
        if seen <= group["K"]:
            return [torch.full_like(mean, min(batch_size / group["K"], LARGEST_WEIGHT)) for mean in means]
        sizes = critical_batch_sizes(means, variances, group["lambda_B"], group["eps"])
        # DTensors have no foreach reciprocal and maximum of two before torch 2.13.
        weights = [size.reciprocal() for size in sizes]
        torch._foreach_mul_(weights, batch_size)
        torch._foreach_clamp_max_(weights, LARGEST_WEIGHT)
        return weights

    def _average_squares(
        self,
        group: dict[str, Any],
        grads: list[Tensor],
        variances: list[Tensor],
        weights: list[Tensor],
        moment: Moment,
        seen: float,
    ) -> None:
        """Add the tracked squares to the average of sigma2."""
        if moment.squares is None:
            raise UserError(
                "sigma2: 'sample' needs the parameter groups of a tracked model: call largebatch.track first"
            )
        if not group["num_units"] > 1 and seen > 0:
            return  # a last batch of one sample, which has no variance
        if not group["num_units"] > 1:
            raise UserError("sigma2: 'sample' needs at least 2 samples in an update, got 1; take sigma2='average'")
        estimates = torch._foreach_mul(moment.squares, moment.scale)
        torch._foreach_addcmul_(estimates, grads, grads, value=-1.0)
        torch._foreach_mul_(estimates, group["batch_size"] / (group["num_units"] - 1.0))
        torch._foreach_sub_(estimates, variances)
        torch._foreach_addcmul_(variances, weights, estimates)
        # The mean square of some of the samples may be smaller than ghat^2.
        torch._foreach_clamp_min_(variances, 0.0)

    def critical_batch_sizes_and_rates(self) -> dict[Tensor, tuple[Tensor, Tensor]]:
        """Return {parameter: (Bstar, eta)}, elementwise, of the parameters that have been updated."""
        found: dict[Tensor, tuple[Tensor, Tensor]] = {}
        for group in self.param_groups:
            for p in () if is_shadow_group(group) else group["params"]:
                if p not in self.state:
                    continue
                (mean,), (variance,) = ([self.state[p][name]] for name in self.state_names)
                seen = self.state[p].get("samples", group.get("samples", 0.0))
                if seen <= group["K"]:
                    found[p] = torch.full_like(mean, group["K"]), torch.zeros_like(mean)
                else:
                    (size,) = critical_batch_sizes([mean], [variance], group["lambda_B"], group["eps"])
                    (rate,) = learning_rates([mean], [variance], group["batch_size"], group["lambda_B"], group["lr"])
                    found[p] = size, rate
        return found

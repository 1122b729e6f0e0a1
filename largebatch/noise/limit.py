"""How far an update is from the largest stable step, from the gradients of two successive updates.

Notation: a is the learning rate of one update in the form of a running average (p -= a*m, m = b*m + (1-b)*g; for SGD with
momentum mu in torch's form a = lr/(1-mu) and b = mu; for Adam a is divided by the denominator D, element by element), h the
curvature of the loss, V the variance of an update's mean gradient, d = (g_t - g_{t-1})^2 / 2. On a quadratic

    r = a h (1-b) / (2 (1+b))                   share of the largest stable step that is in use
    E[w^2] = a V / (2 h) / (1-r)                stationary variance; the linear rule keeps all of it but 1/(1-r)
    extra = E[d] - V = h^2 E[dw^2]/2 + h a (1-b) V

docs/limit.md derives these equations. A ``Value`` is a number, or a tensor that is computed with elementwise.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

from largebatch.errors import UserError

Value = TypeVar("Value", float, Tensor)


def _require_average(beta: float) -> None:
    if not 0.0 <= beta < 1.0:
        raise UserError(f"beta: expected a value in [0, 1), got {beta}")


def _root(value: Value) -> Value:
    return value.sqrt() if isinstance(value, Tensor) else math.sqrt(value)


def stability_share(rate: Value, curvature: Value, beta: float) -> Value:
    """Return r = a h (1-b) / (2 (1+b)): 1 where the update begins to diverge.

    Args:
        rate: a, divided by the preconditioner where there is one; lr/(1-mu) for torch's SGD.
        curvature: h.
        beta: b in [0, 1).

    Example:
        >>> stability_share(0.1, 2.0, 0.0), round(stability_share(0.1 / (1 - 0.9), 2.0, 0.9), 4)
        (0.1, 0.0526)
    """
    _require_average(beta)
    return rate * curvature * ((1.0 - beta) / (2.0 * (1.0 + beta)))


def largest_kappa(lr: float, curvature: float, beta: float) -> float:
    """Return the largest multiple of the reference batch at which an update of the linear rule is stable.

        kappa_max = 2 (1+b) / ((1-b) lr lambda)

    Args:
        lr: learning rate at the reference in the form of a running average; lr/(1-mu) for torch's SGD.
        curvature: lambda, the largest eigenvalue of the Hessian, or of D^-1/2 H D^-1/2 for a preconditioner D.
        beta: b in [0, 1).

    Returns:
        kappa_max; infinite where lambda is not positive.

    Example:
        >>> round(largest_kappa(1e-3, 2000.0, 0.9), 6)
        19.0
    """
    share = stability_share(lr, curvature, beta)
    return 1.0 / share if share > 0 else float("inf")


def temperature_excess(share: float) -> float:
    """Return 1/(1-r), the ratio of the stationary variance to that of small steps; infinite for r >= 1.

    Example:
        >>> temperature_excess(0.5)
        2.0
    """
    return 1.0 / (1.0 - share) if share < 1.0 else float("inf")


def change_ratio(share: Value, beta: float) -> Value:
    """Return extra / V in the stationary state: 2 Q r^2/(1-r) + 2 (1+b) r, with Q = (1+b)/(1-b).

    Args:
        share: r in [0, 1).
        beta: b in [0, 1).

    Example:
        >>> change_ratio(0.5, 0.0)
        2.0
    """
    _require_average(beta)
    return 2.0 * (1.0 + beta) * (share * share / ((1.0 - beta) * (1.0 - share)) + share)


def share_of_change(ratio: Value, beta: float) -> Value:
    """Return the share r at which extra / V is ``ratio`` in the stationary state: the inverse of `change_ratio`.

    Args:
        ratio: extra / V, >= 0.
        beta: b in [0, 1).

    Example:
        >>> share_of_change(2.0, 0.0)
        0.5
    """
    _require_average(beta)
    linear = 2.0 * (1.0 + beta) + ratio
    square = 2.0 * (1.0 + beta) / (1.0 - beta) * beta
    # square*r^2 + linear*r - ratio = 0
    return 2.0 * ratio / (linear + _root(linear * linear + 4.0 * square * ratio))


def curvature_of_steps(extra: Value, step_sq: Value, step_noise: Value) -> Value:
    """Return the root h of extra = h^2 E[dw^2]/2 + h E[step_noise]: a secant corrected for noise.

    The state need not be stationary.

    Args:
        extra: mean of d - V; a negative value counts as 0.
        step_sq: mean of dw^2, the squared step between the two gradients.
        step_noise: mean of a (1-b) V at the earlier gradient; minus the covariance of that noise with the step after it.

    Returns:
        h >= 0; 0 where both the step and the noise are zero.

    Example:
        >>> curvature_of_steps(extra=10.0, step_sq=4.0, step_noise=1.0)
        2.0
    """
    if isinstance(extra, Tensor):
        least = torch.finfo(extra.dtype).tiny
        extra = extra.clamp_min(0.0)
        # In place: for many elements new memory costs more than the arithmetic.
        root = (step_sq * extra).mul_(2.0).addcmul_(step_noise, step_noise).sqrt_()
        return extra.mul_(2.0).div_(root.add_(step_noise).clamp_min_(least))
    extra = max(extra, 0.0)
    divisor = step_noise + (step_noise**2 + 2.0 * step_sq * extra) ** 0.5
    return 2.0 * extra / divisor if divisor > 0 else 0.0

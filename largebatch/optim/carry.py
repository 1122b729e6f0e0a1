"""Averages of gradients that are carried along when the denominator changes, far from the batch that they were tuned at.

Adam divides an average of gradients m by the root of an average of squares s, as both are now. At kappa = B/B_ref times the
batch an update stands for kappa updates at the reference, in each of which the gradient is divided by the root of its time.
With beta2**kappa s forgets in as many samples as it was tuned to; m, whose beta1 is kept, now reaches kappa times as far
back, beyond what s remembers. An element whose large gradients lie behind it would have a small s and a large m still, and
run away; one whose gradients are small but for a few would move by the root of the mean square where the reference moves by
the root of most of its updates. So m is carried along before the new gradient enters it:

    m *= 1 + (1 - 1/kappa) * (d_t / d_{t-1} - 1),   d = sqrt(s/c2) + eps

At the reference that is Adam. Far above it m/d is the average of gradients that are each divided by the root of their time,
as RMSProp's momentum is: no element moves further than lr / sqrt(1 - beta2), whatever s forgets. docs/results.md has what
comes of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 1e-30  # of a denominator, where eps is 0: its average of gradients is 0 too


@torch.no_grad()
def carry(averages: list[Tensor], before: list[Tensor], after: list[Tensor], kappa: float) -> None:
    """Carry averages of gradients from one update's denominators to the next one's, in place.

    Args:
        averages: m of each parameter, without the newest gradient.
        before: d of the update before; used up.
        after: d of this update.
        kappa: B / B_ref, above 1.
    """
    torch._foreach_clamp_min_(before, SMALLEST)
    torch._foreach_reciprocal_(before)
    torch._foreach_mul_(before, after)
    torch._foreach_mul_(before, 1.0 - 1.0 / kappa)
    torch._foreach_add_(before, 1.0 / kappa)
    torch._foreach_mul_(averages, before)


def denominators_before(second_moments: list[Tensor], divisor: float, eps: float) -> list[Tensor]:
    """Return `denominators` to carry from: what float16 rounds to zero counts as its smallest number."""
    if second_moments[0].dtype == torch.float16:
        second_moments = list(torch._foreach_clamp_min(second_moments, 2.0**-24))
    return denominators(second_moments, divisor, eps)


def denominators(second_moments: list[Tensor], divisor: float, eps: float) -> list[Tensor]:
    """Return sqrt(s / divisor) + eps."""
    roots = torch._foreach_sqrt(second_moments)
    torch._foreach_div_(roots, divisor**0.5)
    torch._foreach_add_(roots, eps)
    return list(roots)

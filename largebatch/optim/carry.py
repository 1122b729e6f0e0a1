"""Averages of gradients that are carried along when the denominator changes, far from the batch that they were tuned at.

Adam divides an average of gradients m by the root of an average of squares s. At kappa = B/B_ref times the batch an update
stands for kappa updates at the reference, in each of which the newest gradient is divided by the denominator of that update.
With beta2**kappa s forgets in as many samples as it was tuned to; m, whose beta1 is kept, now reaches kappa times as far
back, beyond what s remembers. An element whose large gradients lie behind it would have a small s and a large m still, and
run away; one whose gradients are small but for a few would move by the root of the mean square where the reference moves by
the root of most of its updates. So m is carried along before the new gradient enters it:

    m *= w + (1 - w) * d_t / d_{t-1},   d = sqrt(s/c2) + eps,   w = (r**(1 - 1/kappa) - r) / (1 - r),   r = beta2**(kappa/2)

r is the ratio of the denominators where the gradients are zero: there m/d grows by beta2**-0.5 before beta1 takes its part,
as it does in an update at the reference, whatever s forgets. w is 1 at the reference, where that is Adam, and about 1/kappa
while kappa (1 - beta2) is small. Far above it m/d is the average of gradients that are each divided by the denominator of the
update in which they were computed, as RMSProp's momentum is, none of which is more than 1 / sqrt(1 - beta2**kappa). While s
spans 50 updates or more (beta2**kappa of 0.98) it remembers what m does, and m is left alone. docs/results.md has what comes
of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

# Coefficient of the average of squares from which on m is left alone: 50 updates are long beside the ten of beta1 0.9.
LONG = 0.98
SMALLEST = 1e-30  # of a root that is divided by
PIECE = 2**16  # elements at a time for each thread of a CPU: what is made of them on the way stays in its cache


def is_carried(kappa: float, beta2: float) -> bool:
    """Return whether averages of gradients are carried at kappa = B/B_ref, where beta2 is that of the update."""
    return kappa > 1.0 and beta2 < LONG


def roots(second_moments: list[Tensor], divisor: float, eps: float) -> list[Tensor]:
    """Return d * sqrt(divisor) of s, for d = sqrt(s / divisor) + eps."""
    found = torch._foreach_sqrt(second_moments)
    torch._foreach_add_(found, eps * math.sqrt(divisor))
    return list(found)


def roots_before(second_moments: list[Tensor], divisor: float, eps: float) -> list[Tensor]:
    """Return `roots` to carry from, none of which is 0: what float16 rounds to zero counts as its smallest number."""
    if second_moments[0].dtype == torch.float16:
        second_moments = list(torch._foreach_clamp_min(second_moments, 2.0**-24))
    found = roots(second_moments, divisor, eps)
    if eps * math.sqrt(divisor) < SMALLEST:  # such a root's average of gradients is 0 too
        torch._foreach_clamp_min_(found, SMALLEST)
    return found


def uncarried_share(kappa: float, beta2: float) -> float:
    """Return w, the share of an average of gradients that stays as it is, in [0, 1/kappa].

    Args:
        kappa: B / B_ref, above 1.
        beta2: coefficient of the average of squares in this update, in [0, 1): the reference's, to the power of kappa.
    """
    root = math.sqrt(beta2)
    return (math.pow(root, 1.0 - 1.0 / kappa) - root) / (1.0 - root)


def carry(averages: list[Tensor], before: list[Tensor], after: list[Tensor], factor: float, share: float) -> None:
    """Carry averages of gradients from one update's denominators to the next one's, in place.

    Args:
        averages: m of each parameter, without the newest gradient.
        before: of the update before, from `roots_before`.
        after: of this update, from `roots`; one that is infinite becomes finite.
        factor: sqrt of the divisor before / the divisor after, by which after / before is to be multiplied.
        share: `uncarried_share` of the update.
    """
    # m/d is of moderate size whatever the gradients' is; of a second moment that has overflowed it is 0.
    carried = torch._foreach_div(averages, before)
    torch._foreach_mul_(averages, share)
    torch._foreach_clamp_max_(after, torch.finfo(after[0].dtype).max / 64)
    torch._foreach_addcmul_(averages, carried, after, value=(1.0 - share) * factor)


def pieces(*lists: list[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
    """Yield lists of tensors that belong together: large ones on a CPU piece by piece, all others at once."""
    whole: tuple[list[Tensor], ...] = tuple([] for _ in lists)
    size = PIECE * torch.get_num_threads()
    for tensors in zip(*lists, strict=True):
        if tensors[0].numel() > size and all(map(_can_be_split, tensors)):
            for parts in zip(*(t.view(-1).split(size) for t in tensors), strict=True):
                yield tuple([part] for part in parts)
        else:
            for together, tensor in zip(whole, tensors, strict=True):
                together.append(tensor)
    if whole[0]:
        yield whole


def _can_be_split(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu" and tensor.is_contiguous()

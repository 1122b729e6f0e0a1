"""Carrying an average of gradients: rescaling it when its denominator changes, far above the reference batch.

Adam divides an average of gradients m by the root of an average of squares s. At kappa = B/B_ref times the batch an update
stands for kappa updates at the reference, each of which divides its newest gradient by its own denominator. With beta2**kappa
the average s spans the number of samples that it was tuned for; m, whose beta1 is kept, spans kappa times as many samples as at
the reference, and more than s. Where large gradients are still in m and no longer in s, an element would take far too large a
step. If only a few gradients are large, the root of their mean square exceeds most denominators of the reference, and the steps
would be smaller than its own. So m is rescaled, or *carried*, before the new gradient is added to it:

    m *= w + (1 - w) * d_t / d_{t-1},   d = sqrt(s/c2) + eps,   w = (r**(1 - 1/kappa) - r) / (1 - r),   r = beta2**(kappa/2)

r is the ratio of successive denominators while gradients are zero. With this w, m/d then grows by beta2**-0.5 before beta1
shrinks m, as in an update at the reference. At the reference w is 1 and this is Adam; w is about 1/kappa while
kappa (1 - beta2) is small. Far above the reference m/d is an average of gradients, each divided by the denominator of the
update that computed it, as in RMSProp with momentum; no such quotient is larger than 1 / sqrt(1 - beta2**kappa). If s spans 50
updates or more (beta2**kappa >= 0.98), it spans the gradients in m, and m is not carried. docs/results.md has measurements.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

# Coefficient of the average of squares from which on m is not carried: 50 updates are long beside the ten of beta1 = 0.9.
LONG = 0.98
SMALLEST = 1e-30  # smallest root that is used as a divisor
PIECE = 2**16  # elements at a time for each thread of a CPU, so that intermediate results stay in its cache


def is_carried(kappa: float, beta2: float) -> bool:
    """Return whether averages of gradients are carried at kappa = B/B_ref, given the beta2 of the update."""
    return kappa > 1.0 and beta2 < LONG


def roots(second_moments: list[Tensor], divisor: float, eps: float) -> list[Tensor]:
    """Return d * sqrt(divisor) of s, for d = sqrt(s / divisor) + eps."""
    found = torch._foreach_sqrt(second_moments)
    torch._foreach_add_(found, eps * math.sqrt(divisor))
    return list(found)


def roots_before(second_moments: list[Tensor], divisor: float, eps: float) -> list[Tensor]:
    """Return the `roots` to divide by, none of them 0: a float16 moment that was rounded to 0 counts as the smallest number."""
    if second_moments[0].dtype == torch.float16:
        second_moments = list(torch._foreach_clamp_min(second_moments, 2.0**-24))
    found = roots(second_moments, divisor, eps)
    if eps * math.sqrt(divisor) < SMALLEST:  # where a root is 0, the average of gradients is 0 too
        torch._foreach_clamp_min_(found, SMALLEST)
    return found


def uncarried_share(kappa: float, beta2: float) -> float:
    """Return w, the share of an average of gradients that is not rescaled, in [0, 1/kappa].

    Args:
        kappa: B / B_ref, above 1.
        beta2: coefficient of the average of squares in this update, in [0, 1): that of the reference to the power of kappa.
    """
    root = math.sqrt(beta2)
    return (math.pow(root, 1.0 - 1.0 / kappa) - root) / (1.0 - root)


def carry(averages: list[Tensor], before: list[Tensor], after: list[Tensor], factor: float, share: float) -> None:
    """Carry averages of gradients from one update's denominators to the next one's, in place.

    Args:
        averages: m of each parameter, without the newest gradient.
        before: roots of the previous update, from `roots_before`.
        after: roots of this update, from `roots`; an infinite one is replaced by a large finite number.
        factor: sqrt(divisor before / divisor after), by which after / before has to be multiplied.
        share: `uncarried_share` of the update.
    """
    # m/d is of moderate size however large the gradients are; it is 0 where the second moment has overflowed.
    carried = torch._foreach_div(averages, before)
    torch._foreach_mul_(averages, share)
    torch._foreach_clamp_max_(after, torch.finfo(after[0].dtype).max / 64)
    torch._foreach_addcmul_(averages, carried, after, value=(1.0 - share) * factor)


def pieces(*lists: list[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
    """Yield corresponding parts of lists of tensors: large tensors on a CPU piece by piece, all others in one part."""
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

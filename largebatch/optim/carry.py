"""Averages of gradients that are carried along when the denominator changes, far from the batch that they were tuned at.

Adam divides an average of gradients m by the root of an average of squares s, as both are now. At kappa = B/B_ref times the
batch an update stands for kappa updates at the reference, in each of which the gradient is divided by the root of its time.
With beta2**kappa s forgets in as many samples as it was tuned to; m, whose beta1 is kept, now reaches kappa times as far
back, beyond what s remembers. An element whose large gradients lie behind it would have a small s and a large m still, and
run away; one whose gradients are small but for a few would move by the root of the mean square where the reference moves by
the root of most of its updates. So m is carried along before the new gradient enters it:

    m *= 1 + (1 - 1/kappa) * (d_t / d_{t-1} - 1),   d = sqrt(s/c2) + eps

At the reference that is Adam. Far above it m/d is the average of gradients that are each divided by the root of their time,
as RMSProp's momentum is: no element moves further than lr / sqrt(1 - beta2), whatever s forgets. While s spans 50 updates
or more (beta2**kappa of 0.98) it remembers what m does, and m is left alone. docs/results.md has what comes of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Coefficient of the average of squares from which on m is left alone: 50 updates are long beside the ten of beta1 0.9.
LONG = 0.98
SMALLEST = 1e-30  # of a denominator, where eps is 0: its average of gradients is 0 too
PIECE = 2**16  # elements at a time for each thread of a CPU: what is made of them on the way stays in its cache


def is_carried(kappa: float, beta2: float) -> bool:
    """Return whether averages of gradients are carried at kappa = B/B_ref, where beta2 is that of the update."""
    return kappa > 1.0 and beta2 < LONG


@torch.no_grad()
def carry(averages: list[Tensor], before: list[Tensor], after: list[Tensor], kappa: float) -> None:
    """Carry averages of gradients from one update's denominators to the next one's, in place.

    Args:
        averages: m of each parameter, without the newest gradient.
        before: d of the update before; used up.
        after: d of this update.
        kappa: B / B_ref, above 1.
    """
    for means, older, newer in pieces(averages, before, after):
        torch._foreach_clamp_min_(older, SMALLEST)
        carried = torch._foreach_mul(means, newer)
        torch._foreach_mul_(means, 1.0 / kappa)
        torch._foreach_addcdiv_(means, carried, older, value=1.0 - 1.0 / kappa)


@torch.no_grad()
def carry_to_coming(
    averages: list[Tensor],
    before: list[Tensor],
    second_moments: list[Tensor],
    taken: list[Tensor],
    largest: list[Tensor],
    *,
    beta: float,
    divisor: float,
    eps: float,
    kappa: float,
) -> None:
    """Carry averages of gradients to the denominators of beta*s + (1-beta)*x^2, which the optimizer is about to come to.

    Args:
        averages: as `carry`.
        before: as `carry`.
        second_moments: s.
        taken: x.
        largest: the largest second moments so far, of AMSGrad; else empty.
        beta: coefficient of the coming update.
        divisor: what the second moment is divided by then.
        eps: added to the root.
        kappa: as `carry`.
    """
    for means, older, moments, x, *most in pieces(
        averages, before, second_moments, taken, *([largest] if largest else [])
    ):
        coming = list(torch._foreach_mul(moments, beta / divisor))
        torch._foreach_addcmul_(coming, x, x, value=(1.0 - beta) / divisor)
        if most:
            torch._foreach_maximum_(coming, torch._foreach_div(most[0], divisor))
        torch._foreach_sqrt_(coming)
        torch._foreach_add_(coming, eps)
        carry(means, older, coming, kappa)


def denominators_before(second_moments: list[Tensor], divisor: float, eps: float) -> list[Tensor]:
    """Return `denominators` to carry from: what float16 rounds to zero counts as its smallest number."""
    if second_moments[0].dtype == torch.float16:
        second_moments = list(torch._foreach_clamp_min(second_moments, 2.0**-24))
    return denominators(second_moments, divisor, eps)


def denominators(second_moments: list[Tensor], divisor: float, eps: float) -> list[Tensor]:
    """Return sqrt(s / divisor) + eps."""
    found = [torch.zeros_like(s) for s in second_moments]
    for roots, moments in pieces(found, second_moments):
        torch._foreach_add_(roots, moments, alpha=1.0 / divisor)
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, eps)
    return found


def pieces(*lists: list[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
    """Yield lists of tensors that belong together: large ones on a CPU piece by piece, all others at once."""
    whole: tuple[list[Tensor], ...] = tuple([] for _ in lists)
    size = PIECE * torch.get_num_threads()
    for tensors in zip(*lists, strict=True):
        in_pieces = tensors[0].numel() > size and all(t.device.type == "cpu" and t.is_contiguous() for t in tensors)
        if in_pieces and type(tensors[0]) is Tensor:
            for parts in zip(*(t.view(-1).split(size) for t in tensors), strict=True):
                yield tuple([part] for part in parts)
        else:
            for together, tensor in zip(whole, tensors, strict=True):
                together.append(tensor)
    if whole[0]:
        yield whole

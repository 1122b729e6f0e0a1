"""The second moment of the reference batch, for an optimizer that takes it from the batch's own gradient.

An optimizer that does s = beta*s + w*x^2 arrives at beta*s + w*s_ref if s is moved by (w/beta) * (s_ref - x^2) before its step:
so torch's own update runs, with all its options. With V without bias the variance of the mean gradient, sigma^2/B,

    s_ref = ghat^2 + sigma^2 * (1/B_ref - 1/B) = ghat^2 + (kappa - 1) * V

which is ghat^2 at B = B_ref: there nothing is moved, and at a larger B the move is upwards.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from largebatch.moments.micro_batches import Slot, Units
from largebatch.noise import power_sums


@dataclass(frozen=True)
class Shift:
    """How a second moment s is moved before the optimizer makes s = beta*s + weight*x^2 of it.

        s = keep*s + of_square * x^2 + of_variance * V,  and at the least such that beta*s + weight*x^2 >= least * u^2

    Args:
        keep: factor of what has been averaged so far.
        of_square: of the squared gradient x, as the optimizer takes it.
        of_variance: of V.
        beta: coefficient of the optimizer's average.
        weight: of its newest square.
        least: see above; 0 where no bound is needed.
        beta1: coefficient of the average of gradients u that the root of s divides; 0 where that is x itself.
    """

    keep: float = 1.0
    of_square: float = 0.0
    of_variance: float = 0.0
    beta: float = 1.0
    weight: float = 1.0
    least: float = 0.0
    beta1: float = 0.0

    @property
    def moves(self) -> bool:
        """Whether it changes anything."""
        return (self.keep, self.of_square, self.of_variance) != (1.0, 0.0, 0.0)


@dataclass
class Row:
    """One parameter of an update.

    Args:
        slot: its squares.
        moment: the second moment s.
        shift: how s is moved.
        weight_decay: L2 coefficient of the gradient that the optimizer squares.
        maximize: whether the optimizer takes the negative gradient.
        average: the running average of gradients, where there is one.
    """

    slot: Slot
    moment: Tensor
    shift: Shift
    weight_decay: float = 0.0
    maximize: bool = False
    average: Tensor | None = None

    def taken(self) -> Tensor:
        """Return x, the gradient as the optimizer takes it."""
        gradient = self.slot.gradient()
        gradient = -gradient if self.maximize else gradient
        return gradient.add(self.slot.parameter.detach(), alpha=self.weight_decay) if self.weight_decay else gradient


@torch.no_grad()
def move_second_moments(rows: Iterable[Row], units: Units, spread: float) -> None:
    """Move the second moments of an update.

    Args:
        rows: the parameters with a gradient.
        units: n, and the scale of the squares.
        spread: with one unit alone, V = spread * (g_t - g_{t-1})^2.
    """
    alike: dict[tuple[Shift, bool, torch.dtype], list[Row]] = {}
    for row in rows:
        if row.shift.moves:
            alike.setdefault((row.shift, row.slot.holds == "previous", row.moment.dtype), []).append(row)
    for (shift, _, _), group in alike.items():
        moments = [row.moment for row in group]
        if shift.keep != 1.0:
            torch._foreach_mul_(moments, shift.keep)
        if shift.of_square:
            taken = [row.taken() for row in group]
            torch._foreach_addcmul_(moments, taken, taken, value=shift.of_square)
        _add_variances(moments, [row.slot for row in group], units, spread, shift.of_variance)
        if shift.least:
            for row in group:
                _bound(row)


def _add_variances(moments: list[Tensor], slots: list[Slot], units: Units, spread: float, weight: float) -> None:
    """Add weight * V to second moments."""
    regions = [slot.region for slot in slots if slot.region is not None]
    grads = [slot.gradient() for slot in slots]
    if units.num_units <= 1:
        # The variance of a difference of two is the sum of theirs; without an older gradient all of this one counts as noise.
        if slots[0].holds == "previous":
            grads, weight = list(torch._foreach_add(grads, regions, alpha=-units.factor)), weight * spread
        torch._foreach_addcmul_(moments, grads, grads, value=weight)
        return
    weight /= units.num_units - 1.0
    if moments[0].dtype == regions[0].dtype:
        torch._foreach_add_(moments, regions, alpha=weight * units.scale)
        torch._foreach_addcmul_(moments, grads, grads, value=-weight)
    else:  # narrower: rounded once
        moved = torch._foreach_mul(regions, weight * units.scale)
        torch._foreach_addcmul_(moved, grads, grads, value=-weight)
        torch._foreach_add_(moments, moved)


@torch.no_grad()
def noise_sums(slots: list[Slot], units: Units, spread: float) -> tuple[float, float]:
    """Return |ghat|^2 and the sum of V over all parameters, of the gradients as the backward passes left them."""
    grads = [slot.gradient() for slot in slots]
    regions = [slot.region for slot in slots if slot.region is not None]
    signal = power_sums(grads, 2).sum()
    if units.num_units > 1:
        variance = (units.scale * power_sums(regions, 1).sum() - signal) / (units.num_units - 1.0)
    elif all(slot.holds == "previous" for slot in slots):
        variance = spread * power_sums(list(torch._foreach_add(grads, regions, alpha=-units.factor)), 2).sum()
    else:
        variance = signal
    signal_sum, variance_sum = (torch.stack([signal, variance]) / (units.factor**2 or 1.0)).tolist()
    return signal_sum, variance_sum


def _bound(row: Row) -> None:
    """Keep the second moment above what an average of squares cannot fall below.

    Below the reference batch s_ref is a difference, and so it is where units differ in size: single estimates may be
    negative, and their average come near zero, by which the update would be divided.
    """
    shift, taken = row.shift, row.taken()
    direction = taken if row.average is None else torch.lerp(row.average.to(taken.dtype), taken, 1.0 - shift.beta1)
    lowest = direction.square_().mul_(shift.least) if direction is not taken else taken.square().mul_(shift.least)
    lowest.addcmul_(taken, taken, value=-shift.weight).div_(shift.beta)
    torch.maximum(row.moment, lowest.to(row.moment.dtype), out=row.moment)

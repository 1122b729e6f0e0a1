"""The second moment of the reference batch, for an optimizer that takes it from the batch's own gradient.

An optimizer that does s = beta*s + w*x^2 arrives at beta*s + w*s_ref if s is moved by (w/beta) * (s_ref - x^2) before its step:
so torch's own update runs, with all its options. With V without bias the variance of the mean gradient, sigma^2/B,

    s_ref = ghat^2 + sigma^2 * (1/B_ref - 1/B) = ghat^2 + (kappa - 1) * V

which is ghat^2 at B = B_ref: there nothing is moved, and at a larger B the move is upwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from largebatch.moments.micro_batches import Slot, Units, flat

# Elements that are worked on together on a CPU, so that what is read twice is in its cache the second time.
CHUNK = 65_536


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
        moment: the second moment s, or None where the optimizer has none.
        shift: how s is moved.
        weight_decay: L2 coefficient of the gradient that the optimizer squares.
        maximize: whether the optimizer takes the negative gradient.
        average: the running average of gradients, where there is one.
    """

    slot: Slot
    moment: Tensor | None = None
    shift: Shift = Shift()
    weight_decay: float = 0.0
    maximize: bool = False
    average: Tensor | None = None

    def taken(self) -> Tensor:
        """Return x, the gradient as the optimizer takes it."""
        gradient = self.slot.parameter.grad
        assert gradient is not None and self.slot.region is not None
        gradient = gradient.detach().to(self.slot.region.dtype)
        gradient = -gradient if self.maximize else gradient
        return gradient.add(self.slot.parameter.detach(), alpha=self.weight_decay) if self.weight_decay else gradient


def _pieces(row: Row) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yield (gradient, region, second moment) in one dimension: chunks on a CPU, the whole elsewhere."""
    slot = row.slot
    assert slot.parameter.grad is not None and slot.region is not None
    gradient, region = flat(slot.parameter.grad.detach(), slot.order), flat(slot.region, slot.order)
    moment = None if row.moment is None else row.moment.permute(slot.order)
    if moment is not None and not moment.is_contiguous():  # another layout than its parameter's
        yield gradient.view(moment.shape), region.view(moment.shape), moment
        return
    moment = None if moment is None else moment.view(-1)
    if gradient.device.type != "cpu" or gradient.numel() <= CHUNK:
        yield gradient, region, moment
        return
    for first in range(0, gradient.numel(), CHUNK):
        part = slice(first, first + CHUNK)
        yield gradient[part], region[part], None if moment is None else moment[part]


@torch.no_grad()
def move_second_moments(rows: list[Row], units: Units, spread: float) -> tuple[float, float]:
    """Move the second moments of an update, and return the sums that the noise scale is made of.

    Args:
        rows: the parameters with a gradient.
        units: n, and the scale of the squares.
        spread: with one unit alone, V = spread * (g_t - g_{t-1})^2.

    Returns:
        |ghat|^2 and the sum of V over all parameters, of the gradients as the backward passes left them.
    """
    signals: list[Tensor] = []
    variances: list[Tensor] = []
    alone = units.num_units <= 1
    for row in rows:
        for gradient, region, moment in _pieces(row):
            gradient = gradient.to(region.dtype)
            signal = torch.dot(gradient.view(-1), gradient.view(-1))
            moment = moment if row.shift.moves else None
            if moment is not None and row.shift.keep != 1.0:
                moment.mul_(row.shift.keep)
            take = _one_unit if alone else _many_units
            signals.append(signal)
            variances.append(take(row, units, spread, gradient, region, moment, signal))
        if alone:
            row.slot.holds = "previous"
        if row.moment is not None and row.shift.of_square:
            taken = row.taken()
            row.moment.addcmul_(taken, taken, value=row.shift.of_square)
        if row.moment is not None and row.shift.least:
            _bound(row, row.moment)
    factor = units.factor**2 or 1.0
    both = torch.stack([torch.stack(signals).double().sum(), torch.stack(variances).double().sum()])
    signal_sum, variance_sum = (both / factor).tolist()
    return signal_sum, variance_sum


def _many_units(
    row: Row, units: Units, spread: float, gradient: Tensor, region: Tensor, moment: Tensor | None, signal: Tensor
) -> Tensor:
    """Take V from the squares of the update's units."""
    of_variance = row.shift.of_variance / (units.num_units - 1.0)
    if moment is not None and moment.dtype == region.dtype:
        moment.add_(region, alpha=of_variance * units.scale)
        moment.addcmul_(gradient, gradient, value=-of_variance)
    elif moment is not None:  # narrower: rounded once
        moved = torch.mul(region, of_variance * units.scale)
        moment.add_(moved.addcmul_(gradient, gradient, value=-of_variance))
    return (units.scale * region.sum() - signal) / (units.num_units - 1.0)


def _one_unit(
    row: Row, units: Units, spread: float, gradient: Tensor, region: Tensor, moment: Tensor | None, signal: Tensor
) -> Tensor:
    """Take V from the last two gradients, and keep the newer one; without an older one all of it counts as noise."""
    change = gradient
    if row.slot.holds == "previous":
        change = torch.add(gradient, region, alpha=-units.factor)
    else:
        spread = 1.0
    if moment is not None:
        moment.addcmul_(change, change, value=row.shift.of_variance * spread)
    variance = spread * torch.dot(change.view(-1), change.view(-1))
    torch.div(gradient, units.factor or 1.0, out=region)
    return variance


def _bound(row: Row, moment: Tensor) -> None:
    """Keep the second moment above what an average of squares cannot fall below.

    Below the reference batch s_ref is a difference, and so it is where units differ in size: single estimates may be
    negative, and their average come near zero, by which the update would be divided.
    """
    shift, taken = row.shift, row.taken()
    direction = taken if row.average is None else torch.lerp(row.average.to(taken.dtype), taken, 1.0 - shift.beta1)
    lowest = direction.square_().mul_(shift.least) if direction is not taken else taken.square().mul_(shift.least)
    lowest.addcmul_(taken, taken, value=-shift.weight).div_(shift.beta)
    torch.maximum(moment, lowest.to(moment.dtype), out=moment)

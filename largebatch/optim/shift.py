"""The second moment of the reference batch, for an optimizer that computes it from the batch's own gradient.

An optimizer that computes s = beta*s + w*x^2 arrives at beta*s + w*s_ref if s is shifted by (w/beta) * (s_ref - x^2) before its
step. So torch's own update runs, with all its options. With V an unbiased estimate of the mean gradient's variance, sigma^2/B,

    s_ref = ghat^2 + sigma^2 * (1/B_ref - 1/B) = ghat^2 + (kappa - 1) * V

which is ghat^2 at B = B_ref: there the shift is zero, and at a larger B it is not negative.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from largebatch.moments.micro_batches import Units
from largebatch.moments.projection import Slot
from largebatch.noise.estimator import power_sums
from largebatch.optim.averages import smallest_ratio, smallest_with_mean
from largebatch.optim.carry import carry, is_carried, pieces, roots, roots_before, uncarried_share
from largebatch.scaling.rules import second_moment_coefficient

# A coefficient so small that an average keeps almost nothing of its previous value.
FORGOTTEN = 1e-4
# Largest error by the rounding of ghat^2 in a second moment, relative to the newest square in it.
ROUNDED = 0.01


@dataclass(frozen=True)
class Shift:
    """How a second moment s is shifted before the optimizer computes beta*s + weight*x^2.

        s = keep*s + of_square * x^2 + of_variance * V,  raised if necessary so that beta*s + weight*x^2 >= least * u^2

    or, for a centered optimizer, so that the variance beta*s + weight*x^2 - m^2 is ``least`` times that of the batch's own
    gradients or more.

    Args:
        keep: factor of the average so far.
        of_square: factor of x^2, where x is the gradient as the optimizer uses it, with weight decay.
        of_variance: factor of V.
        beta: coefficient of the optimizer's average.
        weight: weight of its newest square.
        least: factor of the bound; 0 where no bound is needed.
        beta1: coefficient of the average of gradients u that is divided by the root of s; 0 if u is x itself.
        older: divisor of s before the shift, if the average of gradients is carried (`largebatch.optim.carry`); else 0.
        newer: divisor of beta*s + weight*x^2.
    """

    keep: float = 1.0
    of_square: float = 0.0
    of_variance: float = 0.0
    beta: float = 1.0
    weight: float = 1.0
    least: float = 0.0
    beta1: float = 0.0
    older: float = 0.0
    newer: float = 1.0

    @property
    def moves(self) -> bool:
        """Whether the shift changes s."""
        return (self.keep, self.of_square, self.of_variance) != (1.0, 0.0, 0.0)


@dataclass
class Count:
    """The count of a parameter's updates, for a second moment whose bias is corrected by that count.

    Args:
        updates: k, as torch counts.
        log_decay: log of the product of the coefficients that were used; 1 - exp(log_decay) corrects the average's bias.
        stretch: (1 - beta^k) / (1 - exp(log_decay)), the factor by which the stored average is multiplied, because torch
            divides it by 1 - beta^k with the last beta. 1 while the batch size is constant.
        moment: the second moment that the count belongs to; None if not determined yet.
    """

    updates: float = 0.0
    log_decay: float = 0.0
    stretch: float = 1.0
    moment: weakref.ref[Tensor] | None = None

    def advance(self, beta: float) -> float:
        """Count an update; return the ratio of the new stretch to the one before."""
        before = self.stretch
        self.updates += 1.0
        self.log_decay += math.log(beta)
        self.stretch = self.at(beta)
        return self.stretch / before

    @property
    def divisor(self) -> float:
        """The divisor that corrects the bias of the stored average, which includes the stretch; 0 before the first update."""
        return -math.expm1(self.log_decay) * self.stretch if self.updates else 0.0

    def at(self, beta: float) -> float:
        """Return the stretch for an optimizer that divides by 1 - beta^k."""
        if not self.updates or self.log_decay == 0.0:
            return 1.0
        stretch = -math.expm1(self.updates * math.log(beta)) / -math.expm1(self.log_decay)
        return 1.0 if abs(stretch - 1.0) < 1e-12 else stretch


def coefficient_at(group: dict[str, Any], kappa: float, shortest: float) -> float:
    """Return a group's beta2 or alpha at kappa times the reference batch; not 0, because the shift is divided by it."""
    beta = float(group["betas"][1] if "betas" in group else group["alpha"])
    return max(second_moment_coefficient(beta, kappa, shortest), min(beta, FORGOTTEN))


def shift_of(
    optimizer: torch.optim.Optimizer,
    group: dict[str, Any],
    kappa: float,
    *,
    bounded: bool,
    count: Count,
    shortest: float,
) -> Shift:
    """Return how the second moment of a parameter is shifted in the coming update, and count the update.

    Args:
        optimizer: an optimizer of torch.optim, with a second moment.
        group: the parameter's group, with the values of the reference.
        kappa: B / B_ref.
        bounded: whether single estimates may be negative.
        count: the parameter's count; updates are counted only for Adam and AdamW.
        shortest: as in `second_moment_coefficient`.
    """
    at_most = min(1.0, kappa) if bounded else 0.0
    if isinstance(optimizer, torch.optim.Adagrad):  # an update stands for kappa updates at the reference
        return Shift(of_square=kappa - 1.0, of_variance=kappa * (kappa - 1.0), least=kappa * at_most)
    beta = coefficient_at(group, kappa, shortest)
    weight = 1.0 - beta
    if isinstance(optimizer, torch.optim.RMSprop):
        least = at_most if group["centered"] else weight * at_most
        return Shift(of_variance=weight / beta * (kappa - 1.0), beta=beta, weight=weight, least=least)
    carries = is_carried(kappa, beta)
    older = count.divisor if carries else 0.0
    keep = count.advance(beta)
    # A carried average is an average of quotients, each of which has to be bounded.
    beta1 = 0.0 if carries else float(group["betas"][0])
    return Shift(
        keep=keep,
        of_square=weight / beta * (count.stretch - 1.0),
        of_variance=weight / beta * count.stretch * (kappa - 1.0),
        beta=beta,
        weight=weight,
        least=smallest_ratio(beta1, beta) * at_most * count.stretch,
        beta1=beta1,
        older=older,
        newer=count.divisor,
    )


@dataclass
class Row:
    """One parameter of an update.

    Args:
        slot: the parameter's slot, with its squares.
        moment: the second moment s.
        shift: how s is shifted.
        weight_decay: L2 coefficient of the gradient that the optimizer squares.
        maximize: whether the optimizer uses the negative gradient.
        average: the running average of gradients, if there is one.
        largest: AMSGrad's largest second moment so far.
        mean: for a centered optimizer, the running average of gradients whose square is subtracted from s.
        eps: number that the optimizer adds to the root.
    """

    slot: Slot
    moment: Tensor
    shift: Shift
    weight_decay: float = 0.0
    maximize: bool = False
    average: Tensor | None = None
    largest: Tensor | None = None
    mean: Tensor | None = None
    eps: float = 0.0

    @property
    def kind(self) -> tuple[object, ...]:
        """The values that are equal for all parameters that are shifted together."""
        optional = self.average is None, self.largest is None, self.mean is None
        numbers = self.shift, self.weight_decay, self.maximize, self.eps
        return *numbers, *optional, self.slot.holds, self.moment.dtype


@torch.no_grad()
def move_second_moments(rows: Iterable[Row], units: Units, spread: float, kappa: float) -> None:
    """Shift the second moments of an update, and carry the averages of gradients that are divided by their roots.

    Args:
        rows: the parameters with a gradient.
        units: n, and the scale of the squares.
        spread: for a single unit, V = spread * (g_t - g_{t-1})^2.
        kappa: B / B_ref.
    """
    alike: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        if row.shift.moves:
            alike.setdefault(row.kind, []).append(row)
    for together in alike.values():
        columns = [
            [row.moment for row in together],
            [row.slot.region for row in together],
            [row.slot.gradient() for row in together],
            [row.slot.parameter.detach() for row in together],
            [row.average for row in together if row.average is not None],
            [row.largest for row in together if row.largest is not None],
            [row.mean for row in together if row.mean is not None],
        ]
        given = [column for column in columns if column]
        for piece in pieces(*given):
            parts = iter(piece)
            _move(_Piece(*(next(parts) if column else [] for column in columns)), together[0], units, spread, kappa)


@dataclass
class _Piece:
    """Elements of parameters of one kind; each list is in their order, or empty where there is no such tensor."""

    moments: list[Tensor]
    regions: list[Tensor]
    gradients: list[Tensor]
    parameters: list[Tensor]
    averages: list[Tensor]
    largest: list[Tensor]
    means: list[Tensor]

    def taken(self, row: Row) -> list[Tensor]:
        """Return x, the gradients as the optimizer uses them: negative under maximize, and with L2 weight decay."""
        found = list(torch._foreach_neg(self.gradients)) if row.maximize else self.gradients
        return list(torch._foreach_add(found, self.parameters, alpha=row.weight_decay)) if row.weight_decay else found


def _move(piece: _Piece, row: Row, units: Units, spread: float, kappa: float) -> None:
    shift, moments, taken = row.shift, piece.moments, piece.taken(row)
    older = roots_before(piece.largest or moments, shift.older, row.eps) if shift.older else []
    lowest = _lowest_variances(piece, taken, shift) if piece.means and shift.least else []
    if shift.keep != 1.0:
        torch._foreach_mul_([*moments, *piece.largest], shift.keep)
    if shift.of_square:
        torch._foreach_addcmul_(moments, taken, taken, value=shift.of_square)
    _add_variances(piece, row.slot.holds == "previous", units, spread, shift)
    if shift.least:
        _bound(piece, taken, lowest, shift)
    _drop_rounding(moments, shift)
    if older:
        # sqrt(beta*s + weight*x^2) is sqrt(beta) times the root of this.
        coming = torch._foreach_addcmul(moments, taken, taken, value=shift.weight / shift.beta)
        newer, ratio = shift.newer / shift.beta, shift.older / shift.newer * shift.beta
        if piece.largest:
            torch._foreach_maximum_(coming, torch._foreach_div(piece.largest, shift.beta))
        share = uncarried_share(kappa, shift.beta)
        carry(piece.averages, older, roots(list(coming), newer, row.eps), math.sqrt(ratio), share)


def _add_variances(piece: _Piece, is_change: bool, units: Units, spread: float, shift: Shift) -> None:
    """Add of_variance * V to second moments."""
    weight = shift.of_variance
    moments, regions, grads = piece.moments, piece.regions, piece.gradients
    if units.num_units <= 1:
        # The variance of a difference is the sum of both variances; without an older gradient all of this one counts as noise.
        if is_change:  # `Slot.keep_gradient` overwrites the region afterwards
            torch._foreach_mul_(regions, -units.clip)
            torch._foreach_add_(regions, grads)
            grads, weight = regions, weight * spread
        torch._foreach_addcmul_(moments, grads, grads, value=weight)
        return
    weight /= units.num_units - 1.0
    negligible = 2.0 * abs(weight) * units.rounding < ROUNDED * shift.weight / shift.beta
    if negligible and moments[0].dtype == regions[0].dtype:
        torch._foreach_add_(moments, regions, alpha=weight * units.scale)
        torch._foreach_addcmul_(moments, grads, grads, value=-weight)
        return
    # Without noise, the excess of the squares over ghat^2 is lost in rounding, and must not become negative. Computed in the
    # region, which is overwritten, it also does not round narrow moments twice.
    torch._foreach_mul_(regions, units.scale)
    torch._foreach_addcmul_(regions, grads, grads, value=-1.0)
    if units.equal:
        torch._foreach_clamp_min_(regions, 0.0)
    torch._foreach_add_(moments, regions, alpha=weight)


def _drop_rounding(moments: list[Tensor], shift: Shift) -> None:
    """Set moments that are negative by rounding to zero.

    Where the squares of the units' gradients underflow and ghat^2 does not, V is negative, and the root of such a moment would
    be NaN. Plain Adam's moment is zero there.
    """
    if not shift.least and shift.of_square >= 0.0:  # only rounding makes a moment negative
        torch._foreach_clamp_min_(moments, 0.0)
        return
    smallest = torch.finfo(moments[0].dtype).tiny / torch.finfo(moments[0].dtype).eps
    for moment in moments:
        moment.masked_fill_((moment < 0.0) & (moment > -smallest), 0.0)


@torch.no_grad()
def variances_of(slots: list[Slot], units: Units) -> list[Tensor]:
    """Return V of each parameter's gradient before clipping; n > 1."""
    scale = 1.0 / (units.num_units - 1.0) / (units.clip**2 or 1.0)
    variances = torch._foreach_mul([slot.region for slot in slots], units.scale * scale)
    grads = [slot.gradient() for slot in slots]
    torch._foreach_addcmul_(variances, grads, grads, value=-scale)
    if units.equal:  # then only rounding makes V negative
        torch._foreach_clamp_min_(variances, 0.0)
    return list(variances)


@torch.no_grad()
def sampled_noise(slots: list[Slot], units: Units) -> tuple[list[Tensor], list[Tensor]]:
    """Return a sample of the elements of each gradient before clipping, and V of these elements; n > 1."""
    of_mean = 1.0 / (units.num_units - 1.0)
    scale = units.scale * of_mean / units.clip**2
    grads = [slot.sample(slot.gradient()) / units.clip for slot in slots]
    squares = [slot.sample(slot.region) for slot in slots]
    return grads, [q * scale - g.square() * of_mean for q, g in zip(squares, grads, strict=True)]


@torch.no_grad()
def noise_sums(slots: list[Slot], units: Units, spread: float) -> tuple[float, float]:
    """Return |ghat|^2 and the sum of V over all parameters, of the gradients before clipping."""
    grads = [slot.gradient() for slot in slots]
    regions = [slot.region for slot in slots]
    signal = power_sums(grads, 2).sum()
    if units.num_units > 1:
        variance = (units.scale * power_sums(regions, 1).sum() - signal) / (units.num_units - 1.0)
    elif all(slot.holds == "previous" for slot in slots):
        pairs = zip(grads, regions, strict=True)  # one at a time, to avoid a copy of all gradients
        changes = [power_sums([torch.add(g, region, alpha=-units.clip)], 2) for g, region in pairs]
        variance = spread * torch.cat(changes).sum()
    else:
        variance = signal
    signal_sum, variance_sum = (torch.stack([signal, variance]) / (units.clip**2 or 1.0)).tolist()
    return signal_sum, variance_sum


def _lowest_variances(piece: _Piece, taken: list[Tensor], shift: Shift) -> list[Tensor]:
    """Return the lower bound of beta*s + weight*x^2 for an optimizer that subtracts the square of a mean from it."""
    rows = zip(piece.moments, piece.means, taken, strict=True)
    return [smallest_with_mean(shift.beta * s.to(x), m.to(x), x, shift.weight, shift.least) for s, m, x in rows]


def _bound(piece: _Piece, taken: list[Tensor], lowest_variances: list[Tensor], shift: Shift) -> None:
    """Keep second moments above the lower bound of an average of squares.

    Below the reference batch, and where units differ in size, s_ref is a difference: single estimates may be negative, and the
    update would be divided by an average near zero.
    """
    for index, (moment, newest) in enumerate(zip(piece.moments, taken, strict=True)):
        direction = newest
        if piece.averages:
            direction = torch.lerp(piece.averages[index].to(newest.dtype), newest, 1.0 - shift.beta1)
        lowest = lowest_variances[index] if lowest_variances else direction.square().mul_(shift.least)
        lowest.addcmul_(newest, newest, value=-shift.weight).div_(shift.beta)
        torch.maximum(moment, lowest.to(moment.dtype), out=moment)

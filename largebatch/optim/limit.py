"""How far an optimizer's steps are from the largest stable ones, measured at intervals from two successive gradients.

A is the immediate step of an element per unit of gradient (`response`). In the coordinates u = w / sqrt(A) the immediate step
is the gradient with respect to u. There the three sums over a layer, or over the model,

    E = sum A ((g_{t+1} - g_t)^2/2 - V),   U = sum dw^2 / A,   N = sum A V

give the curvature h by `largebatch.noise.limit.curvature_of_steps`. r = h / (2 (1+b)), times (1+2b)/(1+b) with Nesterov's
momentum, is the share of the largest stable step in use: a mean over directions, weighted by the squares of steps and by the
noise. A single direction may be nearer to its limit. Each sum is averaged over measurements before r is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from largebatch.moments.micro_batches import Units
from largebatch.moments.projection import Slot
from largebatch.noise.limit import curvature_of_steps
from largebatch.optim.around import is_decoupled
from largebatch.optim.response import KNOWN, lookahead_of, momentum_of, responses
from largebatch.optim.shift import sampled_noise

# Each measurement uses two successive updates: two of every MEASURED_EARLY among the first EARLY_UPDATES, then two of every
# MEASURED_EVERY. The averages span AVERAGED measurements.
MEASURED_EARLY, EARLY_UPDATES, MEASURED_EVERY, AVERAGED = 8, 64, 32, 16


@dataclass(frozen=True)
class Limit:
    """How near an optimizer's steps are to the largest stable ones.

    Args:
        share: r of the model, a mean over directions: the steepest direction may reach its limit, 1, while the mean is well
            below. Where a direction's share is 0.5, the variance of the weights has doubled. nan before the first measurement.
        batch_size: the batch size, in samples, at which r would be 1 by the linear rule; infinite where r is 0.
        by_name: r of each parameter or layer.
    """

    share: float = math.nan
    batch_size: float = math.nan
    by_name: dict[str, float] = field(default_factory=dict)


class LimitMeter:
    """Measures the share of the largest stable step.

    Between the two updates of a measurement it keeps a gradient, and A if A differs by element; otherwise it keeps only sums.

    Args:
        names: names of the columns.

    Attributes:
        reduce: adds sums over the ranks that hold other parts of the parameters; None if each rank holds all of them.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.reduce: Callable[[Tensor], Tensor] | None = None
        self.count, self.momentum, self.lookahead, self.batch_size = 0, 0.0, 1.0, 0.0
        self.means = torch.zeros(3, len(self.names), dtype=torch.float64)
        self._kept: dict[int, tuple[Tensor, Any, float]] = {}
        self._sums: Tensor | None = None

    @property
    def is_second(self) -> bool:
        """Whether the coming update is the second of a measurement."""
        return bool(self._kept)

    def drop(self) -> None:
        """Discard the first half of a measurement."""
        self._kept, self._sums = {}, None

    @torch.no_grad()
    def begin(
        self,
        columns: Sequence[int],
        steps: Sequence[Tensor],
        grads: Sequence[Tensor],
        variances: Sequence[Tensor],
        responses: Sequence[Any],
        weights: Sequence[float],
        group: dict[str, Any],
        batch_size: float,
    ) -> None:
        """Add parameters to the first half of a measurement, after the step of its first update.

        Args:
            columns: the parameters' columns in `names`.
            steps: dw of each parameter, overwritten.
            grads: mean gradients before clipping; kept.
            variances: V of each gradient, overwritten.
            responses: A of each parameter, tensors or numbers, times the factor of clipping; kept.
            weights: number of elements that each given element stands for, by parameter.
            group: the parameters' group, which has the momentum b.
            batch_size: B.
        """
        self.momentum, self.lookahead, self.batch_size = momentum_of(group), lookahead_of(group), batch_size
        if self._sums is None:
            self._sums = torch.zeros(3, len(self.names), dtype=torch.float64, device=grads[0].device)
        pieces = (columns, steps, grads, variances, responses, weights)
        for column, step, gradient, variance, response, weight in zip(*pieces, strict=True):
            self._sums[1, column] = weight * step.square_().div_(response).sum()
            self._sums[2, column] = weight * variance.mul_(response).sum()
            self._kept[column] = gradient, response, weight

    @torch.no_grad()
    def end(
        self, columns: Sequence[int], grads: Sequence[Tensor], variances: Sequence[Tensor], batch_size: float
    ) -> None:
        """Add parameters to the second half of a measurement, before the step of its second update; then call `commit`.

        Args:
            columns: the parameters' columns.
            grads: mean gradients before clipping.
            variances: V of each gradient, overwritten.
            batch_size: B.
        """
        assert self._sums is not None
        of_noise = 0.5 * (1.0 + batch_size / self.batch_size)  # V of both updates, divided by twice V of this one
        for column, gradient, variance in zip(columns, grads, variances, strict=True):
            if column not in self._kept or self._kept[column][0].shape != gradient.shape:
                continue  # it had no gradient in the first half, or is another parameter
            before, response, weight = self._kept[column]
            change = (gradient - before).square_().mul_(0.5).sub_(variance, alpha=of_noise)
            self._sums[0, column] = weight * change.mul_(response).sum()

    def commit(self) -> None:
        """Add the measurement to the averages."""
        if self._sums is None:
            return
        sums = (self._sums if self.reduce is None else self.reduce(self._sums)).cpu()
        self.drop()
        if bool(sums.isfinite().all()):
            self.count = min(self.count + 1, AVERAGED)
            self.means += (sums - self.means) / self.count

    @property
    def share(self) -> float:
        """The share of the model, without the shares of its parameters."""
        return self._share(self.means.sum(1)) if self.count else math.nan

    def limit(self, layer_of: Callable[[str], str] = str) -> Limit:
        """Return the measured limit.

        Args:
            layer_of: returns the name of a parameter's layer, given the parameter's name.
        """
        if not self.count:
            return Limit()
        layers: dict[str, Tensor] = {}
        for name, column in zip(self.names, self.means.unbind(1), strict=True):
            layers[layer_of(name)] = layers.get(layer_of(name), 0.0) + column
        share = self.share
        size = self.batch_size / share if share > 0 else math.inf
        return Limit(share, size, {name: self._share(sums) for name, sums in layers.items()})

    def _share(self, sums: Tensor) -> float:
        extra, step_sq, step_noise = (float(value) for value in sums)
        return self.lookahead * curvature_of_steps(extra, step_sq, step_noise) / (2.0 * (1.0 + self.momentum))

    def state_dict(self) -> dict[str, Any]:
        """Return the averages, for a checkpoint, without the first half of a measurement."""
        numbers = {name: getattr(self, name) for name in ("count", "momentum", "lookahead", "batch_size")}
        return {**numbers, "names": self.names, "means": self.means.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.names, self.means = list(state["names"]), torch.tensor(state["means"], dtype=torch.float64)
        self.count, self.momentum, self.batch_size = state["count"], state["momentum"], state["batch_size"]
        self.lookahead = state.get("lookahead", 1.0)
        self.drop()


@dataclass
class _Part:
    """The quantities that are kept for a group's parameters during a step, for a sample of the elements of each.

    Args:
        group: the group, which has the values of the update once its step has begun.
        columns: the parameters' columns.
        slots: the parameters' slots.
        grads: mean gradients before clipping.
        variances: V of each gradient.
        before: the parameters before the step.
    """

    group: dict[str, Any]
    columns: list[int]
    slots: list[Slot]
    grads: list[Tensor]
    variances: list[Tensor]
    before: list[Tensor]


class LimitWatch:
    """Measures the limit around an optimizer's own steps, for gradients whose micro-batches are squared by hooks.

    It reads at most `largebatch.moments.projection.PROJECTED` elements of each parameter, evenly spaced.

    Args:
        optimizer: the optimizer whose steps are measured; nothing is measured if its response is not known.
        names: names of its parameters, if they are known already.
        every: number of updates from one measurement to the next after the first ones, >= 2; the first update is never used.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, names: Sequence[str] = (), every: int = MEASURED_EVERY
    ) -> None:
        self.optimizer, self.every, self.meter = optimizer, every, LimitMeter(names)
        self._parts: list[_Part] = []
        self._clip, self._batch_size = 1.0, 0.0

    def before(
        self, named: Callable[[], Iterable[tuple[str, Tensor]]], units: Units, batch_size: float, update: int
    ) -> None:
        """Read an update's gradients, before its step and before its squares are overwritten.

        Args:
            named: returns the optimizer's parameters with their names.
            units: the units of the update.
            batch_size: B.
            update: number of the update, from 0.
        """
        self._parts = []
        every = min(self.every, MEASURED_EARLY) if update < EARLY_UPDATES else self.every
        is_first = update > 0 and update % every == (every - 2 or 1)
        if type(self.optimizer) not in KNOWN or not (is_first or self.meter.is_second):
            return
        names, parameters = zip(*named(), strict=True)
        if self.meter.names != list(names):  # not set yet, or parameters were added or removed
            self.meter = LimitMeter(names)
            if not is_first:
                return
        if units.num_units <= 1 or not units.clip:
            self.meter.drop()
            return
        columns = {p: column for column, p in enumerate(parameters)}
        for group in self.optimizer.param_groups:
            mine = set(group["params"])
            slots = [slot for slot in units.slots if slot.parameter in mine]
            if not slots:
                continue
            grads, variances = sampled_noise(slots, units)
            before = [slot.sample(slot.parameter.detach()).clone() for slot in slots if is_first]
            found = [columns[slot.parameter] for slot in slots]
            if is_first:
                self._parts.append(_Part(group, found, slots, grads, variances, before))
            else:
                self.meter.end(found, grads, variances, batch_size)
        if not is_first:
            self.meter.commit()
        self._clip, self._batch_size = units.clip, batch_size

    def after(self, updates_of: Callable[[Tensor], float], damped_by: dict[Tensor, Tensor]) -> None:
        """Read an update's step, while the groups have the update's values.

        Args:
            updates_of: returns the number of a parameter's updates, including this one, as torch's Adam counts them.
            damped_by: factor by which damping multiplied each parameter's step.
        """
        for part in self._parts:
            effective, steps = [], []
            decay = part.group["lr"] * part.group["weight_decay"] if is_decoupled(self.optimizer, part.group) else 0.0
            for slot, before in zip(part.slots, part.before, strict=True):
                p = slot.parameter
                state = {
                    name: slot.sample(value) if isinstance(value, Tensor) and value.shape == p.shape else value
                    for name, value in self.optimizer.state[p].items()
                }
                (response,) = responses(self.optimizer, part.group, [state], [updates_of(p)])
                damped = slot.sample(damped_by[p]) if p in damped_by else 1.0
                effective.append(response * self._clip * damped)
                steps.append(before.mul_(1.0 - decay).sub_(slot.sample(p.detach())))
            weights = [slot.parameter.numel() / max(1, slot.num_sampled) for slot in part.slots]
            self.meter.begin(
                part.columns, steps, part.grads, part.variances, effective, weights, part.group, self._batch_size
            )
        self._parts = []

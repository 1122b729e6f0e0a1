"""How far an optimizer's steps are from the largest stable ones, measured now and then from two gradients in a row.

With A by how much a gradient moves its element at once (`response`), the coordinates w / sqrt(A) are those in which a step
follows the gradient itself, with rate 1 - b. There the three sums of a layer, or of the whole,

    E = sum A ((g_{t+1} - g_t)^2/2 - V),   U = sum dw^2 / A,   N = sum A V

give the curvature h of `largebatch.noise.limit.curvature_of_steps`, and r = h / (2 (1+b)) is the share of the largest stable
step in use, times (1+2b)/(1+b) with Nesterov's momentum: a mean over directions, weighted by the square of the steps and by
the noise. A direction alone may be nearer to its limit. Each sum is averaged over measurements before r is taken.
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

# A measurement is of two updates in a row: of the first updates two of every eight, then of every so many. An average spans so
# many measurements.
MEASURED_EARLY, EARLY_UPDATES, MEASURED_EVERY, AVERAGED = 8, 64, 32, 16


@dataclass(frozen=True)
class Limit:
    """How near an optimizer's steps are to the largest stable ones.

    Args:
        share: r of the whole, a mean over directions: the steepest may reach its limit, 1, while the mean is well below. In a
            direction where it is 0.5 the variance of the weights has doubled. nan before the first measurement.
        batch_size: that at which r would be 1 by the linear rule, in samples; infinite where r is 0.
        by_name: r of each parameter or layer.
    """

    share: float = math.nan
    batch_size: float = math.nan
    by_name: dict[str, float] = field(default_factory=dict)


class LimitMeter:
    """Measures the share of the largest stable step.

    Between the two updates of a measurement it keeps a gradient, and A where it differs by element; otherwise sums alone.

    Args:
        names: of the columns.

    Attributes:
        reduce: adds sums over the ranks that hold other parts of the parameters; None where each holds all.
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
        """Whether the coming update is the second of two."""
        return bool(self._kept)

    def drop(self) -> None:
        """Let go of half a measurement."""
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
        """Take in parameters at the first update of two, after its step.

        Args:
            columns: of the parameters, in `names`.
            steps: dw of each, used up.
            grads: mean gradients before clipping; kept.
            variances: V, used up.
            responses: A of each, tensors or numbers, times what the gradients were clipped by; kept.
            weights: elements that each one given stands for.
            group: with their momentum, b.
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
        """Take in parameters at the second update, before its step; `commit` follows.

        Args:
            columns: of the parameters.
            grads: mean gradients before clipping.
            variances: V, used up.
            batch_size: B.
        """
        assert self._sums is not None
        of_noise = 0.5 * (1.0 + batch_size / self.batch_size)  # V of both updates, over twice that of this one
        for column, gradient, variance in zip(columns, grads, variances, strict=True):
            if column not in self._kept or self._kept[column][0].shape != gradient.shape:
                continue  # it had no gradient, or is another parameter
            before, response, weight = self._kept[column]
            change = (gradient - before).square_().mul_(0.5).sub_(variance, alpha=of_noise)
            self._sums[0, column] = weight * change.mul_(response).sum()

    def commit(self) -> None:
        """Take a measurement into the averages."""
        if self._sums is None:
            return
        sums = (self._sums if self.reduce is None else self.reduce(self._sums)).cpu()
        self.drop()
        if bool(sums.isfinite().all()):
            self.count = min(self.count + 1, AVERAGED)
            self.means += (sums - self.means) / self.count

    @property
    def share(self) -> float:
        """The share of the whole, without those of its parts."""
        return self._share(self.means.sum(1)) if self.count else math.nan

    def limit(self, layer_of: Callable[[str], str] = str) -> Limit:
        """Return what was measured.

        Args:
            layer_of: from a name to that of its layer.
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
        """Return the averages, for a checkpoint; half a measurement is dropped."""
        numbers = {name: getattr(self, name) for name in ("count", "momentum", "lookahead", "batch_size")}
        return {**numbers, "names": self.names, "means": self.means.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self.names, self.means = list(state["names"]), torch.tensor(state["means"], dtype=torch.float64)
        self.count, self.momentum, self.batch_size = state["count"], state["momentum"], state["batch_size"]
        self.lookahead = state.get("lookahead", 1.0)
        self.drop()


@dataclass
class _Part:
    """What is kept of a group's parameters over a step: of each a sample of its elements, which stand for ``weights`` as many.

    Args:
        group: with the values of the update, after it has begun.
        columns: of the parameters.
        slots: of the parameters.
        grads: mean gradients before clipping.
        variances: V of them.
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

    Of each parameter a sample of its elements is read (`largebatch.moments.projection.PROJECTED`, evenly spread).

    Args:
        optimizer: the one that steps; of one whose response is not known nothing is measured.
        names: of its parameters, where they are known already.
        every: updates from one measurement to the next after the first ones, >= 2; the very first update is in none.
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
        """Look at an update before its step and before its squares are used.

        Args:
            named: returns the optimizer's parameters with their names.
            units: of the update.
            batch_size: B.
            update: its number, from 0.
        """
        self._parts = []
        every = min(self.every, MEASURED_EARLY) if update < EARLY_UPDATES else self.every
        is_first = update > 0 and update % every == (every - 2 or 1)
        if type(self.optimizer) not in KNOWN or not (is_first or self.meter.is_second):
            return
        names, parameters = zip(*named(), strict=True)
        if self.meter.names != list(names):  # or parameters came and went
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
        """Look at an update after its step, while the groups have its values.

        Args:
            updates_of: the updates of a parameter so far, this one included, where torch's Adam counts them.
            damped_by: what the steps of parameters were multiplied by.
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

"""The progress of a run with `largebatch.optim.invariant`."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from largebatch.optim.shift import Count, coefficient_at

# The attributes of `Progress` in a state dict, beside the counts.
SAVED = (
    *("batch_size", "kappa", "samples_seen", "updates", "previous_batch_size"),
    *("loss_scale", "knows_scale", "is_told"),
)


@dataclass
class Progress:
    """The progress of a run, in one object, so that a shallow copy of the optimizer (as Lightning makes one) shares it.

    Args:
        batch_size: B of the last update.
        kappa: B / B_ref of the last update.
        samples_seen: number of samples in all updates.
        updates: number of updates.
        previous_batch_size: B of the gradient that is kept, if updates have a single unit.
        loss_scale: factor by which losses are multiplied, as inferred from the gradients.
        knows_scale: whether the gradients of any update have determined the loss scale.
        is_told: whether it was read off the last update's gradients, which is possible only if they were not clipped.
        announced: B of the coming update, if it was announced.
        renewed: whether B was announced a second time, after a backward pass.
        warned: whether the user was warned that the batch size is above the critical one.
        warned_of_units: whether the user was warned that an update has too few backward passes.
        counts: counts of the second moments whose bias is corrected.
    """

    batch_size: int
    kappa: float = 1.0
    samples_seen: int = 0
    updates: int = 0
    previous_batch_size: float = 0.0
    loss_scale: float = 1.0
    knows_scale: bool = False
    is_told: bool = False
    announced: int | None = None
    renewed: bool = False
    warned: bool = False
    warned_of_units: bool = False
    counts: dict[Tensor, Count] = field(default_factory=dict)

    def clip_of(self, factor: float) -> tuple[float, float]:
        """Split a factor on the gradients into clipping and the loss scale that was divided out; return the factor of clipping.

        A factor that is a power of two is taken for a loss scale alone. While gradients are clipped, the last known scale is
        assumed, at first 1. The second return value corrects the gradients that were kept since the scale was last known;
        it is 1 if they need no correction.
        """
        mantissa, _ = math.frexp(factor)
        if abs(mantissa - 0.5) < 1e-6 or abs(mantissa - 1.0) < 1e-6:
            kept = 1.0 if self.is_told else self.loss_scale * factor
            self.loss_scale, self.is_told = 1.0 / factor, True
            return 1.0, kept
        self.is_told = False
        clip = factor * self.loss_scale
        if clip > 1.0 and factor > 0:  # the loss scale was reduced
            self.loss_scale *= 2.0 ** -math.ceil(math.log2(clip))
            clip = factor * self.loss_scale
        return clip, 1.0

    def announce(self, batch_size: int, is_pending: bool) -> None:
        """Set B of the coming update.

        Args:
            batch_size: B.
            is_pending: whether there was a backward pass since the last update.
        """
        self.renewed = is_pending and self.announced is not None
        self.announced = batch_size

    def restart(self, is_pending: bool) -> None:
        """Discard the announced B of an update that a loss scaler skipped, when its gradients are cleared."""
        if is_pending and not self.renewed:
            self.announced = None
        self.renewed = False

    def state_dict(self, parameters: list[Tensor]) -> dict[str, Any]:
        """Return the entries of a state dict, for parameters in this order."""
        counts = [self.counts.get(p, Count()) for p in parameters]
        numbers = {name: getattr(self, name) for name in SAVED}
        return {**numbers, "counts": [[count.updates, count.log_decay, count.stretch] for count in counts]}

    def load_state_dict(self, state: dict[str, Any], parameters: list[Tensor], moment_name: str | None) -> None:
        """Restore the state that `state_dict` returned, in this version or an earlier one."""
        for name in SAVED:
            setattr(self, name, state.get(name, getattr(self, name)))
        if moment_name == "exp_avg_sq":
            self.counts = {p: Count(*count) for p, count in zip(parameters, state["counts"], strict=True)}

    def advance(self, optimizer: torch.optim.Optimizer, moment_name: str | None, shortest: float) -> None:
        """Count a coming update whose gradients are all zero, at the batch size of the last one.

        Args:
            optimizer: an optimizer of torch or of this package, with the values of the reference.
            moment_name: as in `counts_of`.
            shortest: as in `largebatch.scaling.second_moment_coefficient`.
        """
        if moment_name != "exp_avg_sq":
            return
        for group in optimizer.param_groups:
            beta = coefficient_at(group, self.kappa, shortest)
            for p in group["params"]:
                if p.grad is not None:
                    stretch(optimizer.state[p], self.counts.setdefault(p, Count()).advance(beta))


def stretch(state: dict[str, Any], ratio: float) -> None:
    """Multiply the second moments in the state of one parameter of Adam or AdamW."""
    for name in ("exp_avg_sq", "max_exp_avg_sq"):
        if ratio != 1.0 and name in state:
            state[name].mul_(ratio)


def _plain_count(state: dict[str, Any], group: dict[str, Any]) -> Count:
    """Return the count of a parameter that was trained at the reference."""
    updates = float(state["step"]) if "step" in state else 0.0
    return Count(updates, updates * math.log(float(group["betas"][1])))


def follow_state(optimizer: torch.optim.Optimizer, moment_name: str, counts: dict[Tensor, Count]) -> None:
    """Replace the counts of parameters whose state was reset, loaded, or moved from another parameter since the last update.

    A new count is that of the parameter that had the state before, or else of a parameter with as many updates, or else that of
    a plain optimizer.

    Args:
        optimizer: an optimizer of torch, with the values of the reference; its parameters with a gradient have a state.
        moment_name: name of its second moment in the state.
        counts: counts by parameter, changed in place.
    """
    replaced: dict[Tensor, Count] = {}
    for group in optimizer.param_groups if moment_name == "exp_avg_sq" else ():
        for p in group["params"]:
            moment = optimizer.state[p].get(moment_name) if p in optimizer.state else None
            if moment is None:
                continue
            count = counts.get(p)
            if count is not None:
                count.moment = count.moment or weakref.ref(moment)
                if count.moment() is moment:
                    continue
            plain = _plain_count(optimizer.state[p], group)
            if not replaced:
                by_moment = {id(count.moment()): count for count in counts.values() if count.moment is not None}
                by_updates = {count.updates: count for count in counts.values()}
            alike = by_moment.get(id(moment), by_updates.get(plain.updates))
            if alike is None or alike.updates != plain.updates:
                alike = plain
            replaced[p] = replace(alike, moment=weakref.ref(moment))
    counts.update(replaced)


def counts_of(optimizer: torch.optim.Optimizer, moment_name: str | None) -> dict[Tensor, Count]:
    """Return the counts of an optimizer that has trained at its reference, for torch's Adam and AdamW (bias correction).

    Args:
        optimizer: an optimizer of torch or of this package.
        moment_name: name of its second moment in the state; None if there is none to shift.
    """
    counts = {}
    if moment_name == "exp_avg_sq":
        for group in optimizer.param_groups:
            for p in group["params"]:
                counts[p] = _plain_count(optimizer.state.get(p, {}), group)
    return counts

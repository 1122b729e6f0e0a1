"""Where a run of `largebatch.optim.invariant` stands."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from largebatch.optim.shift import Count, coefficient_at

# What a state dict holds of it, beside the counts.
SAVED = (
    *("batch_size", "kappa", "samples_seen", "updates", "previous_batch_size"),
    *("loss_scale", "knows_scale", "is_told"),
)


@dataclass
class Progress:
    """Where a run stands; one object, so that a host's copy of the optimizer (Lightning's) sees the same.

    Args:
        batch_size: B of the last update.
        kappa: its ratio to the reference.
        samples_seen: samples of all updates.
        updates: their number.
        previous_batch_size: B of the gradient that is kept, where updates have one unit alone.
        loss_scale: by which losses are multiplied, as far as the gradients tell.
        knows_scale: whether the gradients of any update have told it.
        is_told: whether those of the last one have, which were not clipped.
        announced: B of the coming update, where it was announced.
        renewed: whether it was announced again since the last backward pass.
        warned: whether the batch size was found above the critical one.
        warned_of_units: whether the backward passes of an update were found too few.
        counts: of second moments whose bias is corrected.
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
        """Return the part of a factor that clipping is, and note the loss scale that the other part was divided by.

        A loss scale is a power of two, and clipping is not; while gradients are clipped the last scale is taken to hold, or 1
        before the first. When it is told and another, what was kept since has to be multiplied by the second number.
        """
        mantissa, _ = math.frexp(factor)
        if abs(mantissa - 0.5) < 1e-6 or abs(mantissa - 1.0) < 1e-6:
            kept = 1.0 if self.is_told else self.loss_scale * factor
            self.loss_scale, self.is_told = 1.0 / factor, True
            return 1.0, kept
        self.is_told = False
        clip = factor * self.loss_scale
        if clip > 1.0 and factor > 0:  # the scale has fallen
            self.loss_scale *= 2.0 ** -math.ceil(math.log2(clip))
            clip = factor * self.loss_scale
        return clip, 1.0

    def announce(self, batch_size: int, is_pending: bool) -> None:
        """Take B of the coming update.

        Args:
            batch_size: B.
            is_pending: whether there was a backward pass since the last update.
        """
        self.renewed = is_pending and self.announced is not None
        self.announced = batch_size

    def restart(self, is_pending: bool) -> None:
        """Forget what was announced of an update that a loss scaler has skipped: its gradients are cleared."""
        if is_pending and not self.renewed:
            self.announced = None
        self.renewed = False

    def state_dict(self, parameters: list[Tensor]) -> dict[str, Any]:
        """Return what a state dict holds, for parameters in this order."""
        counts = [self.counts.get(p, Count()) for p in parameters]
        numbers = {name: getattr(self, name) for name in SAVED}
        return {**numbers, "counts": [[count.updates, count.log_decay, count.stretch] for count in counts]}

    def load_state_dict(self, state: dict[str, Any], parameters: list[Tensor], moment_name: str | None) -> None:
        """Take up what `state_dict` returned, of an earlier version too."""
        for name in SAVED:
            setattr(self, name, state.get(name, getattr(self, name)))
        if moment_name == "exp_avg_sq":
            self.counts = {p: Count(*count) for p, count in zip(parameters, state["counts"], strict=True)}

    def advance(self, optimizer: torch.optim.Optimizer, moment_name: str | None, shortest: float) -> None:
        """Count a coming update whose gradients are all zero, at the batch size of the last one.

        Args:
            optimizer: of torch, or of this package, with the values of the reference.
            moment_name: as in `counts_of`.
            shortest: as `largebatch.scaling.second_moment_coefficient`.
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
    """Make the counts of parameters anew whose state was replaced since the last update: reset, loaded, or moved to another.

    A new count is that of the parameter whose state it was, of one that was updated as often, or of a plain optimizer's.

    Args:
        optimizer: of torch, with the values of the reference; its parameters with a gradient have a state.
        moment_name: of its second moment in the state.
        counts: by parameter, changed in place.
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
    """Return the counts of an optimizer that has trained at its reference; of Adam and AdamW, whose moments have a bias.

    Args:
        optimizer: of torch, or of this package.
        moment_name: of its second moment in the state; None where it has none to be moved.
    """
    counts = {}
    if moment_name == "exp_avg_sq":
        for group in optimizer.param_groups:
            for p in group["params"]:
                counts[p] = _plain_count(optimizer.state.get(p, {}), group)
    return counts

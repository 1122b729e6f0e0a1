"""Where a run of `largebatch.optim.invariant` stands."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from largebatch.optim.shift import Count, coefficient_at


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
        announced: B of the coming update, where it was announced.
        warned: whether the batch size was found above the critical one.
        counts: of second moments whose bias is corrected.
    """

    batch_size: int
    kappa: float = 1.0
    samples_seen: int = 0
    updates: int = 0
    previous_batch_size: float = 0.0
    loss_scale: float = 1.0
    announced: int | None = None
    warned: bool = False
    counts: dict[Tensor, Count] = field(default_factory=dict)

    def clip_of(self, factor: float) -> float:
        """Return the part of a factor that clipping is, and note the loss scale that the other part was divided by.

        A loss scale is a power of two, and clipping is not; while gradients are clipped the last scale is taken to hold.
        """
        mantissa, _ = math.frexp(factor)
        if abs(mantissa - 0.5) < 1e-6 or abs(mantissa - 1.0) < 1e-6:
            self.loss_scale = 1.0 / factor
            return 1.0
        clip = factor * self.loss_scale
        if clip > 1.0 and factor > 0:  # the scale has fallen
            self.loss_scale *= 2.0 ** -math.ceil(math.log2(clip))
            clip = factor * self.loss_scale
        return clip

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
                    ratio = self.counts.setdefault(p, Count()).advance(beta)
                    for name in ("exp_avg_sq", "max_exp_avg_sq"):
                        if ratio != 1.0 and name in optimizer.state[p]:
                            optimizer.state[p][name].mul_(ratio)


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
                state = optimizer.state.get(p, {})
                updates = float(state["step"]) if "step" in state else 0.0
                counts[p] = Count(updates, updates * math.log(float(group["betas"][1])))
    return counts

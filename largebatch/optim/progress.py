"""Where a run of `largebatch.optim.invariant` stands."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from largebatch.optim.shift import Count


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

"""Schedules in samples behind torch's scheduler interface, for a training loop of your own."""

from __future__ import annotations

from typing import Any

import torch

from largebatch.errors import UserError
from largebatch.optim.invariant import BatchSizeInvariant
from largebatch.scaling.schedules import Realization, Schedule, Warmup, batch_size_at


class SampleScheduler(torch.optim.lr_scheduler.LRScheduler):
    """Writes the reference's learning rate as a function of the samples that the optimizer has seen.

        lr = lr_ref * schedule(samples_seen) * warmup(samples_seen)

    is written into the groups, and `BatchSizeInvariant.step` multiplies it by B / B_ref. So a schedule means the same at any
    batch size, and while the batch grows. Calling `step` more than once between updates has no effect.

    Args:
        optimizer: the optimizer that `batch_size_invariant` returned.
        schedule: a schedule of `largebatch.scaling.schedules`, in samples.
        warmup: warm-up of the learning rate, in samples. Its ``start`` is a factor of the scaled rate: at B_ref/B the run
            starts from the reference's rate. With ``realize="batch"`` it applies to the batch size (`batch_size`).

    Example:
        >>> import largebatch
        >>> from largebatch.scaling.schedules import Cosine
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = largebatch.batch_size_invariant(
        ...     torch.optim.SGD([weight], lr=0.1), reference_batch_size=1, micro_batch_size=2
        ... )
        >>> scheduler = SampleScheduler(optimizer, Cosine(total_samples=4))
        >>> weight.sum().backward()
        >>> optimizer.step(); scheduler.step()
        >>> round(optimizer.param_groups[0]["lr"], 6), round(weight.item(), 6)
        (0.05, 0.8)
    """

    def __init__(self, optimizer: BatchSizeInvariant, schedule: Schedule, warmup: Warmup | None = None) -> None:
        seen = getattr(optimizer, "samples_seen", None)
        if seen is None:
            raise UserError(
                "SampleScheduler: expected what batch_size_invariant returned, which counts samples, got "
                f"{type(optimizer).__name__}"
            )
        self.schedule, self.warmup = schedule, warmup or Warmup()
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        """Return the reference's learning rate of each group."""
        seen = self.optimizer.samples_seen  # type: ignore[attr-defined]
        factor = self.schedule(seen) * self.warmup.of_lr(seen)
        return [base * factor for base in self.base_lrs]

    def batch_size(
        self, batch_size: int, realize: Realization = "lr", max_batch_size: int | None = None, multiple_of: int = 1
    ) -> int:
        """Return the batch size of the coming update by `schedules.batch_size_at`; the learning rate follows from it."""
        seen = self.optimizer.samples_seen  # type: ignore[attr-defined]
        return batch_size_at(seen, batch_size, self.schedule, self.warmup, realize, max_batch_size, multiple_of)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of torch's scheduler, without schedule and warm-up, which a new scheduler is given again."""
        return {name: value for name, value in super().state_dict().items() if name not in ("schedule", "warmup")}

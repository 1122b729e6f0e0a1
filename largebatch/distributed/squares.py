"""Squares of micro-batches on an engine that keeps whole parameters on every rank: one process, or DDP.

Hooks on the parameters accumulate squares during the backward pass (`largebatch.moments.micro_batches`). After the last pass
of an update they are summed over the ranks in one flat all-reduce; DDP's own buckets hold only gradients. Bytes that a rank
sends and receives for P parameters, relative to the 4*P of a plain update:

    float32     2               squares and gradients in float32
    bfloat16    1.5             squares in bfloat16, gradients in float32
    every k     1 + 1/k         the variance is measured in every k-th update, in float32; 1 + 1/(2k) in bfloat16

The second moment of the reference batch, s_ref = ghat^2 + (1/B_ref - 1/B) * sigma^2, takes ghat^2 from each update. Only
sigma^2, the variance of a sample's gradient, may come from an earlier update: with `every` above 1 it is kept, element by
element, until it is measured again. An element that had no gradient when sigma^2 was measured (a row of an embedding that did
not occur) takes B * ghat^2 for sigma^2: the estimate from two units of which only one has a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from largebatch.errors import UserError
from largebatch.moments import is_shadow
from largebatch.moments.micro_batches import MicroBatchSquares, Units
from largebatch.noise.estimator import sums_with
from largebatch.optim.averages import Moment
from largebatch.optim.damping import Damping
from largebatch.optim.limit import LimitMeter, LimitWatch
from largebatch.optim.response import KNOWN

VARIANCE = "engine.sample_variance."  # prefix of each parameter's variance in a checkpoint


class HookedSquares:
    """The squares of a model's parameters, from the backward pass to the optimizer.

    Args:
        model: the model, on its device and before it is wrapped.
        every: number of updates between two measurements of the variance, >= 1.
        travels_in: data type in which squares are reduced; None for their own type.

    Attributes:
        factor: factor by which the gradients were multiplied after the backward passes; the squares are not multiplied.
        passes: number of micro-batches on this rank since the update began.
    """

    def __init__(self, model: nn.Module, every: int = 1, travels_in: torch.dtype | None = None) -> None:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad and not is_shadow(p)}
        self.names, self.parameters = list(named), list(named.values())
        self.hooks = MicroBatchSquares(named.items(), projects=False, travels_in=travels_in)
        self.every, self.factor, self.passes = every, 1.0, 0
        self._batch_size, self._num_units, self._world_size = 0, 0.0, 1
        self._has_variance, self._mean = False, 1.0
        self._update = 0
        self._watch: LimitWatch | None = None
        self._damping: Damping | None = None
        self._reference_size, self._surrounds = 1, False

    def begin(self, batch_size: int, num_units: float, update: int) -> None:
        """Announce the next update.

        Args:
            batch_size: B.
            num_units: n, the number of micro-batches in the update, or 1/sum(w^2) of their shares w of the samples.
            update: index of the update in the run, from 0.
        """
        self._batch_size, self._num_units, self.factor, self.passes = batch_size, num_units, 1.0, 0
        self._update = update
        # A single unit has no variance.
        is_turn = update % self.every == 0 or not self._has_variance
        self.hooks.due = num_units > 1 and is_turn

    def shrink(self, batch_size: int, num_units: float) -> None:
        """Announce, before the last backward pass, that the update has fewer samples than `begin` announced."""
        self._batch_size, self._num_units = batch_size, num_units

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Return a context manager in which backward passes do not count as micro-batches."""
        due, self.hooks.due = self.hooks.due, False
        yield
        self.hooks.due = due

    @torch.no_grad()
    def reduce(self, world_size: int, factor: float = 1.0) -> None:
        """Sum the squares over the ranks; call it after the last backward pass of the update.

        Args:
            world_size: W.
            factor: factor from accumulated gradients to their mean over the samples.

        Raises:
            UserError: on every rank, if the number of backward passes that reached the parameters is not that of micro-batches.
        """
        self._world_size, self._mean = world_size, factor
        if not self.hooks.due:
            return
        # Nothing is measured for a parameter that no rank used; its earlier variance is kept.
        unused = (
            [slot for slot in self.hooks.slots.values() if slot.parameter.grad is None] if self._has_variance else []
        )
        kept = [slot.region.clone() for slot in unused]
        units = self.hooks.collect()
        for slot, variance in zip(unused, kept, strict=True):
            slot.region.copy_(variance)
        if units is None:
            return
        expected = self.passes * world_size
        # bfloat16 rounds counts above 256.
        tolerance = expected * 2**-8 if self.hooks.travels_in == torch.bfloat16 else 0.0
        if abs(units.num_units - expected) > tolerance:
            raise UserError(
                f"squares of micro-batches: {units.num_units:g} backward passes reached the parameters in an update of "
                f"{expected} micro-batches: re-entrant activation checkpoints that share weights, and gradients taken within "
                "forward, cannot be told from further micro-batches; use checkpoint(..., use_reentrant=False), or plain second "
                "moments (optimizer.second_moment batch, noise.measure false)"
            )
        if self.every == 1:
            return
        self._has_variance = self._num_units > 1
        if not self._has_variance:  # only one unit had samples left
            return
        squares = [slot.region for slot in units.slots]
        grads = [slot.gradient() for slot in units.slots]
        n, scale = self._num_units, factor**2
        torch._foreach_mul_(squares, self._of_squares * scale)
        torch._foreach_addcmul_(squares, grads, grads, -scale)
        torch._foreach_mul_(squares, self._batch_size / (n - 1.0))
        torch._foreach_clamp_min_(squares, 0.0)

    @property
    def _is_known(self) -> bool:
        """Whether a variance, or squares to compute it from, are available; a single unit has neither."""
        return self._has_variance or (self.hooks.due and self._num_units > 1)

    @property
    def _of_squares(self) -> float:
        """Factor from a region's values to the mean square of a unit's gradient, n/W^2."""
        return self._num_units / self._world_size**2

    @property
    def _clipped(self) -> float:
        """Factor by which gradients were multiplied after they were means; a kept variance refers to the means."""
        return self.factor / self._mean

    def squares(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return the squared gradients of some parameters, summed over passes and ranks; all must have a gradient."""
        return [self.hooks.slots[p].region for p in parameters]

    def sums(self, factor: float = 1.0) -> Tensor:
        """Return |ghat|^2 of each parameter, and the sum of its squares averaged over W ranks, (2, P) in float64.

        Args:
            factor: factor from accumulated gradients to their mean over the samples.
        """
        parameters = self.parameters
        if not self._is_known:
            return (
                sums_with((p, p.grad) for p in parameters) * factor**2
            )  # a single unit, whose squares contain no further information
        sums = sums_with(zip(parameters, self.squares(parameters), strict=True))
        sums[0] *= factor**2
        if self.every == 1:
            sums[1] *= factor**2 / self._world_size
        else:  # n/W * squares = ghat^2 + (n-1) * sigma^2/B
            mean = sums[0] + (self._num_units - 1.0) / self._batch_size * sums[1]
            sums[1] = mean * self._world_size / self._num_units
        return sums

    def moment(self, group: Mapping[str, Any], parameters: Sequence[Tensor]) -> Moment:
        """Return the estimate of this update's second moment, for `AdaptiveOptimizer.moment_source`."""
        kappa = self._batch_size / group["reference_batch_size"]
        if not self._is_known:
            return Moment(kappa=kappa)
        if self.every == 1:
            share = (kappa - 1.0) / (self._num_units - 1.0)
            squares, scale = self.squares(parameters), self._of_squares * self.factor**2
            equal = float(self._num_units).is_integer() and self.hooks.travels_in != torch.bfloat16
            return Moment(squares, share, scale, kappa, equal=equal)
        variances = self.squares(parameters)
        if not self.hooks.due:
            variances = [self._completed(p, variance) for p, variance in zip(parameters, variances, strict=True)]
        share = (kappa - 1.0) / self._batch_size * self._clipped**2
        return Moment(variances, share, kappa=kappa, of_variance=True)

    def watch_limit(self, optimizer: torch.optim.Optimizer) -> LimitMeter | None:
        """Measure how close an optimizer's steps are to the largest stable ones, from the next step on.

        Returns:
            The meter; None if the variance is kept over several updates, or if the optimizer is not supported.
        """
        if self.every > 1 or type(optimizer) not in KNOWN:
            return None
        self._watch = LimitWatch(optimizer, self.names)
        self._surround(optimizer)
        return self._watch.meter

    def damp_steps(self, optimizer: torch.optim.Optimizer, reference_size: int) -> None:
        """Damp an optimizer's steps by the rule of `largebatch.optim.damping`, from the next step on.

        Args:
            optimizer: an optimizer whose groups have the hyper-parameters of the update when it steps.
            reference_size: B_ref.
        """
        self._damping, self._reference_size = Damping(optimizer, of_reference=False), reference_size
        self._surround(optimizer)

    def _surround(self, optimizer: torch.optim.Optimizer) -> None:
        """Register hooks before and after an optimizer's step, once."""
        if not self._surrounds:
            optimizer.register_step_pre_hook(self._before_step)
            optimizer.register_step_post_hook(self._after_step)
        self._surrounds = True

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        slots = [self.hooks.slots[p] for p in self.parameters if p.grad is not None]
        n = self._num_units if self._is_known else 1.0
        units = Units(n, 0.0, float(n).is_integer(), self._world_size, self.factor, 0.0, slots, self._clipped)
        if self._watch is not None:
            self._watch.before(
                lambda: zip(self.names, self.parameters, strict=True), units, self._batch_size, self._update
            )
        if self._damping is not None:
            first = optimizer.param_groups[0]  # a checkpoint stores its entries
            spread = 1.0 / (1.0 + self._batch_size / first.get("previous_batch_size", self._batch_size))
            self._damping.begin(units, spread, self._batch_size / self._reference_size)
            first["previous_batch_size"] = self._batch_size

    def _after_step(self, *_: Any) -> None:
        factors = {} if self._damping is None else self._damping.end(lambda _: 0.0)
        if self._watch is not None:
            self._watch.after(lambda _: 0.0, factors)

    def _completed(self, parameter: Tensor, variance: Tensor) -> Tensor:
        assert parameter.grad is not None
        gradient = parameter.grad / self._clipped if self._clipped not in (0.0, 1.0) else parameter.grad
        return torch.where(variance == 0, self._batch_size * gradient.square(), variance)

    def state(self) -> dict[str, Tensor]:
        """Return the variance that the next updates need, for a checkpoint."""
        if not self._has_variance:
            return {}
        found = zip(self.names, self.squares(self.parameters), strict=True)
        return {VARIANCE + name: variance for name, variance in found}

    def load_state(self, saved: Mapping[str, Tensor]) -> None:
        """Load the variance that `state` returned; without it, the variance is measured in the next update."""
        self.hooks.restart()
        self._has_variance = self.every > 1 and bool(saved)
        if self._has_variance:
            self.hooks.allocate()
            for name, region in zip(self.names, self.squares(self.parameters), strict=True):
                region.copy_(saved[VARIANCE + name])

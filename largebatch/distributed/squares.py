"""Squares of micro-batches on an engine that keeps whole parameters on every rank: one process, or DDP.

Hooks on the parameters add up squares beside the backward pass (`largebatch.moments.micro_batches`); after the last pass of
an update they are summed over the ranks in one flat all-reduce, and DDP's own buckets carry gradients alone. Bytes a rank
sends and receives for P parameters, in units of a plain update's 4*P:

    float32     2          squares beside gradients
    bfloat16    1.5        squares in half precision, gradients in float32
    every k     1 + 1/k    the variance is measured in every k-th update, in either precision

The second moment of the reference batch, s_ref = ghat^2 + (1/B_ref - 1/B) * sigma^2, takes ghat^2 from each update. Only
sigma^2, the variance of a sample's gradient, may be of an update before: with `every` above 1 it is kept, element by element,
until it is measured again. An element that had no gradient when it was measured (a row of an embedding that did not occur)
takes ghat^2 for its variance: what one of two units alone would have said.
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

VARIANCE = "engine.sample_variance."  # by parameter, in a checkpoint


class HookedSquares:
    """The squares of a model's parameters, from the backward pass to the optimizer.

    Args:
        model: on its device, before it is wrapped.
        every: updates between two measurements of the variance, >= 1.
        travels_in: type in which squares are reduced; None for their own.

    Attributes:
        factor: by which the gradients were multiplied after the backward passes; the squares are not touched for it.
        passes: micro-batches of this rank since the update began.
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
        """Say what the coming update is.

        Args:
            batch_size: B.
            num_units: n, the micro-batches that take part in it, or 1/sum(w^2) of their shares w.
            update: its number in the run, from 0.
        """
        self._batch_size, self._num_units, self.factor, self.passes = batch_size, num_units, 1.0, 0
        self._update = update
        # One unit alone has no variance.
        is_turn = update % self.every == 0 or not self._has_variance
        self.hooks.due = num_units > 1 and is_turn

    def shrink(self, batch_size: int, num_units: float) -> None:
        """Say, before the last backward pass, that fewer samples make up the update than `begin` said."""
        self._batch_size, self._num_units = batch_size, num_units

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Return a context whose backward passes are of no micro-batch."""
        due, self.hooks.due = self.hooks.due, False
        yield
        self.hooks.due = due

    @torch.no_grad()
    def reduce(self, world_size: int, factor: float = 1.0) -> None:
        """Sum the squares over the ranks; after the last backward pass of the update.

        Args:
            world_size: W.
            factor: what makes the mean over the samples of what the passes left.

        Raises:
            UserError: if more backward passes reached the parameters than micro-batches were run, on every rank alike.
        """
        self._world_size, self._mean = world_size, factor
        if not self.hooks.due:
            return
        # Of a parameter that no rank used nothing is measured; its variance waits on.
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
        # In bfloat16 a count of hundreds is rounded.
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
        if not self._has_variance:  # of all units but one no sample was left
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
        """Whether there is a variance, or squares to take it from; one unit alone has none."""
        return self._has_variance or (self.hooks.due and self._num_units > 1)

    @property
    def _of_squares(self) -> float:
        """From a region to the mean square of a unit's gradient, n/W^2."""
        return self._num_units / self._world_size**2

    @property
    def _clipped(self) -> float:
        """By what gradients were multiplied since they were means; a variance that is kept is that of means already."""
        return self.factor / self._mean

    def squares(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return, summed over passes and ranks, the squared gradients of some parameters; all of which have a gradient."""
        return [self.hooks.slots[p].region for p in parameters]

    def sums(self, factor: float = 1.0) -> Tensor:
        """Return of each parameter |ghat|^2 and the sum of squares over its shadow's average on W ranks, (2, P) in float64.

        Args:
            factor: what makes the mean over the samples of what the passes left.
        """
        parameters = self.parameters
        if not self._is_known:
            return (
                sums_with((p, p.grad) for p in parameters) * factor**2
            )  # of one unit alone, whose squares say nothing
        sums = sums_with(zip(parameters, self.squares(parameters), strict=True))
        sums[0] *= factor**2
        if self.every == 1:
            sums[1] *= factor**2 / self._world_size
        else:  # n/W * squares = ghat^2 + (n-1) * sigma^2/B
            mean = sums[0] + (self._num_units - 1.0) / self._batch_size * sums[1]
            sums[1] = mean * self._world_size / self._num_units
        return sums

    def moment(self, group: Mapping[str, Any], parameters: Sequence[Tensor]) -> Moment:
        """Return how the second moment of this update is estimated, for `AdaptiveOptimizer.moment_source`."""
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
        """Measure how near an optimizer's steps are to the largest stable ones, in steps from now on.

        Returns:
            What is measured; None where the variance is kept over updates, or of an optimizer that cannot be measured.
        """
        if self.every > 1 or type(optimizer) not in KNOWN:
            return None
        self._watch = LimitWatch(optimizer, self.names)
        self._surround(optimizer)
        return self._watch.meter

    def damp_steps(self, optimizer: torch.optim.Optimizer, reference_size: int) -> None:
        """Damp an optimizer's steps from now on, as `largebatch.optim.damping` has it.

        Args:
            optimizer: whose groups have the values of the update when it steps.
            reference_size: B_ref.
        """
        self._damping, self._reference_size = Damping(optimizer, of_reference=False), reference_size
        self._surround(optimizer)

    def _surround(self, optimizer: torch.optim.Optimizer) -> None:
        """Stand before and after an optimizer's step, once."""
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
            first = optimizer.param_groups[0]  # which a checkpoint keeps
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
        """Return what the next updates need of the last ones, for a checkpoint."""
        if not self._has_variance:
            return {}
        found = zip(self.names, self.squares(self.parameters), strict=True)
        return {VARIANCE + name: variance for name, variance in found}

    def load_state(self, saved: Mapping[str, Tensor]) -> None:
        """Take up what `state` returned; without it, the variance is measured in the next update."""
        self.hooks.restart()
        self._has_variance = self.every > 1 and bool(saved)
        if self._has_variance:
            self.hooks.allocate()
            for name, region in zip(self.names, self.squares(self.parameters), strict=True):
                region.copy_(saved[VARIANCE + name])

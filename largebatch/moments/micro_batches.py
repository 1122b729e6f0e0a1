"""Squared gradients of micro-batches, by hooks on the parameters; the model itself is not changed.

A *unit* is one backward pass of one rank, or several that were joined. A hook on a leaf runs once in each pass, with the pass's
whole gradient c_u, before it is accumulated and before DistributedDataParallel reduces it. The gradient that the optimizer
receives is ghat = (1/W) * sum_u c_u over all passes and W ranks, a mean over n units, and

    q = n/W^2 * sum_u c_u^2                       the mean square of a unit's gradient
    V = (q - ghat^2) / (n - 1)                    an unbiased estimate of the variance of ghat, sigma^2 / B

Each hook also adds up two projections of c_u, which tell the update how the gradients were changed since (`projection`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from largebatch.errors import UserError
from largebatch.moments.private import backward_pass, inside_custom_backward
from largebatch.moments.projection import FOREIGN, NO_PASS, Projector, Slot
from largebatch.moments.uses import statistic_dtype
from largebatch.reduce import num_ranks, require_equal, sum_over_ranks


@dataclass
class Units:
    """The units of one update, over all ranks.

    Args:
        num_units: n; 1/sum(w^2) where the units' sizes, and so their weights w in the mean, differ.
        size: the update's samples in micro-batches of the announced size (2.5 if the third one was half full).
        equal: whether all units have the same size.
        world_size: W.
        factor: factor by which gradients were multiplied between the backward passes and the update.
        rounding: relative rounding error of the gradients.
        slots: slots of the parameters that have a gradient, in order.
        clip: the part of ``factor`` that is clipping, without a loss scale and without the scaling of summed losses.
    """

    num_units: float
    size: float
    equal: bool
    world_size: int
    factor: float
    rounding: float
    slots: list[Slot] = field(default_factory=list)
    clip: float = 1.0

    @property
    def scale(self) -> float:
        """The factor from a sum of squares to q, the mean square of a unit's gradient."""
        return self.num_units / self.world_size**2 * self.factor**2


class MicroBatchSquares:
    """Hooks on parameters, and the buffers that they fill.

    Args:
        named: (name, parameter) of leaf tensors; the names are for messages.
        process_group: process group of the data-parallel ranks; None for all ranks.
        projects: whether to determine at the update how the gradients were changed since; False if the caller knows it.
        travels_in: data type in which the squares are reduced; None for their own.

    Attributes:
        due: whether the hooks do anything; False leaves the regions as they are.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, Tensor]],
        process_group: dist.ProcessGroup | None = None,
        projects: bool = True,
        travels_in: torch.dtype | None = None,
    ) -> None:
        self.process_group, self.projects, self.travels_in = process_group, projects, travels_in
        self.due = True
        self.slots: dict[Tensor, Slot] = {}
        self.settings: dict[str, int] = {}
        """Values that have to be the same on every rank."""
        self._handles: dict[Tensor, Any] = {}
        # Deleting this object removes its hooks, and frees the tensors that they hold.
        weakref.finalize(self, _remove, self._handles)
        self._buffers: list[tuple[Tensor, Tensor, list[Slot]]] = []
        """(flat buffer: regions, two projections per slot, three counts; its projections, (slots, 2); its slots)."""
        self._project = Projector()
        self._update, self._over, self._checked = 0, True, False
        self._task, self._sizes, self._nested = -1, list[float](), False
        self._is_closed = False
        self._joint: set[Slot] | None = None
        self._joint_size, self._joint_begun = 1.0, False
        self._world_size = 1
        self.add(named)

    def add(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Add parameters. Frozen ones get a hook too, because they may be unfrozen later."""
        for name, parameter in named:
            if parameter in self.slots:
                continue
            self._checked = False
            kind = "complex" if parameter.is_complex() else "" if parameter.is_leaf else "no leaf"
            if hasattr(parameter, "to_local") or type(parameter).__name__ == "FlatParameter":
                kind = "a DTensor" if hasattr(parameter, "to_local") else "a FlatParameter of FSDP1"
            if kind:
                raise UserError(
                    f"squares of micro-batches: parameter {name} is {kind}; expected real leaf tensors that every "
                    "data-parallel rank holds whole. For FSDP2, tensor parallelism and DeepSpeed ZeRO use the trainer's "
                    "engines (docs/engines.md)"
                )
            slot = self.slots[parameter] = Slot(parameter, name)
            frozen = not parameter.requires_grad
            if frozen:  # a hook can be registered only while it is not
                parameter.requires_grad_(True)
            self._handles[parameter] = parameter.register_hook(self._hook(slot))
            if frozen:
                parameter.requires_grad_(False)

    def keep(self, parameters: Container[Tensor]) -> None:
        """Drop all parameters but these, and the buffers that then serve none."""
        gone = [p for p in self.slots if p not in parameters]
        for parameter in gone:
            self._handles.pop(parameter).remove()
            self.slots.pop(parameter).parameter = torch.empty(0)  # its place in a buffer may stay
        if gone:
            self._checked = False
            left = set(self.slots.values())
            self._buffers = [buffer for buffer in self._buffers if not left.isdisjoint(buffer[2])]

    @property
    def is_pending(self) -> bool:
        """Whether there was a backward pass since the last update."""
        return not self._over

    def close(self) -> None:
        """Remove the hooks."""
        _remove(self._handles)
        self._is_closed = True

    def require_idle(self) -> None:
        """Raise an error if this object was closed, or within a micro-batch."""
        if self._is_closed:
            raise UserError("to_torch: this optimizer has ended; go on with the one that to_torch() returned")
        if self._joint is not None:
            raise UserError("step: within a micro-batch; leave `with optimizer.micro_batch(size):` before the update")

    def restart(self) -> None:
        """Discard the passes since the last update, whose gradients were cleared or used."""
        self._over = True

    def _hook(self, slot: Slot) -> Callable[[Tensor], None]:
        ours = weakref.ref(self)

        def hook(gradient: Tensor | None) -> None:
            squares = ours()
            if gradient is not None and squares is not None and squares.due:  # None from a function without a gradient
                squares._observe(slot, gradient.detach() if gradient.requires_grad else gradient)

        hook.__torch_unserializable__ = True  # type: ignore[attr-defined]  # a restored optimizer registers its own
        return hook

    def take_previous(self, gradients: dict[Tensor, Tensor]) -> None:
        """Restore the gradients of the last update, if it had a single unit."""
        self.restart()
        for slot in self.slots.values():
            slot.holds = ""
        if gradients:
            self.allocate()
        for parameter, gradient in gradients.items():
            slot = self.slots[parameter]
            slot.region.copy_(gradient)
            slot.holds = "previous"

    # In the backward pass

    def _observe(self, slot: Slot, gradient: Tensor) -> None:
        if gradient.layout is not torch.strided:
            raise UserError(
                f"squares of micro-batches: parameter {slot.name} has a sparse gradient; expected dense ones: build the "
                "embedding with sparse=False"
            )
        task = backward_pass()
        if task != self._task:
            self._begin_pass(task)
        if not slot.is_placed:
            self.allocate()
        if slot.update != self._update or slot.parameter.grad is None:  # first since gradients were cleared
            slot.update, slot.count, slot.first = self._update, 0, len(self._sizes) - 1
            if slot.holds == "squares":
                slot.holds = ""
            if self.projects:
                self._project(slot.sample(gradient), out=slot.projection)
            if self._joint is not None:  # cleared within a micro-batch, of which earlier passes are then no part
                self._joint.discard(slot)
        elif self.projects:
            slot.projection += self._project(slot.sample(gradient))
        further = self._joint is not None and slot in self._joint
        slot.count += not further
        # On a single rank p.grad holds the first unit's gradient, which is squared only if a second unit follows.
        if slot.count == 1 and self._world_size == 1:
            if self._joint is not None:
                self._joint.add(slot)
        elif self._joint is not None:
            self._add_part(slot, gradient, further)
        elif self._world_size > 1:
            self._square(slot, gradient)
        else:
            self._square_first(slot)
            self._square(slot, gradient)

    def _add_part(self, slot: Slot, gradient: Tensor, further: bool) -> None:
        """Add a pass's gradient to those of earlier passes over the same micro-batch."""
        assert self._joint is not None
        if slot.partial is None:
            slot.partial = torch.empty_like(slot.region)
        if further:
            slot.partial += gradient
        else:
            self._joint.add(slot)
            slot.partial.copy_(gradient)

    def _square_first(self, slot: Slot) -> None:
        if slot.holds != "squares":
            assert slot.parameter.grad is not None
            self._square(slot, slot.parameter.grad.detach())

    def _square(self, slot: Slot, gradient: Tensor) -> None:
        region = slot.region
        if gradient.dtype != region.dtype:
            gradient = gradient.to(region.dtype)
        if slot.holds == "squares":
            region.addcmul_(gradient, gradient)
        else:
            torch.mul(gradient, gradient, out=region)
            slot.holds = "squares"

    def _begin_pass(self, task: int) -> None:
        self._task = task
        if self._over:
            self._update, self._over = self._update + 1, False
            self._sizes, self._nested = [], False
            self._world_size = num_ranks(self.process_group)
            self._joint_begun = False
        if self._joint is not None:
            if not self._joint_begun:  # all passes are one unit, which the first of them begins
                self._sizes.append(self._joint_size)
                self._joint_begun = True
        elif inside_custom_backward():  # the outer pass that it is a part of is not known
            self._nested = True
            self._sizes = self._sizes or [1.0]
        else:
            self._sizes.append(1.0)

    @contextmanager
    def joined(self, size: float) -> Iterator[None]:
        """Return a context whose backward passes count as one unit.

        Args:
            size: size of the unit, as a multiple of the announced micro-batch size.
        """
        if self._joint is not None:
            raise UserError("micro_batch: already within a micro-batch; leave it before the next one begins")
        for slot in self.slots.values():  # these passes will add to p.grad, which is one unit's gradient so far
            if not self._over and slot.update == self._update and slot.count == 1 and slot.parameter.grad is not None:
                self._square_first(slot)
        self._joint, self._joint_size, self._joint_begun, self._task = set(), size, False, -1
        try:
            yield
            for slot in self._joint:
                if slot.count > 1 or self._world_size > 1:
                    assert slot.partial is not None
                    self._square(slot, slot.partial)
        except BaseException:
            self._over = self._over or self._joint_begun  # an incomplete unit cannot be taken out
            raise
        finally:
            self._joint, self._task = None, -1

    def allocate(self) -> None:
        """Assign every slot without memory its part of a new buffer, one buffer for each device and type."""
        kinds: dict[tuple[torch.device, torch.dtype], list[Slot]] = {}
        for slot in self.slots.values():
            if not slot.is_placed:
                kinds.setdefault((slot.parameter.device, statistic_dtype(slot.parameter.dtype)), []).append(slot)
        for (device, dtype), slots in kinds.items():
            length = sum(slot.parameter.numel() for slot in slots)
            buffer = torch.zeros(length + 2 * len(slots) + 3, dtype=dtype, device=device)
            offset = 0
            for index, slot in enumerate(slots):
                end = offset + slot.parameter.numel()
                slot.place(buffer[offset:end], buffer[length + 2 * index : length + 2 * index + 2])
                offset = end
            self._buffers.append((buffer, buffer[length:-3].view(-1, 2), slots))

    # At the update

    @torch.no_grad()
    def collect(self) -> Units | None:
        """Reduce the squares and counts of the passes since the last update over the ranks; return the update's units.

        Return None if no parameter has a gradient, or if there was no pass and all gradients are zero.

        Raises:
            UserError: if the gradients are not those of the backward passes times one common factor.
        """
        self.require_idle()
        self._world_size = num_ranks(self.process_group)
        live = [slot for slot in self.slots.values() if slot.parameter.grad is not None]
        fired = [slot for slot in live if slot.update == self._update and not self._over and slot.count]
        sizes = self._live_sizes(fired)
        if self._world_size > 1:
            self._check_ranks()
        elif not live:
            return None
        self.allocate()
        used = set(map(id, fired))
        for _, projections, slots in self._buffers:
            idle = [index for index, slot in enumerate(slots) if id(slot) not in used]
            if len(idle) == len(slots):
                projections.zero_()
            elif idle:
                projections[idle] = 0.0
            if self._world_size > 1:
                for index in idle:
                    slots[index].region.zero_()
                    slots[index].holds = "squares"
        totals = self._reduce(sizes)
        self._over = True
        if not live:
            return None
        num_units, size, squares_of_size = totals
        if num_units < 1:
            if not any(bool(slot.gradient().any()) for slot in live):
                return None  # zeros that initialise the optimizer's state, as torch.distributed.checkpoint writes them
            raise UserError(FOREIGN.format(live[0].name, NO_PASS))
        effective = size**2 / squares_of_size
        equal = abs(effective - num_units) < 1e-6 * num_units
        factor, rounding = 1.0, 0.0
        if self.projects:
            factor, rounding = self._project.factor(live, num_units, self._world_size)
        units = Units(num_units if equal else effective, size, equal, self._world_size, factor, rounding, live)
        if num_units > 1:
            for slot in live:  # not squared yet: on a single rank, a parameter that one unit used, or none
                if slot.holds != "squares":
                    if id(slot) not in used:
                        slot.region.zero_()
                    elif units.factor:
                        gradient = slot.gradient() / units.factor
                        torch.mul(gradient, gradient, out=slot.region)
                    slot.holds = "squares"
        return units

    def _live_sizes(self, fired: list[Slot]) -> list[float]:
        if not fired:
            return []
        sizes = self._sizes[min(slot.first for slot in fired) :]
        if self._nested:
            counts = {slot.count for slot in fired}
            if len(counts) > 1:
                raise UserError(
                    "squares of micro-batches: backward passes within backward passes (re-entrant activation checkpoints) in "
                    f"which parameters took part unequally often ({min(counts)} to {max(counts)} times); use checkpoint(..., "
                    "use_reentrant=False), or in a loop of your own `with optimizer.micro_batch(size):` around each micro-batch"
                )
            return [1.0] * counts.pop()
        return sizes

    def _check_ranks(self) -> None:
        if self._checked or not self.slots:
            return
        device = next(iter(self.slots)).device
        counts = {
            "parameters of the optimizer": len(self.slots),
            "their elements": sum(parameter.numel() for parameter in self.slots),
        }
        require_equal(counts | self.settings, device, self.process_group)
        self._checked = True

    def _reduce(self, sizes: list[float]) -> tuple[float, float, float]:
        """Sum the buffers over the ranks; return the number of units, the sum of their sizes and that of the squares."""
        counts = [float(len(sizes)), sum(sizes), sum(size**2 for size in sizes)]
        if self._world_size == 1:
            return counts[0], counts[1], counts[2]
        for buffer, _, _ in self._buffers:
            buffer[-3:] = torch.tensor(counts, dtype=buffer.dtype, device="cpu")
        sum_over_ranks([buffer for buffer, _, _ in self._buffers], self.process_group, self.travels_in)
        totals = self._buffers[0][0][-3:].tolist()
        return totals[0], totals[1], totals[2]


def _remove(handles: dict[Tensor, Any]) -> None:
    for handle in handles.values():
        handle.remove()
    handles.clear()

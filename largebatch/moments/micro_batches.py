"""Squared gradients of micro-batches, by hooks on the parameters: nothing of the model is touched.

A *unit* is one backward pass of one rank. A hook on a leaf runs once in each, with the pass's whole gradient c_u, before it
is accumulated and before DistributedDataParallel reduces it. The gradient that the optimizer sees is ghat = (1/W) * sum_u c_u
over all passes and W ranks, a mean over n units, and

    q = n/W^2 * sum_u c_u^2                       the mean square of a unit's gradient
    V = (q - ghat^2) / (n - 1)                    without bias the variance of ghat, sigma^2 / B

Each hook also adds up one projection of c_u. At the update the same projection of `p.grad` gives the factor by which the
gradients were multiplied since (clipping, a loss scale divided out), and tells gradients that were changed in another way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from largebatch.moments.tap import statistic_dtype
from largebatch.reduce import num_ranks, require_equal, sum_over_ranks
from largebatch.section import UserError

# Elements of a parameter that its projection reads, evenly spread.
PROJECTED = 4_096
# Change of a parameter's gradient, relative to its norm, that counts as rounding: of half-precision all-reduces, say.
TOLERANCE = 0.01


@dataclass(eq=False)
class Slot:
    """What is kept of one parameter.

    Args:
        parameter: a leaf.
        name: for messages.
        update: the update that it last took part in.
        count: units of that update on this rank that it took part in.
        first: number of the first of them.
        holds: what `region` holds: ``squares`` of this update, the ``previous`` update's gradient, or nothing.
        region: as large as the parameter and in its memory order.
        projection: 0-dimensional, the sum over units.
        partial: sum over the passes of one micro-batch, where it has several.
        order: the parameter's dimensions from the slowest in memory to the fastest.
        strides: of the parameter and of its gradients, as a rule.
        sampled: number and stride in memory of the elements that the projection reads.
        dense: whether the parameter lies in memory without gaps.
    """

    parameter: Tensor
    name: str
    update: int = -1
    count: int = 0
    first: int = 0
    holds: str = ""
    region: Tensor | None = None
    projection: Tensor | None = None
    partial: Tensor | None = None
    order: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    sampled: tuple[int, int] = (0, 1)
    dense: bool = True

    def gradient(self) -> Tensor:
        """Return the parameter's gradient, in the type of its region."""
        assert self.parameter.grad is not None and self.region is not None
        return self.parameter.grad.detach().to(self.region.dtype)

    def keep_gradient(self, factor: float) -> None:
        """Keep the gradient for the next update's estimate, as the backward pass left it."""
        torch.div(self.gradient(), factor or 1.0, out=self.region)
        self.holds = "previous"


@dataclass
class Units:
    """The units of one update, over all ranks.

    Args:
        num_units: n; 1/sum(w^2) where their sizes, and so their weights w in the mean, differ.
        size: samples of the update, in micro-batches of the announced size.
        equal: whether all units have one size.
        world_size: W.
        factor: by which gradients were multiplied between the backward passes and the update.
        slots: of the parameters that have a gradient, in order.
    """

    num_units: float
    size: float
    equal: bool
    world_size: int
    factor: float
    slots: list[Slot] = field(default_factory=list)

    @property
    def scale(self) -> float:
        """From a sum of squares to q, the mean square of a unit's gradient."""
        return self.num_units / self.world_size**2 * self.factor**2


def memory_order(parameter: Tensor) -> tuple[int, ...]:
    """Return the dimensions of a parameter from the slowest in memory to the fastest."""
    return tuple(sorted(range(parameter.ndim), key=lambda dim: (-parameter.stride(dim), dim)))


def flat(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """Return a tensor in one dimension, in a parameter's memory order; a view where it lies in that order itself."""
    return tensor.permute(order).reshape(-1)


class MicroBatchSquares:
    """Hooks on parameters, and the buffers that they fill.

    Args:
        named: (name, parameter) of leaves; names are for messages.
        process_group: the data-parallel ranks; None for all.
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]], process_group: dist.ProcessGroup | None = None) -> None:
        self.process_group = process_group
        self.slots: dict[Tensor, Slot] = {}
        self.settings: dict[str, int] = {}
        """What has to be the same on every rank."""
        self._handles: list[Any] = []
        self._buffers: list[tuple[Tensor, Tensor, list[Slot]]] = []
        """Flat: regions, then a projection a slot, then the counts; the part with the projections; the slots."""
        self._signs: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._update, self._over, self._checked = 0, True, False
        self._task, self._sizes, self._nested = -1, list[float](), False
        self._joint: set[Slot] | None = None
        self._joint_size: float | None = None
        self._world_size = 1
        self.add(named)

    def add(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Take in further parameters. Frozen ones get their hook too, for when they are unfrozen."""
        for name, parameter in named:
            if parameter in self.slots:
                continue
            if hasattr(parameter, "to_local") or not parameter.is_leaf or parameter.is_complex():
                kind = "complex" if parameter.is_complex() else "no leaf" if not parameter.is_leaf else "a DTensor"
                raise UserError(
                    f"batch_size_invariant: parameter {name} is {kind}; expected real leaf tensors that every data-parallel rank "
                    "holds whole. For FSDP2, tensor parallelism and DeepSpeed ZeRO use the trainer's engines (docs/engines.md)"
                )
            slot = self.slots[parameter] = Slot(parameter, name)
            frozen = not parameter.requires_grad
            if frozen:  # a hook can only be had while it is not
                parameter.requires_grad_(True)
            self._handles.append(parameter.register_hook(self._hook(slot)))
            if frozen:
                parameter.requires_grad_(False)
        self._checked = False

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def restart(self) -> None:
        """Forget the passes since the last update: their gradients were cleared, or used."""
        self._over = True

    def _hook(self, slot: Slot) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            self._observe(slot, gradient.detach() if gradient.requires_grad else gradient)

        hook.__torch_unserializable__ = True  # type: ignore[attr-defined]  # it is put on again where it belongs
        return hook

    def take_previous(self, gradients: dict[Tensor, Tensor]) -> None:
        """Take up the gradients of the last update, where it had one unit alone."""
        self.restart()
        for slot in self.slots.values():
            slot.holds = ""
        if gradients:
            self._allocate()
        for parameter, gradient in gradients.items():
            slot = self.slots[parameter]
            slot.region.copy_(gradient)  # type: ignore[union-attr]
            slot.holds = "previous"

    # In the backward pass

    def _observe(self, slot: Slot, gradient: Tensor) -> None:
        if gradient.layout is not torch.strided:
            raise UserError(
                f"batch_size_invariant: parameter {slot.name} has a sparse gradient; expected dense ones: build the embedding "
                "with sparse=False"
            )
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._begin_pass(task)
        if slot.region is None:
            self._allocate()
        if slot.update != self._update or slot.parameter.grad is None:  # the first since gradients were cleared
            slot.update, slot.count, slot.first = self._update, 0, len(self._sizes) - 1
            if slot.holds == "squares":
                slot.holds = ""
            self._project(self._sample(slot, gradient), out=slot.projection)
        else:
            slot.projection += self._project(self._sample(slot, gradient))
        further = self._joint is not None and slot in self._joint
        slot.count += not further
        # Alone, the first unit's gradient is p.grad, and the only one's square is not needed.
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
        """Add a pass's gradient to those of the same micro-batch."""
        assert self._joint is not None and slot.region is not None
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
        assert region is not None
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
        if self._joint is not None:
            if self._joint_size is not None:  # one unit, however many passes: the first of them begins it
                self._sizes.append(self._joint_size)
                self._joint_size = None
        elif _is_nested():  # of which pass it is a part cannot be told
            self._nested = True
            self._sizes = self._sizes or [1.0]
        else:
            self._sizes.append(1.0)

    @contextmanager
    def joined(self, size: float) -> Iterator[None]:
        """Take the backward passes within as one unit.

        Args:
            size: of the unit, as a multiple of the announced micro-batch size.
        """
        if self._joint is not None:
            raise UserError("micro_batch: already within a micro-batch; leave it before the next one begins")
        for slot in self.slots.values():  # what is p.grad so far will not be after these passes
            if not self._over and slot.update == self._update and slot.count == 1 and slot.parameter.grad is not None:
                self._square_first(slot)
        self._joint, self._joint_size, self._task = set(), size, -1
        try:
            yield
            for slot in self._joint:
                if slot.count > 1 or self._world_size > 1:
                    assert slot.partial is not None
                    self._square(slot, slot.partial)
        except BaseException:
            self._over = True
            raise
        finally:
            self._joint, self._task = None, -1

    def _allocate(self) -> None:
        """Give every slot that has none its part of a buffer, one buffer for each device and type."""
        kinds: dict[tuple[torch.device, torch.dtype], list[Slot]] = {}
        for slot in self.slots.values():
            if slot.region is None:
                kinds.setdefault((slot.parameter.device, statistic_dtype(slot.parameter.dtype)), []).append(slot)
        for (device, dtype), slots in kinds.items():
            length = sum(slot.parameter.numel() for slot in slots)
            buffer = torch.zeros(length + len(slots) + 3, dtype=dtype, device=device)
            offset = 0
            for index, slot in enumerate(slots):
                parameter = slot.parameter
                slot.order = memory_order(parameter)
                part = buffer[offset : offset + parameter.numel()]
                back = [slot.order.index(dim) for dim in range(parameter.ndim)]
                slot.region = part.view([parameter.shape[dim] for dim in slot.order]).permute(back)
                slot.projection = buffer[length + index]
                numel = parameter.numel()
                # Odd, so that no column of a matrix is read alone.
                stride = -(-numel // PROJECTED) | 1
                slot.dense = parameter.permute(slot.order).is_contiguous()
                slot.strides, slot.sampled = parameter.stride(), (-(-numel // stride), stride)
                offset += parameter.numel()
            self._buffers.append((buffer, buffer[length : length + len(slots)], slots))

    @staticmethod
    def _sample(slot: Slot, gradient: Tensor) -> Tensor:
        """Return at most `PROJECTED` elements of a gradient, always the same ones."""
        number, stride = slot.sampled
        if gradient.stride() == slot.strides and slot.dense:
            values = gradient.as_strided((number,), (stride,))
        else:
            values = flat(gradient, slot.order)[::stride]
        return values if values.dtype in (torch.float32, torch.float64) else values.float()

    def _project(self, values: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the product of a sample with fixed random numbers, ()."""
        signs = self._signs.get((values.device, values.dtype))
        if signs is None:
            generator = torch.Generator().manual_seed(0)
            signs = torch.randn(PROJECTED, generator=generator, dtype=torch.float64).to(values.device, values.dtype)
            self._signs[values.device, values.dtype] = signs
        return torch.dot(values, signs[: values.numel()], out=out)

    # At the update

    @torch.no_grad()
    def collect(self) -> Units | None:
        """Reduce what the passes since the last update left; None where no parameter has a gradient on any rank.

        Raises:
            UserError: if a gradient is not what the backward passes left, times one factor for all.
        """
        self._world_size = num_ranks(self.process_group)
        live = [slot for slot in self.slots.values() if slot.parameter.grad is not None]
        fired = [slot for slot in live if slot.update == self._update and not self._over and slot.count]
        sizes = self._live_sizes(fired)
        if self._world_size > 1:
            self._check_ranks()
        elif not live:
            return None
        self._allocate()
        used = set(map(id, fired))
        for _, projections, slots in self._buffers:
            idle = [index for index, slot in enumerate(slots) if id(slot) not in used]
            if len(idle) == len(slots):
                projections.zero_()
            elif idle:
                projections[idle] = 0.0
            if self._world_size > 1:
                for index in idle:
                    slots[index].region.zero_()  # type: ignore[union-attr]
                    slots[index].holds = "squares"
        totals = self._reduce(sizes)
        self._over = True
        if not live:
            return None
        num_units, size, squares_of_size = totals
        if num_units < 1:
            raise UserError(_FOREIGN.format(live[0].name, "no backward pass since the last update left it"))
        effective = size**2 / squares_of_size
        equal = abs(effective - num_units) < 1e-6 * num_units
        units = Units(num_units if equal else effective, size, equal, self._world_size, 1.0, live)
        units.factor = self._factor(live, num_units)
        if num_units > 1:
            for slot in live:  # alone, of a parameter that one unit used, or none
                if slot.holds != "squares":
                    assert slot.region is not None
                    if id(slot) not in used:
                        slot.region.zero_()
                    elif units.factor:
                        gradient = slot.parameter.grad.to(slot.region.dtype) / units.factor  # type: ignore[union-attr]
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
                    "batch_size_invariant: backward passes within backward passes (re-entrant activation checkpoints) in which "
                    f"parameters took part unequally often ({min(counts)} to {max(counts)} times); use "
                    "checkpoint(..., use_reentrant=False), or `with optimizer.micro_batch(size):` around each micro-batch"
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
        """Sum the buffers over the ranks; return units, their size and the sum of squared sizes."""
        counts = [float(len(sizes)), sum(sizes), sum(size**2 for size in sizes)]
        if self._world_size == 1:
            return counts[0], counts[1], counts[2]
        for buffer, _, _ in self._buffers:
            buffer[-3:] = torch.tensor(counts, dtype=buffer.dtype)
        sum_over_ranks([buffer for buffer, _, _ in self._buffers], self.process_group)
        totals = self._buffers[0][0][-3:].tolist()
        return totals[0], totals[1], totals[2]

    def _factor(self, live: list[Slot], num_units: float) -> float:
        """Return what the gradients were multiplied by since the backward passes.

        Raises:
            UserError: if it is not one factor for all.
        """
        samples = [self._sample(slot, slot.parameter.grad) for slot in live]  # type: ignore[arg-type]
        found_and_left = [self._project(sample) for sample in samples] + [slot.projection for slot in live]
        if len({value.device for value in found_and_left} | {value.dtype for value in found_and_left}) > 2:
            found_and_left = [value.double().cpu() for value in found_and_left]
        found, left = torch.stack(found_and_left).double().cpu().view(2, -1)  # type: ignore[arg-type]
        left = left / self._world_size
        if not bool((left.isfinite() & found.isfinite()).all()):
            return 1.0  # as torch: what is not finite is passed on
        total = float(left.dot(left))
        factor = float(left.dot(found)) / total if total > 0 else 1.0
        types = [torch.finfo(dtype) for dtype in {slot.parameter.dtype for slot in live}]
        rounding = max(of_type.eps for of_type in types)
        # A sum over n units may be much smaller than they are.
        tolerance = TOLERANCE + 4.0 * rounding * max(1.0, num_units) ** 0.5
        wrong = (found - factor * left).abs() > tolerance * abs(factor) * left.abs()
        if bool(wrong.any()):  # or orthogonal to the random numbers; and the smallest numbers have few digits
            norms = torch.stack([torch.linalg.vector_norm(sample).double().cpu() for sample in samples])
            lost = max(of_type.tiny * of_type.eps for of_type in types) * PROJECTED
            wrong = (found - factor * left).abs() > tolerance * torch.maximum(norms, abs(factor) * left.abs()) + lost
        if bool(wrong.any()):
            index = int(wrong.nonzero()[0])
            slot = live[index]
            if float(left[index]) == 0.0:
                raise UserError(_FOREIGN.format(slot.name, "no backward pass since the last update left it"))
            raise UserError(
                _FOREIGN.format(
                    slot.name,
                    f"it is {float(found[index] / left[index]):.4g} times what the backward passes left along one direction, "
                    f"that of all parameters {factor:.4g} times",
                )
            )
        return 1.0 if abs(factor - 1.0) < 64.0 * rounding else factor


_FOREIGN = (
    "batch_size_invariant: the gradient of parameter {} is not what the backward passes left, times one factor for all parameters "
    "as clipping by the global norm gives: {}. Clip by the norm over all parameters of the optimizer, zero all gradients together "
    "(optimizer.zero_grad(), or model.zero_grad() with set_to_none=True), build the optimizer before the first backward pass, and "
    "average gradients over the ranks of process_group"
)


def _is_nested() -> bool:
    """Return whether this backward pass runs within the backward of a custom function, as re-entrant checkpoints do."""
    code = torch.autograd.function.BackwardCFunction.apply.__code__
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False

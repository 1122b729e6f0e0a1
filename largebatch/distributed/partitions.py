"""DeepSpeed's layout of parameters: pieces of flat float32 partitions, one per group (ZeRO-3: per sub-group) and rank.

The offsets are those of DeepSpeed 0.19; only this file reads them.

    ZeRO 0      the parameter itself, whole on every rank
    ZeRO 1, 2   a group's parameters, concatenated and split into one equal partition per rank; a parameter may span several
    ZeRO 3      each parameter split into one equal part per rank (the last padded); a sub-group's parts are concatenated
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from largebatch.distributed.state import slot_tensor, slot_value
from largebatch.optim import is_shadow_group

PARAMETER = "parameter"


@dataclass(frozen=True)
class Piece:
    """A part of one parameter on this rank.

    Args:
        parameter: the model's parameter.
        partition: index of the partition that contains it.
        start: its first element in the partition.
        offset: its first element in the flattened parameter.
        numel: its length, >= 1.
        view: a view of the partition's memory; the optimizer updates it, and its state is keyed by it.
    """

    parameter: nn.Parameter
    partition: int
    start: int
    offset: int
    numel: int
    view: Tensor

    def cut(self, partition: Tensor) -> Tensor:
        """Return the piece's elements of a flat tensor with the same layout as the partition."""
        return partition[self.start : self.start + self.numel]


class Partitions:
    """The partitions of this rank, their gradients and their optimizer state.

    Args:
        engine: a DeepSpeed engine.
        optimizer: the client optimizer, whose state is keyed by piece.
        groups: its parameter groups from before DeepSpeed replaced their parameters.
    """

    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
        self.engine, self.optimizer = engine, optimizer
        self.stage = int(engine.zero_optimization_stage())
        self.zero: Any = engine.optimizer if self.stage > 0 else None
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.flat: list[Tensor] = []
        self.of_shadows: list[bool] = []
        self.pieces: list[Piece] = []
        self.shapes = {p: torch.Size(getattr(p, "ds_shape", p.shape)) for group in groups for p in group["params"]}
        {0: self._whole, 1: self._group_wise, 2: self._group_wise, 3: self._parameter_wise}[self.stage](groups)
        self.pieces_of: dict[nn.Parameter, list[Piece]] = {parameter: [] for parameter in self.shapes}
        self._pieces_in: dict[int, list[Piece]] = {id(flat): [] for flat in self.flat}
        for piece in self.pieces:
            self.pieces_of[piece.parameter].append(piece)
            self._pieces_in[id(self.flat[piece.partition])].append(piece)

    def _whole(self, groups: list[dict[str, Any]]) -> None:
        for group in groups:
            for parameter in group["params"]:
                self.pieces.append(Piece(parameter, len(self.flat), 0, 0, parameter.numel(), parameter))
                self.flat.append(parameter)
                self.of_shadows.append(is_shadow_group(group))

    def _group_wise(self, groups: list[dict[str, Any]]) -> None:
        zero = self.zero
        for index, group in enumerate(groups):
            size = int(zero.partition_size[index])
            begin = self.rank * size
            flat = zero.single_partition_of_fp32_groups[index]
            for parameter, first in zip(
                zero.round_robin_bit16_groups[index], zero.round_robin_bit16_offsets[index], strict=True
            ):
                low, high = max(first, begin), min(first + parameter.numel(), begin + size)
                if low < high:
                    self._add(flat, parameter, index, low - begin, low - first, high - low)
            self.flat.append(flat)
            self.of_shadows.append(is_shadow_group(group))

    def _parameter_wise(self, groups: list[dict[str, Any]]) -> None:
        zero = self.zero
        for index, parameters in enumerate(zero.fp16_groups):
            start = 0
            flat = zero.fp32_partitioned_groups_flat[index]
            for parameter in parameters:
                size = parameter.partition_numel()
                offset = self.rank * size
                numel = min(size, parameter.ds_numel - offset)
                if numel > 0:
                    self._add(flat, parameter, index, start, offset, numel)
                start += size
            self.flat.append(flat)
            self.of_shadows.append(is_shadow_group(groups[zero.sub_group_to_group_id[index]]))

    def _add(self, flat: Tensor, parameter: nn.Parameter, partition: int, start: int, offset: int, numel: int) -> None:
        view = flat.detach()[start : start + numel]
        self.pieces.append(Piece(parameter, partition, start, offset, numel, view))

    def pieces_in(self, partition: Tensor) -> list[Piece]:
        """Return the pieces of a partition, which DeepSpeed passes to the optimizer as a single parameter."""
        return self._pieces_in[id(partition)]

    def gradients(self) -> list[list[Tensor]]:
        """Return the reduced gradient of each partition, in consecutive tensors; only between backward and step."""
        offloaded = getattr(self.zero, "cpu_offload", False) or getattr(self.zero, "offload_optimizer", False)
        if self.stage == 0 or offloaded:
            return [[] if flat.grad is None else [flat.grad] for flat in self.flat]
        held = self.zero.averaged_gradients
        return [list(held.get(index) or []) for index in range(len(self.flat))]

    def clear_gradients(self) -> None:
        """Clear the gradients of an update; ZeRO-3 and offloading would keep those of parameters that the next does not use."""
        if self.stage == 3:
            self.zero.grad_partitions_flat_buffer.zero_()
        for flat in self.flat if self.stage > 0 else ():
            if flat.grad is not None:
                flat.grad.zero_()

    def largest_gradients(self) -> dict[nn.Parameter, float]:
        """Return the largest absolute element of each parameter's gradient over all ranks."""
        number = {parameter: index for index, parameter in enumerate(self.shapes)}
        found = torch.zeros(len(number), device=self.engine.device)
        for piece, gradient in self._gradient_pieces():
            if gradient.numel():
                index = number[piece.parameter]
                found[index] = torch.maximum(found[index], gradient.abs().max())
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return dict(zip(self.shapes, found.tolist(), strict=True))

    def power_sums(self, parameters: list[nn.Parameter], shadows: list[nn.Parameter]) -> Tensor:
        """Return this rank's part of `largebatch.noise.estimator.partial_sums`, (2, P); only between backward and step."""
        place = {parameter: (0, column) for column, parameter in enumerate(parameters)}
        place |= {shadow: (1, column) for column, shadow in enumerate(shadows)}
        sums = torch.zeros(2, len(parameters), dtype=torch.float64, device=self.engine.device)
        for piece, gradient in self._gradient_pieces():
            row, column = place[piece.parameter]
            sums[row, column] += (gradient if row else gradient * gradient).sum()
        return sums

    def _gradient_pieces(self) -> Iterator[tuple[Piece, Tensor]]:
        """Yield each piece that has a gradient on this rank, with its gradient."""
        flat = [[tensor.reshape(-1) for tensor in part] for part in self.gradients()]
        joined = [torch.cat(part) if len(part) > 1 else part[0] if part else None for part in flat]
        for piece in self.pieces:
            gradient = joined[piece.partition]
            if gradient is not None:
                yield piece, piece.cut(gradient)

    def slots(self) -> dict[nn.Parameter, dict[str, float | None]]:
        """Return each parameter's optimizer state, the same on all ranks: counts, and None in place of tensors."""
        own: list[dict[str, float | None]] = []
        for pieces in self.pieces_of.values():
            state = self.optimizer.state.get(pieces[0].view, {}) if pieces else {}
            own.append(
                {
                    name: None if isinstance(value, Tensor) else value
                    for name, value in state.items()
                    if isinstance(value, Tensor | float)
                }
            )
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, own)
        found: dict[nn.Parameter, dict[str, float | None]] = {}
        for parameter, ranks in zip(self.pieces_of, zip(*gathered, strict=True), strict=True):
            found[parameter] = {name: value for slots in ranks for name, value in sorted(slots.items())}
        return found

    def full(self, parameter: nn.Parameter, slots: dict[str, float | None]) -> dict[str, Tensor]:
        """Return a parameter's whole tensors in CPU memory; a collective.

        Args:
            parameter: the model's parameter.
            slots: slots of the optimizer's state that `slots` returned for the parameter.

        Returns:
            The float32 master weight under `PARAMETER`, and the slots, such as "exp_avg_sq", under their names.
        """
        views = [piece.view for piece in self.pieces_of[parameter]]
        found = {PARAMETER: self._gather(parameter, views)}
        for name, count in slots.items():
            if count is None:
                found[name] = self._gather(parameter, [self.optimizer.state[view][name] for view in views])
            else:
                found[name] = slot_tensor(count)
        return found

    def _gather(self, parameter: nn.Parameter, held: list[Tensor]) -> Tensor:
        if self.stage == 0:
            return held[0].detach().to("cpu", copy=True)
        shape = self.shapes[parameter]
        full = torch.zeros(shape.numel(), device=self.engine.device)
        for piece, tensor in zip(self.pieces_of[parameter], held, strict=True):
            full[piece.offset : piece.offset + piece.numel] = tensor
        dist.all_reduce(full)  # each element lies on one rank, so the sum is exact
        return full.cpu().view(shape)

    @torch.no_grad()
    def load(self, parameter: nn.Parameter, full: dict[str, Tensor]) -> None:
        """Load tensors that `full` returned, on any stage and any number of ranks; call `refresh` after the last parameter."""
        for piece in self.pieces_of[parameter]:
            for name, tensor in full.items():
                value = slot_value(self.optimizer, name, tensor)
                if isinstance(value, Tensor):
                    part = value.reshape(-1)[piece.offset : piece.offset + piece.numel] if self.stage > 0 else value
                    value = part.to(piece.view, copy=True)
                if name != PARAMETER:
                    self.optimizer.state[piece.view][name] = value
                elif isinstance(value, Tensor):
                    piece.view.copy_(value)
        if self.stage in (1, 2):
            parameter.data.copy_(full[PARAMETER])

    def refresh(self) -> None:
        """Update the model's weights from the partitions, under ZeRO-3."""
        if self.stage == 3:
            for index in range(len(self.flat)):
                self.zero._reassign_or_swap_out_partitioned_parameters(index)
            if self.zero.persistent_parameters:  # they are gathered again at their next use, as at the start
                self.zero.persistent_parameters[0].partition(self.zero.persistent_parameters)


class SteppedByGroup(torch.optim.Optimizer):
    """An adapter between DeepSpeed, which steps one partition of one group at a time, and an optimizer.

    The optimizer gets the pieces of a partition, each a parameter or this rank's part of it, as its parameters. So it keeps
    state and counts per parameter, and skips a parameter that had no gradient. Because it pairs a group with the preceding
    group of shadows, a partition of shadows waits, with its squares, for the weights' partition, which has the same layout.

    Args:
        optimizer: the optimizer; its groups and state are shared.

    Attributes:
        partitions: the partitions that hold the pieces, set after DeepSpeed has partitioned the parameters.
        unused: the parameters without a gradient in the next update.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        # Do not call Optimizer.__init__, which would register the parameters: DeepSpeed only reads these three attributes.
        self.inner = optimizer
        self.param_groups, self.state, self.defaults = optimizer.param_groups, optimizer.state, optimizer.defaults
        self.all_groups = optimizer.param_groups
        self.partitions: Partitions | None = None
        self.unused: set[nn.Parameter] = set()
        self.begin()

    def begin(self) -> None:
        """Discard waiting partitions of an update that was dropped, and start the next update."""
        self.waiting: deque[tuple[dict[str, Any], list[Piece]]] = deque()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing, because DeepSpeed clears gradients itself."""

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step the one partition that DeepSpeed has put into the groups."""
        assert self.partitions is not None
        ((group, partition),) = [(g, p) for g in self.param_groups for p in g["params"]]
        pieces = self.partitions.pieces_in(partition)
        for piece in pieces:
            piece.view.grad = None if piece.parameter in self.unused else piece.cut(partition.grad)
        if is_shadow_group(group):
            self.waiting.append((group, pieces))
            return
        parts = [(group, pieces)]
        if self.waiting:
            parts.insert(0, self.waiting.popleft())
        self.inner.param_groups = [group | {"params": [piece.view for piece in pieces]} for group, pieces in parts]
        try:
            self.inner.step()
        finally:
            self.inner.param_groups = self.all_groups
            for piece in [piece for _, pieces in parts for piece in pieces]:
                piece.view.grad = None

"""Sums over the data-parallel ranks of a user's own training loop: all collective communication of the library."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from largebatch.errors import UserError


def num_ranks(group: dist.ProcessGroup | None = None) -> int:
    """Return the number of data-parallel ranks: 1 where no process group was initialized.

    Args:
        group: process group of the data-parallel ranks; None for all ranks.

    Raises:
        UserError: if this process is no member of the group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    size = dist.get_world_size(group)
    if size < 1:
        raise UserError(
            "process_group: this rank is not a member; give each rank the group of its own data-parallel ranks"
        )
    return size


def sum_over_ranks(
    tensors: Sequence[Tensor], group: dist.ProcessGroup | None = None, travels_in: torch.dtype | None = None
) -> None:
    """Sum tensors over the ranks in place; every rank gets the same bits.

    Args:
        tensors: tensors of the same shapes on every rank.
        group: process group of the data-parallel ranks; None for all ranks.
        travels_in: data type in which the tensors are sent and added; None for their own.
    """
    sent = [tensor.to(travels_in or tensor.dtype) for tensor in tensors]
    works = [dist.all_reduce(tensor, group=group, async_op=True) for tensor in sent]
    for work, tensor, summed in zip(works, tensors, sent, strict=True):
        work.wait()
        if summed is not tensor:
            tensor.copy_(summed)


def require_equal(values: dict[str, int], device: torch.device, group: dist.ProcessGroup | None = None) -> None:
    """Raise on every rank if one of the values differs between ranks.

    Args:
        values: integers to compare, by name.
        device: device of the tensors that the process group communicates.
        group: process group of the data-parallel ranks; None for all ranks.

    Raises:
        UserError: if a value differs; the message names it and lists the value of each rank.
    """
    mine = torch.tensor(list(values.values()), dtype=torch.int64, device=device)
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, mine, group=group)
    for index, name in enumerate(values):
        found = [int(row[index]) for row in gathered]
        if len(set(found)) > 1:
            raise UserError(
                f"{name}: expected the same on every data-parallel rank, got {found} by rank; where ranks hold different "
                "parameters (pipeline or expert parallelism), give process_group= the ranks that hold the same ones"
            )

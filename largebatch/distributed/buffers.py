"""Copies of rank 0's weights and buffers on every rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

MESSAGE_ELEMENTS = 2**22  # elements that are copied from rank 0 at a time


def write_out(model: nn.Module) -> None:
    """Make expanded buffers contiguous: otherwise values from rank 0 or a checkpoint could not be written into them."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if any(size > 1 and stride == 0 for size, stride in zip(buffer.shape, buffer.stride(), strict=True)):
                setattr(module, name, buffer.contiguous())


def sums_of(buffers: Sequence[Tensor]) -> Tensor:
    """Return two sums of each buffer, (n, 2) in float64, by which copies are compared; the second is weighted by position."""
    if not buffers:
        return torch.zeros(1, 2, dtype=torch.float64)
    return torch.stack([_sums(buffer) for buffer in buffers])


def _sums(values: Tensor) -> Tensor:
    flat = values.detach().reshape(-1).double().nan_to_num(0.0, 0.0, 0.0)
    return torch.stack([flat.sum(), flat @ torch.linspace(1.0, 2.0, len(flat), dtype=flat.dtype, device=flat.device)])


@torch.no_grad()
def copy_from_first(device: torch.device, tensors: Sequence[Tensor]) -> None:
    """Copy rank 0's tensors to every rank, several in one message; a collective.

    Args:
        device: device of the process group.
        tensors: tensors with the same shapes and types on every rank.
    """
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        waiting = [tensor for tensor in tensors if tensor.dtype == dtype and tensor.numel()]
        while waiting:
            taken, elements = [waiting.pop(0)], 0
            while waiting and (elements := elements + taken[-1].numel()) < MESSAGE_ELEMENTS:
                taken.append(waiting.pop(0))
            flat = torch.cat([tensor.reshape(-1) for tensor in taken]).to(device)
            dist.broadcast(flat.view(torch.uint8), 0)
            for tensor, part in zip(taken, flat.split([tensor.numel() for tensor in taken]), strict=True):
                tensor.copy_(part.view(tensor.shape))

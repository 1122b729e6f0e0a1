"""Data parallelism by DistributedDataParallel; one process is the case without the wrapper."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from largebatch.distributed.backend import Precision, Ranks
from largebatch.distributed.engine import Engine
from largebatch.distributed.hook import SquaresReduction, reduce_bucket
from largebatch.moments import shadows

# The flag's name since torch 2.13; the old one warns there.
_SYNC_BUFFERS: Any = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)


class DataParallel(Engine):
    """The `Backend` for replicas: gradients are averaged beside the backward pass, every rank does the same update.

    Args:
        ranks: this process among all.
        device: its device.
        precision: ``fp32``, ``fp64``, or autocast to ``bf16`` or ``fp16`` (the latter with loss scaling).
        compile_model: compile the model with torch.compile.
        squares_dtype: in which tracked squares travel between ranks.
    """

    def __init__(
        self,
        ranks: Ranks,
        device: torch.device,
        precision: Precision = "fp32",
        compile_model: bool = False,
        squares_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(ranks, device, precision)
        self.name = "DistributedDataParallel" if self.world_size > 1 else "single process"
        self.compile_model = compile_model
        self.squares = SquaresReduction(torch.float64 if precision == "fp64" else squares_dtype)

    def prepare(
        self, model: nn.Module, build_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Move the model to the device and wrap it; return what to call, and the optimizer of its parameters."""
        model.to(self.device, self.dtype)
        if self.compile_model and shadows(model):
            # The compiler cuts its graph where DDP's buckets end, and fails on a size that crosses a cut, as that of a
            # sample's gradient does once batches differ. Whole, the graph's gradients are reduced after its backward pass.
            torch._dynamo.config.optimize_ddp = False
        called: nn.Module = torch.compile(model) if self.compile_model else model  # type: ignore[assignment]
        if self.world_size == 1:
            return called, build_optimizer(model)
        # Buffers are not broadcast: batch statistics are summed once per update instead (models/norm.py).
        self.wrapper = DistributedDataParallel(
            called,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            **{_SYNC_BUFFERS: False},  # type: ignore[arg-type]
            gradient_as_bucket_view=True,
        )
        if shadows(model):
            self.wrapper.register_comm_hook(self.squares, reduce_bucket)
        return self.wrapper, build_optimizer(model)

    def set_squares_due(self, due: bool) -> None:
        """Say whether tracked squares are reduced in the coming update, or add up on each rank."""
        self.squares.due = due

    def accumulate(self, sync: bool) -> AbstractContextManager[Any]:
        """Return the context of one micro-batch; DDP reduces in the backward pass of the one with ``sync``."""
        return nullcontext() if sync or self.wrapper is None else self.wrapper.no_sync()

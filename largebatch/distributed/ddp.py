"""Data parallelism by DistributedDataParallel; one process is the case without the wrapper."""

from __future__ import annotations

import gc
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_

from largebatch.distributed.backend import NonFiniteError, Precision, Ranks
from largebatch.distributed.hook import SquaresReduction, reduce_bucket
from largebatch.moments import is_shadow
from largebatch.optim import is_shadow_group

# The flag's name since torch 2.13; the old one warns there.
_SYNC_BUFFERS: Any = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)


class DataParallel:
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
        self.rank, self.world_size, self.device = ranks.rank, ranks.world_size, device
        self.precision = precision
        self.compile_model = compile_model
        self.squares = SquaresReduction(torch.float64 if precision == "fp64" else squares_dtype)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.wrapper: DistributedDataParallel | None = None
        self.losses_finite = torch.ones((), dtype=torch.bool, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # A process group that the caller opened (a test, a notebook) stays the caller's to close.
        self.owns_group = self.world_size > 1 and not dist.is_initialized()
        if self.owns_group:
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo", device_id=device if device.index is not None else None
            )

    def describe(self) -> str:
        """Return engine, processes and devices in words."""
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        engine = "DistributedDataParallel" if self.world_size > 1 else "single process"
        return f"{engine}, {self.world_size} x {device}, {self.precision}"

    def prepare(self, model: nn.Module) -> nn.Module:
        """Move the model to the device and wrap it; return what to call."""
        model.to(self.device, torch.float64 if self.precision == "fp64" else torch.float32)
        called: nn.Module = torch.compile(model) if self.compile_model else model  # type: ignore[assignment]
        if self.world_size == 1:
            return called
        # Buffers are not broadcast: batch statistics are summed once per update instead (models/norm.py).
        self.wrapper = DistributedDataParallel(
            called,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            **{_SYNC_BUFFERS: False},  # type: ignore[arg-type]
            gradient_as_bucket_view=True,
        )
        if any(is_shadow(p) for p in model.parameters()):
            self.wrapper.register_comm_hook(self.squares, reduce_bucket)
        return self.wrapper

    def set_squares_due(self, due: bool) -> None:
        """Say whether tracked squares are reduced in the coming update, or add up on each rank."""
        self.squares.due = due

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of a forward pass."""
        if self.precision in ("fp32", "fp64"):
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16 if self.precision == "bf16" else torch.float16)

    def accumulate(self, sync: bool) -> AbstractContextManager[Any]:
        """Return the context of one micro-batch; DDP reduces in the backward pass of the one with ``sync``."""
        return nullcontext() if sync or self.wrapper is None else self.wrapper.no_sync()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this rank's share of the batch's mean loss."""
        self.losses_finite &= loss.detach().isfinite()
        # DDP divides the sum over ranks by their number; the share is already divided by the global count.
        self.scaler.scale(loss * self.world_size if self.world_size > 1 else loss).backward()

    def step(self, optimizer: torch.optim.Optimizer, max_grad_norm: float | None = None) -> float:
        """Clip, update and zero the gradients; return the gradient's global norm before clipping."""
        scaled = self.scaler.is_enabled()
        if scaled:
            self.scaler.unscale_(optimizer)
        groups = optimizer.param_groups
        params = [p for g in groups if not is_shadow_group(g) for p in g["params"] if p.grad is not None]
        squares = [s.grad for g in groups if is_shadow_group(g) for s in g["params"] if s.grad is not None]
        if squares and scaled:
            # unscale_ has divided everything once; squares carry the square of the scale.
            torch._foreach_div_(squares, self.scaler.get_scale())
        # torch.nn.utils.get_total_norm without its sorting by device and type, which costs as much as the norm.
        grads = [p.grad for p in params if p.grad is not None]
        grad_norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        norm = float(grad_norm)  # the same on every rank, so all of them take the same branch
        finite = norm - norm == 0.0
        if not finite and (self.precision != "fp16" or not bool(self._all_losses_finite().all())):
            optimizer.zero_grad()
            raise NonFiniteError([rank for rank, good in enumerate(self._all_losses_finite().tolist()) if not good])
        if max_grad_norm is not None and finite:
            clip_grads_with_norm_(params, max_grad_norm, grad_norm)
            if squares:
                torch._foreach_mul_(squares, min(1.0, max_grad_norm / (norm + 1e-6)) ** 2)
        if scaled:
            self.scaler.step(optimizer)  # skips the update where gradients overflowed
            self.scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad()
        self.losses_finite.fill_(True)
        return norm

    def _all_losses_finite(self) -> Tensor:
        """Return for each rank whether its losses since the last update were finite, bool (world_size,)."""
        flags = torch.zeros(self.world_size, device=self.device)
        flags[self.rank] = self.losses_finite.float()
        return self.sum(flags) > 0

    def sum(self, values: Tensor) -> Tensor:
        """Return the elementwise sum over ranks."""
        if self.world_size > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            dist.barrier()

    def save(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, extra: dict[str, Any]) -> None:
        """Write model, optimizer and ``extra`` to ``path``; written beside and renamed, so that it is whole or not there."""
        if self.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_name(path.name + ".part")
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "extra": extra}, beside)
            beside.replace(path)
        self.barrier()

    def load(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Read what `save` wrote into model and optimizer; return ``extra``."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return state["extra"]

    def close(self) -> None:
        """Leave the process group.

        The wrapper goes first: a gloo process that still holds it at exit aborts in about half of the runs.
        """
        self.wrapper = None
        gc.collect()
        if self.owns_group and dist.is_initialized():
            dist.destroy_process_group()

"""Data parallelism with DistributedDataParallel; a single process uses no wrapper."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from largebatch.distributed.backend import Precision, Ranks
from largebatch.distributed.engine import Engine
from largebatch.distributed.squares import VARIANCE, HookedSquares
from largebatch.distributed.state import read_tensors, tensor_metadata
from largebatch.distributed.usage import Usage, Used
from largebatch.errors import UserError
from largebatch.moments import is_shadow, shadows
from largebatch.optim.adaptive import AdaptiveOptimizer
from largebatch.optim.limit import LimitMeter
from largebatch.reduce import sum_over_ranks

# The name of the flag since torch 2.13, which warns of the old name.
_SYNC_BUFFERS: Any = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)


class DataParallel(Engine):
    """The `Backend` for replicas: gradients are averaged during the backward pass, and every rank makes the same update.

    DDP does not reduce squared gradients: each rank accumulates its own, and they are summed over the ranks once per update,
    after its last backward pass.

    Args:
        ranks: this process's rank and the world size.
        device: device of this process.
        precision: ``fp32``, ``fp64``, or autocast to ``bf16`` or ``fp16`` (the latter with loss scaling).
        compile_model: compile the model with torch.compile.
        squares_dtype: data type in which squares are reduced over the ranks.
        squares_every: number of updates between two measurements of the variance between micro-batches.
        channels_last: keep the weights of two-dimensional convolutions, and so their outputs, in the channels-last format.
    """

    def __init__(
        self,
        ranks: Ranks,
        device: torch.device,
        precision: Precision = "fp32",
        compile_model: bool = False,
        squares_dtype: torch.dtype = torch.float32,
        squares_every: int = 1,
        channels_last: bool = False,
    ) -> None:
        super().__init__(ranks, device, precision)
        self.name = "DistributedDataParallel" if self.world_size > 1 else "single process"
        self.compile_model = compile_model
        self.travels_in = torch.float64 if precision == "fp64" else squares_dtype
        self.squares_every, self.channels_last = squares_every, channels_last
        self.hooked: HookedSquares | None = None
        self._hooks = False
        self._norms: Tensor | None = None  # norms of this update's reduced gradients, before any scaling

    def track(self, model: nn.Module, per: Literal["sample", "micro_batch"], fallback: Iterable[str] = ()) -> None:
        """Let backward passes collect squared gradients; those of micro-batches are collected by hooks on the parameters."""
        if per == "micro_batch":
            self._hooks = True  # `prepare` registers them, when the parameters are on their device
        else:
            super().track(model, per, fallback)

    def prepare(
        self, model: nn.Module, build_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Move the model to the device and wrap it; return the module to call, and the optimizer of its parameters."""
        self.place(model)
        for module in model.modules() if self.channels_last else ():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.hooked = HookedSquares(model, self.squares_every, self.travels_in) if self._hooks else None
        self._hooks = False  # they belong to this model: a benchmark prepares several models in turn
        of_samples = list(shadows(model).values())
        if self.compile_model and of_samples:
            raise UserError(
                "backend.compile: squares of samples are taken operation by operation, which the compiler does not do; take "
                "those of micro-batches (optimizer.second_moment, noise.per), or leave it uncompiled"
            )
        called: nn.Module = torch.compile(model) if self.compile_model else model  # type: ignore[assignment]
        self._shadows = of_samples
        self._trained = [p for p in model.parameters() if p.requires_grad]  # including shadows
        if self.world_size == 1:
            return called, build_optimizer(model)
        self.note_use(model)
        ignored = [name for name, p in called.named_parameters(remove_duplicate=False) if is_shadow(p)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(called, ignored)
        # Buffers are not broadcast: batch statistics are summed once per update (models/norm.py), others aligned.
        self.wrapper = DistributedDataParallel(
            called,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            init_sync=False,  # `place` has copied weights and buffers from rank 0
            **{_SYNC_BUFFERS: False},  # type: ignore[arg-type]
            gradient_as_bucket_view=True,
        )
        return self.wrapper, build_optimizer(model)

    def begin_update(self, batch_size: int, num_units: float, update: int) -> None:
        """Announce the next update: its batch size B, the number of units of its squares, and its index in the run."""
        super().begin_update(batch_size, num_units, update)
        if self.hooked is not None:
            self.hooked.begin(batch_size, num_units, update)

    def shrink_update(self, num_samples: int, num_units: float) -> None:
        """Announce, before the last backward pass, the number of samples if some of those announced are missing."""
        super().shrink_update(num_samples, num_units)
        if self.hooked is not None:
            self.hooked.shrink(num_samples, num_units)

    @contextmanager
    def accumulate(self, sync: bool, idle: bool = False) -> Iterator[None]:
        """Run one micro-batch; with ``sync`` DDP reduces gradients in its backward pass, and squares are reduced after it."""
        reduced = nullcontext() if sync or self.wrapper is None else self.wrapper.no_sync()
        without_trace = idle and self.world_size == 1  # no other rank waits for its gradients
        with reduced, self.noting_use(sync, idle), self._taken_back() if without_trace else nullcontext():
            yield
        if self.hooked is not None:
            self.hooked.passes += not without_trace
        if sync and self.hooked is not None:
            self.hooked.reduce(self.world_size, self.factor)
        elif sync and self.world_size > 1 and self._shadows:
            self._reduce_shadows()

    @contextmanager
    def _taken_back(self) -> Iterator[None]:
        """Run a pass after which parameters that had no gradient, or squares, before still have none."""
        unused = [p for p in self._trained if p.grad is None]
        with nullcontext() if self.hooked is None else self.hooked.paused():
            yield
        for parameter in unused:
            parameter.grad = None

    def fill_up(self, usage: Usage) -> None:
        """Give a gradient of zeros to the parameters that the pass did not reach, because DDP waits for all parameters.

        An additional backward pass from only these leaves does this. DDP's find_unused_parameters would instead traverse the
        graph of every forward pass, and fail with re-entrant activation checkpoints, whose parameters are not in the graph.
        """
        trained = [parameters[0] for parameters in self.named_gradients.values()]
        missing = [p for number, p in enumerate(trained) if number not in usage.reached]
        if missing:
            with nullcontext() if self.hooked is None else self.hooked.paused():
                torch.autograd.backward(missing, [torch.zeros_like(p) for p in missing])

    def collect_use(self, usage: Usage) -> Used:
        """Return which parameters the passes of the update used on any rank.

        A parameter whose reduced gradient is not zero was used on some rank. Every rank holds the same reduced gradients, so
        if none of them is zero, no communication is needed.
        """
        grads = [parameters[0].grad for parameters in self.named_gradients.values()]
        self._norms = torch.stack(torch._foreach_norm([grad for grad in grads if grad is not None]))
        if len(self._norms) < len(grads) or not self._norms.all():
            return super().collect_use(usage)
        usage.forget()
        return Used(unused=[], parted=[], early=[])

    def gradient_norm(self, grads: list[Tensor]) -> Tensor:
        """Return the Euclidean norm over all gradients of the model, from the norms of `collect_use` if it computed them."""
        norms, self._norms = self._norms, None
        if norms is None or not grads:
            return super().gradient_norm(grads)
        return torch.linalg.vector_norm(norms) * self.factor

    def _reduce_shadows(self) -> None:
        """Average the squares of samples over the ranks, as DDP does the gradients."""
        for shadow in self._shadows:
            if shadow.grad is None:
                shadow.grad = torch.zeros_like(shadow)
        squares = [shadow.grad for shadow in self._shadows if shadow.grad is not None]
        flat = torch.cat([tensor.reshape(-1) for tensor in squares])
        sum_over_ranks([flat], travels_in=self.travels_in)
        flat.div_(self.world_size)
        for tensor, part in zip(squares, flat.split([tensor.numel() for tensor in squares]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def use_squares(self, optimizer: torch.optim.Optimizer) -> None:
        """Let an optimizer take its second moments from the squares."""
        if self.hooked is not None:
            assert isinstance(optimizer, AdaptiveOptimizer)
            optimizer.moment_source = self.hooked.moment

    def watch_limit(self, optimizer: torch.optim.Optimizer) -> LimitMeter | None:
        """Measure how close an optimizer's steps are to the largest stable ones, from the squares of micro-batches."""
        return None if self.hooked is None else self.hooked.watch_limit(optimizer)

    def damp_steps(self, optimizer: torch.optim.Optimizer, reference_size: int) -> None:
        """Damp an optimizer's steps by the curvature along them, from the squares of micro-batches."""
        assert self.hooked is not None
        self.hooked.damp_steps(optimizer, reference_size)

    def _gradients(self, optimizer: torch.optim.Optimizer) -> tuple[list[Tensor], list[Tensor]]:
        """Return this rank's gradients and squares as means over the update's actual samples, without loss scaling."""
        if self.hooked is not None:
            self.hooked.factor = self.factor
        return super()._gradients(optimizer)

    def clip(self, grads: list[Tensor], squares: list[Tensor], factor: float) -> None:
        """Multiply gradients by a factor, and squares by the square of the factor."""
        super().clip(grads, squares, factor)
        if self.hooked is not None:
            self.hooked.factor *= factor

    def squared_names(self, model: nn.Module) -> list[str]:
        """Return the names of the parameters whose squares are collected, in the order of `noise_sums`."""
        return super().squared_names(model) if self.hooked is None else self.hooked.names

    def noise_sums(self, model: nn.Module) -> Tensor:
        """Return each trained parameter's |ghat|^2 and sum of squares over all ranks, (2, P) in float64."""
        if self.hooked is None:
            return super().noise_sums(model)
        return self.over_ranks(self.hooked.sums(self.factor))

    def check_statistics(self, model: nn.Module, num_units: float = 1.0, names: list[str] | None = None) -> list[str]:
        """Raise if a parameter has a gradient but no squares; return those whose gradient was too small to decide."""
        return [] if self.hooked is not None else super().check_statistics(model, num_units, names)

    def state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Return the model's and the optimizer's tensors for a checkpoint, named as in `distributed.state`; a collective."""
        return super().state(model, optimizer) | ({} if self.hooked is None else self.hooked.state())

    def load_state(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Load the tensors that `state` returned, from a checkpoint of any engine and any number of ranks."""
        super().load_state(path, model, optimizer)
        if self.hooked is not None:
            names = [name for name in tensor_metadata(path) if name.startswith(VARIANCE)]
            self.hooked.load_state(read_tensors(path, names))

    def close(self) -> None:
        """Remove the hooks from the parameters, and leave the process group."""
        if self.hooked is not None:
            self.hooked.hooks.close()
        super().close()

"""The common base of all engines: precision, loss scaling, the update with its checks, and the process group."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from largebatch.distributed.arrival import open_group
from largebatch.distributed.backend import NonFiniteError, Precision, Ranks, T
from largebatch.distributed.buffers import copy_from_first, sums_of, write_out
from largebatch.distributed.presence import check_statistics, largest_gradient
from largebatch.distributed.route import ADVICE, Route
from largebatch.distributed.state import load_named_state, named_state, read_tensors, tensor_metadata
from largebatch.distributed.usage import Usage, Used, trained_parameters
from largebatch.distributed.watch import RankWatch
from largebatch.errors import UserError
from largebatch.moments import is_shadow, shadows, track, tracked_parameters
from largebatch.noise.estimator import partial_sums
from largebatch.optim import gradients_and_squares, scale_gradients
from largebatch.optim.limit import LimitMeter

# The loss scale of fp16 below which the scale is not the cause of an overflow: fp16's smallest normal number, reached after
# thirty halvings. Values multiplied by less lose their digits.
LEAST_SCALE = 2.0**-14

SCALER = "engine.scaler."  # prefix of the state of fp16's loss scaling in a checkpoint


class Engine(ABC):
    """The part of a `Backend` that does not depend on how the model is wrapped.

    A subclass implements `prepare` and `accumulate`, which suffice if every rank holds all averaged gradients. A subclass that
    shards gradients also overrides `local`, `over_ranks` and `gradient_norm`; one that makes the update itself, `step`.

    Args:
        ranks: this process's rank and the world size.
        device: device of this process.
        precision: ``fp32``, ``fp64``, or autocast to ``bf16`` or ``fp16`` (the latter with loss scaling).

    Attributes:
        wrapper: the module or engine that `prepare` put around the model; released by `close`.
        dtype: data type of the parameters that are updated.
        half: data type in which autocast computes; None without autocast.
        scaler: loss scaling of fp16; disabled in every other precision.
        watch: determines which rank is missing when communication fails.
        timeout_seconds: how long ranks wait for each other, and for a worker of the data loader.
        losses_finite: bool tensor, whether this rank's losses since the last update were finite.
        named_gradients: the trained parameters by name, each with its shadow if it has one.
        route: compares the modules that the ranks run; None if ranks may run different ones.
        usage: records which parameters took part in an update; None if autograd itself leaves the others without a gradient.
    """

    name = "engine"
    needs_group_alone: ClassVar[bool] = False  # whether a single process needs a process group too

    def __init__(self, ranks: Ranks, device: torch.device, precision: Precision = "fp32") -> None:
        self.rank, self.world_size, self.device = ranks.rank, ranks.world_size, device
        self.precision, self.timeout_seconds = precision, ranks.timeout_seconds
        self.dtype = torch.float64 if precision == "fp64" else torch.float32
        self.half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.wrapper: Any = None
        self._announced, self._share = 1, 1.0  # samples of the update, and the fraction that could be read
        self.losses_finite = torch.ones((), dtype=torch.bool, device=device)
        self._aligned: list[str] = []  # names of buffers that differed between ranks
        self.usage: Usage | None = None
        self.route: Route | None = None
        self.named_gradients: dict[str, list[nn.Parameter]] = {}
        self._measured: tuple[nn.Module, list[nn.Parameter], list[nn.Parameter]] | None = None
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # A process group that the caller opened (a test, a notebook) must be closed by the caller.
        self.owns_group = (self.world_size > 1 or self.needs_group_alone) and not dist.is_initialized()
        store = open_group(ranks, device) if self.owns_group else None
        self.watch = RankWatch(store, self.rank, self.world_size)

    def describe(self) -> str:
        """Return a description of the engine, the processes and the devices."""
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        return f"{self.name}, {self.world_size} x {device}, {self.precision}"

    @abstractmethod
    def prepare(
        self, model: nn.Module, build_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Move the model to the device and wrap it; return the module to call, and the optimizer of its parameters."""

    @abstractmethod
    def accumulate(self, sync: bool, idle: bool = False) -> AbstractContextManager[Any]:
        """Return the context manager for one micro-batch's forward and backward pass; ``sync`` reduces gradients."""

    def place(self, model: nn.Module) -> None:
        """Move a model to the device, and copy rank 0's weights and buffers to every rank."""
        model.to(self.device, self.dtype)
        write_out(model)
        self._aligned = []
        if self.world_size == 1:
            return
        weights = (parameter for parameter in model.parameters() if not is_shadow(parameter))
        copy_from_first(self.device, [tensor.detach() for tensor in (*weights, *model.buffers())])

    def align_buffers(self, model: nn.Module, search: bool) -> None:
        """Copy rank 0's values of the buffers that were found to differ to every rank; call it between two updates.

        Args:
            model: the model that was passed to `prepare`.
            search: first compare all buffers, which models may update from a rank's own samples; a collective.
        """
        if self.world_size == 1:
            return
        names = self._aligned
        if search:
            named = {name: buffer for name, buffer in model.named_buffers() if buffer.numel()}
            sums = sums_of(list(named.values())).to(self.device)
            first = sums.clone()
            copy_from_first(self.device, [first])
            differ = self.sum((sums != first).any(dim=1).double()).tolist()
            names += [name for name, found in zip(named, differ, strict=False) if found and name not in names]
        if names:  # the same names on every rank
            write_out(model)
            held = dict(model.named_buffers())  # the model may have replaced tensors
            copy_from_first(self.device, [held[name].detach() for name in names])

    def track(self, model: nn.Module, per: Literal["sample", "micro_batch"], fallback: Iterable[str] = ()) -> None:
        """Let backward passes collect squared gradients, as gradients of shadows, which the engine reduces."""
        track(model, per, fallback=fallback)

    def note_use(self, model: nn.Module, watch: bool = True) -> Usage:
        """Start to record which parameters of the model are used, and return the record; call it before building the optimizer.

        Args:
            model: the model, with the parameters that the optimizer will hold.
            watch: whether these parameters are the leaves that backward passes reach.
        """
        of_samples, trained = shadows(model), trained_parameters(model)
        self.named_gradients = {
            name: [p, *([of_samples[name]] if name in of_samples else [])] for name, p in trained.items()
        }
        self.usage = Usage(trained)
        if watch:
            self.usage.watch(trained.items())
        return self.usage

    @contextmanager
    def noting_use(self, sync: bool, idle: bool) -> Iterator[None]:
        """Record which parameters a pass uses; after an update's last pass, remove the gradients of unused parameters."""
        if self.usage is not None:
            self.usage.begin_pass(not idle)
        if self.route is not None:
            self.route.begin_pass()
        yield
        if sync and self.usage is not None:
            self.usage.counts = False
            self.fill_up(self.usage)
            self.leave_alone(self.collect_use(self.usage))

    def compare_routes(self, named: Iterable[tuple[str, nn.Module]], advice: str = ADVICE) -> None:
        """Compare the modules that the ranks run in each pass from now on."""
        self.route = Route(named, self.watch.announce, self.name, advice)
        self.watch.where = self.route.where

    def agree_on_route(self) -> None:
        """Raise if the ranks ran different modules and the engine does not allow it; call it between forward and backward."""
        if self.route is not None:
            self.route.agree(self.sum, self.gather, self.device)

    def fill_up(self, usage: Usage) -> None:  # noqa: B027  optional for an engine
        """Give a gradient of zeros to parameters that the pass did not reach, if the reduction waits for them."""

    def collect_use(self, usage: Usage) -> Used:
        """Return which parameters the passes of the update used on any rank; a collective."""
        return usage.collect(self.sum, self.device)

    def leave_alone(self, found: Used) -> None:
        """Remove the gradients of parameters that no pass of the update used, and those of their shadows."""
        for name in found.unused:
            for parameter in self.named_gradients[name]:
                parameter.grad = None

    def begin_update(self, batch_size: int, num_units: float, update: int) -> None:
        """Announce the next update: its batch size B, the number of units of its squares, and its index in the run."""
        self._announced, self._share = batch_size, 1.0

    def shrink_update(self, num_samples: int, num_units: float) -> None:
        """Announce, before the last backward pass, the number of samples if some of those announced are missing."""
        self._share = num_samples / self._announced

    @property
    def factor(self) -> float:
        """Factor from accumulated gradients to their mean over the update's samples; squares take the square of it."""
        return 1.0 / (self._share * self.scaler.get_scale())

    def use_squares(self, optimizer: torch.optim.Optimizer) -> None:  # noqa: B027
        """Let an optimizer take its second moments from the squares; its shadow groups already do so here."""

    def watch_limit(self, optimizer: torch.optim.Optimizer) -> LimitMeter | None:
        """Measure how close an optimizer's steps are to the largest stable ones; return None, as it is not supported here."""
        return None

    def damp_steps(self, optimizer: torch.optim.Optimizer, reference_size: int) -> None:  # noqa: B027
        """Do nothing: the planner allows damping only on engines that override this method."""

    def squared_names(self, model: nn.Module) -> list[str]:
        """Return the names of the parameters whose squares are collected, in the order of `noise_sums`."""
        return list(shadows(model))

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context manager for a forward pass."""
        return nullcontext() if self.half is None else torch.autocast(self.device.type, self.half)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this rank's share of the batch's mean loss."""
        self.losses_finite &= loss.detach().isfinite()
        self.agree_on_route()
        # The engine averages over the ranks, but the loss is already divided by the global batch size.
        self.scaler.scale(loss * self.world_size if self.world_size > 1 else loss).backward()

    def step(self, optimizer: torch.optim.Optimizer, max_grad_norm: float | None = None) -> float:
        """Clip the gradients, update the parameters and clear the gradients; return the global gradient norm before clipping.

        Raises:
            NonFiniteError: on every rank, if the norm is not finite; nothing is updated.
        """
        grads, squares = self._gradients(optimizer)
        norm = float(self.gradient_norm(grads))  # the same on every rank, so all of them take the same branch
        finite = norm - norm == 0.0
        if not finite:
            self.check_losses(optimizer)
        elif max_grad_norm is not None:
            self.clip(grads, squares, min(1.0, max_grad_norm / (norm + 1e-6)))
        self.update(optimizer)
        optimizer.zero_grad()
        self.losses_finite.fill_(True)
        return norm

    def clip(self, grads: list[Tensor], squares: list[Tensor], factor: float) -> None:
        """Multiply gradients by a factor, and squares by the square of the factor."""
        scale_gradients(grads, squares, factor)

    def noise_sums(self, model: nn.Module) -> Tensor:
        """Return each trained parameter's |ghat|^2 and sum of tracked squares over all ranks, (2, P) in float64."""
        if self._measured is None or self._measured[0] is not model:  # do not traverse the modules at every update
            self._measured = model, *tracked_parameters(model)
        _, parameters, shadows = self._measured
        # Both rows contain the square of fp16's loss scale, and of the fraction of samples that could be read.
        return self.over_ranks(self.local_sums(parameters, shadows)) * self.factor**2

    def local_sums(self, parameters: list[nn.Parameter], shadows: list[nn.Parameter]) -> Tensor:
        """Return `largebatch.noise.estimator.partial_sums` of the gradients on this rank."""
        return partial_sums(parameters, shadows)

    def over_ranks(self, sums: Tensor) -> Tensor:
        """Return sums over the whole model, given the sums on each rank; the result is bitwise equal on every rank.

        If every rank holds all gradients, this is the mean over ranks: different hosts may add in a different order, but
        decisions that depend on the sums must be the same on every rank.
        """
        return self.sum(sums) / self.world_size

    def _gradients(self, optimizer: torch.optim.Optimizer) -> tuple[list[Tensor], list[Tensor]]:
        """Return this rank's gradients and squares as means over the update's actual samples, without loss scaling."""
        if self.scaler.is_enabled():
            self.scaler.unscale_(optimizer)
        grads, squares = ([self.local(gradient) for gradient in found] for found in gradients_and_squares(optimizer))
        if squares and self.scaler.is_enabled():
            # unscale_ has divided everything once, but squares contain the square of the scale.
            torch._foreach_div_(squares, self.scaler.get_scale())
        scale_gradients(grads, squares, 1.0 / self._share)
        return grads, squares

    def local(self, gradient: Tensor) -> Tensor:
        """Return this rank's part of a gradient; it shares the gradient's memory."""
        return gradient

    def gradient_norm(self, grads: list[Tensor]) -> Tensor:
        """Return the Euclidean norm over all gradients of the model, the same on every rank.

        Args:
            grads: the parts that `local` returned; the gradients themselves if every rank holds all of them.
        """
        # Like torch.nn.utils.get_total_norm, without grouping by device and type, which takes as long as the norm itself.
        if not grads:
            raise UserError(
                "model.name: no parameter that the optimizer trains has a gradient; the model has replaced its parameters "
                "since it was built, or uses none of them"
            )
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))

    def check_losses(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise if a gradient is not finite, unless it is an overflow that fp16's loss scaling handles.

        Raises:
            NonFiniteError: with the ranks whose losses were not finite, if any; the gradients are cleared.
        """
        good = self._all_losses_finite()
        if self.precision == "fp16" and all(good) and self.scaler.get_scale() >= LEAST_SCALE:
            return
        optimizer.zero_grad()
        self.losses_finite.fill_(True)
        if self.scaler.is_enabled():  # reset it after unscale_, with the same scale: this was not an overflow
            self.scaler.update(self.scaler.get_scale())
        raise NonFiniteError([rank for rank, is_finite in enumerate(good) if not is_finite])

    def _all_losses_finite(self) -> list[bool]:
        """Return, for each rank, whether its losses since the last update were finite."""
        flags = torch.zeros(self.world_size, device=self.device)
        flags[self.rank] = self.losses_finite.float()
        return (self.sum(flags) > 0).tolist()

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """Call the optimizer's step; under fp16, every rank skips it if gradients overflowed."""
        if self.scaler.is_enabled():
            self.scaler.step(optimizer)
            self.scaler.update()
        else:
            optimizer.step()

    def sum(self, values: Tensor) -> Tensor:
        """Return the elementwise sum over ranks."""
        if self.world_size > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values

    def broadcast(self, value: T) -> T:
        """Return rank 0's value on every rank; the value must be picklable."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in rank order, on every rank; a value must be picklable."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def check_statistics(self, model: nn.Module, num_units: float = 1.0, names: list[str] | None = None) -> list[str]:
        """Raise if a parameter has a gradient but no squares; return those whose gradient was too small to decide."""
        return check_statistics(model, num_units, names, self.largest_gradient)

    def largest_gradient(self, parameter: nn.Parameter) -> float | None:
        """Return the largest absolute element of a parameter's or shadow's gradient over all ranks; None without a gradient."""
        return largest_gradient(parameter)

    def state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Return the model's and the optimizer's tensors for a checkpoint, named as in `distributed.state`; a collective."""
        return named_state(model, optimizer) | self.scaler_state()

    def load_state(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Load the tensors that `state` returned, from a checkpoint of any engine and any number of ranks."""
        load_named_state(path, model, optimizer)
        self.load_scaler_state(path)

    def scaler_state(self) -> dict[str, Tensor]:
        """Return the state of fp16's loss scaling by name; an empty dict in other precisions."""
        if not self.scaler.is_enabled():
            return {}
        scaler = self.scaler.state_dict()
        return {
            SCALER + "scale": torch.tensor(scaler["scale"], dtype=torch.float64),
            SCALER + "growth_tracker": torch.tensor(scaler["_growth_tracker"]),
        }

    def load_scaler_state(self, path: Path) -> None:
        """Load the state that `scaler_state` returned, if the checkpoint has it and this run uses fp16."""
        names = [name for name in tensor_metadata(path) if name.startswith(SCALER)]
        if self.scaler.is_enabled() and names:
            saved = read_tensors(path, names)
            scale, tracker = float(saved[SCALER + "scale"]), int(saved[SCALER + "growth_tracker"])
            self.scaler.load_state_dict({**self.scaler.state_dict(), "scale": scale, "_growth_tracker": tracker})

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the process group.

        The wrapper is released first: a gloo process that still holds it at exit aborts in about half of the runs.
        """
        self.wrapper = None
        if self.usage is not None:
            self.usage.close()
        if self.route is not None:
            self.route.close()
        self.named_gradients = {}
        gc.collect()
        if self.owns_group and dist.is_initialized():
            dist.destroy_process_group()

"""The interface between the trainer and an engine: the Backend protocol, its section of a config, and the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from largebatch.distributed.watch import RankWatch
from largebatch.optim.limit import LimitMeter
from largebatch.process.launched import launched_place
from largebatch.section import LARGEST, Count, Section

Precision = Literal["fp32", "fp64", "bf16", "fp16"]
T = TypeVar("T")


class BackendConfig(Section):
    """The engine that runs the model, and its options."""

    name: Literal["auto", "ddp", "fsdp", "deepspeed", "accelerate"] = "auto"
    """Engine: ddp (one process or several), fsdp (weights and optimizer state sharded over the ranks), deepspeed (ZeRO),
    accelerate (the engine that accelerate launch was configured for); auto chooses ddp."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device type; auto takes a GPU if one is available."""
    compile: bool = False
    """Compile the model with torch.compile."""
    channels_last: bool | None = None
    """ddp: keep the weights of convolutions in the channels-last memory format. None: on a GPU in bf16 and fp16."""
    timeout_seconds: Annotated[float, Field(ge=1, le=LARGEST, allow_inf_nan=False)] = 600.0
    """Seconds without an answer from a rank after which the run stops. It must exceed the duration of the slowest update
    including compilation, and of reading a checkpoint when a run is resumed."""
    squares_dtype: Literal["float32", "bfloat16"] = "float32"
    """ddp: data type in which squared gradients are reduced over the ranks."""
    squares_every: Count = 1
    """ddp with squares of micro-batches: the variance between micro-batches is measured once every this many updates; the
    squared mean gradient is taken from each update."""
    shard: Annotated[list[str], Field(min_length=1)] | None = None
    """fsdp: modules whose parameters are gathered together, by class or by name with wildcards. None: the elements of
    nn.ModuleList and nn.Sequential containers."""
    offload: bool = False
    """fsdp: keep weights, gradients and optimizer state in CPU memory."""
    zero_stage: Literal[0, 1, 2, 3] | None = None
    """deepspeed: ZeRO stage. 1 shards the optimizer state over the ranks, 2 also the gradients, 3 also the weights; 0 shards
    nothing. None: the stage in ds_config, or 2."""
    ds_config: Path | dict[str, Any] | None = None
    """deepspeed: DeepSpeed's own options (offloading, bucket sizes), or a JSON file with them; batch sizes and precision are
    set by the run's config."""


class NonFiniteError(RuntimeError):
    """A gradient was NaN or infinite; the update was not applied.

    Args:
        ranks: ranks whose own loss was not finite; empty if every loss was finite and the gradient overflowed.
    """

    def __init__(self, ranks: list[int]) -> None:
        self.ranks = ranks
        super().__init__(f"non-finite gradient; ranks with a non-finite loss: {ranks or 'none'}")


@dataclass(frozen=True)
class Ranks:
    """Rank of this process in the run, in torchrun's terms, and how long the ranks wait for each other.

    Args:
        rank: rank of this process.
        local_rank: its rank on its node.
        world_size: number of processes of the run.
        timeout_seconds: how long the ranks wait for each other.
        store: the store through which the ranks are connected already; None if the engine is to open one.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    timeout_seconds: float = 600.0
    store: torch.distributed.Store | None = None


def launched_ranks() -> Ranks:
    """Read the rank and world size from torchrun's environment variables; without them, return those of a single process.

    Raises:
        UserError: see `launched_place`.
    """
    place = launched_place(needs_address=not torch.distributed.is_initialized())
    return Ranks(place.rank, place.local_rank, place.world_size)


class Backend(Protocol):
    """The methods that an engine provides to the trainer, which does not depend on the kind of engine.

    A loss passed to `backward` is this rank's share of the mean over the global batch: the sum of its samples' losses over B.
    `dtype` is the type of weights and inputs; under autocast, operations compute in a lower precision.
    """

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype
    timeout_seconds: float
    watch: RankWatch

    def describe(self) -> str:
        """Return a description of the engine, the processes and the devices."""
        ...

    def track(self, model: nn.Module, per: Literal["sample", "micro_batch"], fallback: Iterable[str] = ()) -> None:
        """Let backward passes collect squared gradients; call it before `prepare`.

        Args:
            model: the model as it was built.
            per: whether to square the gradient of every sample, or that of each backward pass on a rank.
            fallback: names of modules to differentiate sample by sample.
        """
        ...

    def use_squares(self, optimizer: torch.optim.Optimizer) -> None:
        """Let an optimizer take its second moments from the squared gradients; call it after `prepare`."""
        ...

    def watch_limit(self, optimizer: torch.optim.Optimizer) -> LimitMeter | None:
        """Measure how close an optimizer's steps are to the largest stable ones, from the squares of micro-batches.

        Returns:
            The meter, with the same values on every rank; None if the engine, the optimizer or the squares do not allow it.
        """
        ...

    def damp_steps(self, optimizer: torch.optim.Optimizer, reference_size: int) -> None:
        """Damp an optimizer's steps by the curvature along them, from the squares of micro-batches; call it after `prepare`.

        Args:
            optimizer: an optimizer that `largebatch.optim.damping` supports.
            reference_size: B_ref.
        """
        ...

    def squared_names(self, model: nn.Module) -> list[str]:
        """Return the names of the parameters whose squares are collected, in the order of `noise_sums`."""
        ...

    def prepare(
        self, model: nn.Module, build_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Move the model to the device and wrap it; return the module to call, and the optimizer of its parameters.

        Args:
            model: the model, after `track` if squares are collected.
            build_optimizer: called once with `model`, when its parameters are those that the optimizer has to hold.
        """
        ...

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context manager for a forward pass."""
        ...

    def accumulate(self, sync: bool, idle: bool = False) -> AbstractContextManager[Any]:
        """Return the context manager for the forward and backward pass of one micro-batch.

        Args:
            sync: whether this is the last micro-batch of the update, in which gradients are reduced. A parameter that received
                no gradient in this update on any rank has none afterwards, and the step does not change it.
            idle: whether the micro-batch replaces samples that this rank does not have, and does not count as a use of its
                parameters.
        """
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this rank's share of the batch's mean loss."""
        ...

    def begin_update(self, batch_size: int, num_units: float, update: int) -> None:
        """Announce the next update, before its first backward pass.

        Args:
            batch_size: B.
            num_units: n, the number of units (samples or micro-batches) whose gradients are squared.
            update: index of the update in the run, from 0.
        """
        ...

    def shrink_update(self, num_samples: int, num_units: float) -> None:
        """Announce on every rank, before the last backward pass, that the update has fewer samples than announced.

        All losses of the update are still divided by B; the gradients become the mean over the remaining samples.

        Args:
            num_samples: number of remaining samples, >= 1.
            num_units: n, the number of units whose gradients are squared.
        """
        ...

    def noise_sums(self, model: nn.Module) -> Tensor:
        """Return the sums over all ranks for the gradient noise; call it between the last backward pass and `step`.

        Args:
            model: a model that collects squares of P parameters, in the order of `squared_names`.

        Returns:
            (2, P), float64: |ghat|^2 and the sum of the squares of each parameter, averaged over ranks (`largebatch.noise`).
        """
        ...

    def step(self, optimizer: torch.optim.Optimizer, max_grad_norm: float | None = None) -> float:
        """Clip the gradients, update the parameters and clear the gradients; return the global gradient norm before clipping.

        Raises:
            NonFiniteError: on every rank, if the norm is not finite; nothing is updated.
        """
        ...

    def sum(self, values: Tensor) -> Tensor:
        """Return the elementwise sum over ranks."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in rank order, on every rank; a value must be picklable."""
        ...

    def barrier(self) -> None:
        """Wait for every rank."""
        ...

    def broadcast(self, value: T) -> T:
        """Return rank 0's value on every rank; the value must be picklable."""
        ...

    def check_statistics(self, model: nn.Module, num_units: float = 1.0, names: list[str] | None = None) -> list[str]:
        """Raise if a parameter of a tracked model has a gradient but no squares; call it between backward and step.

        Args:
            model: the model that was passed to `prepare`.
            num_units: n, the number of units whose gradients were added up.
            names: names of the parameters to check; None for all.

        Returns:
            The names of the parameters whose gradient was too small to decide, the same on every rank.

        Raises:
            UserError: naming the parameters.
        """
        ...

    def align_buffers(self, model: nn.Module, search: bool) -> None:
        """Copy rank 0's values of the buffers that were found to differ to every rank; call it between two updates.

        Args:
            model: the model that was passed to `prepare`.
            search: first compare all buffers, which models may update from a rank's own samples; a collective.
        """
        ...

    def state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Return the model's and the optimizer's tensors for a checkpoint, named as in `distributed.state`; a collective."""
        ...

    def load_state(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Load the tensors that `state` returned, from a checkpoint of any engine and any number of ranks."""
        ...

    def close(self) -> None:
        """Leave the process group."""
        ...

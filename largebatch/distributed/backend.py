"""What the trainer asks of whatever runs the model: the Backend protocol, its section of a config, and the ranks."""

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
    """How the model is run."""

    name: Literal["auto", "ddp", "fsdp", "deepspeed", "accelerate"] = "auto"
    """Engine: ddp (one process or many), fsdp (weights and optimizer state cut over the ranks), deepspeed (ZeRO), accelerate
    (what accelerate launch was configured for); auto chooses ddp."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device type; auto takes a GPU where there is one."""
    compile: bool = False
    """Compile the model with torch.compile."""
    channels_last: bool | None = None
    """ddp: keep the weights of convolutions with their channels last in memory. None: on a GPU in bf16 and fp16."""
    timeout_seconds: Annotated[float, Field(ge=1, le=LARGEST, allow_inf_nan=False)] = 600.0
    """A rank that is not heard of for so long stops the run; more than the slowest update with its compilation takes, and
    than reading a checkpoint through when the run is resumed."""
    squares_dtype: Literal["float32", "bfloat16"] = "float32"
    """ddp: precision in which the squares travel between ranks."""
    squares_every: Count = 1
    """ddp with micro-batches: updates between two measurements of the variance between them; each update has its own squared
    gradient."""
    shard: Annotated[list[str], Field(min_length=1)] | None = None
    """fsdp: modules gathered as one, by class or by name with wildcards. None: the elements of lists and sequences."""
    offload: bool = False
    """fsdp: keep weights, gradients and optimizer state in the memory of the CPU."""
    zero_stage: Literal[0, 1, 2, 3] | None = None
    """deepspeed: what is cut over the ranks: 1 optimizer state, 2 gradients too, 3 weights too. None: ds_config's, or 2."""
    ds_config: Path | dict[str, Any] | None = None
    """deepspeed: DeepSpeed's own options (offloading, bucket sizes) or a JSON file of them; the run decides batches and
    precision."""


class NonFiniteError(RuntimeError):
    """A gradient was NaN or infinite; the update was not applied.

    Args:
        ranks: ranks whose own loss was not finite; empty where every loss was finite and the gradient overflowed.
    """

    def __init__(self, ranks: list[int]) -> None:
        self.ranks = ranks
        super().__init__(f"non-finite gradient; ranks with a non-finite loss: {ranks or 'none'}")


@dataclass(frozen=True)
class Ranks:
    """Place of this process among the processes of the run, as torchrun names it, and how long they wait for each other.

    Args:
        rank: this process.
        local_rank: its number on its node.
        world_size: processes of the run.
        timeout_seconds: how long they wait.
        store: through which they have met already; None where an engine is to open it.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    timeout_seconds: float = 600.0
    store: torch.distributed.Store | None = None


def launched_ranks() -> Ranks:
    """Read this process's place from the environment that torchrun sets; one process without it.

    Raises:
        UserError: see `launched_place`.
    """
    place = launched_place(needs_address=not torch.distributed.is_initialized())
    return Ranks(place.rank, place.local_rank, place.world_size)


class Backend(Protocol):
    """Prepare, accumulate, backward, step, and the state for a checkpoint. The trainer never asks which engine it has.

    A loss handed to `backward` is this rank's share of the mean over the global batch: sum of its samples' losses over B.
    `dtype` is that of weights and inputs; autocast computes in a lower one.
    """

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype
    timeout_seconds: float
    watch: RankWatch

    def describe(self) -> str:
        """Return engine, processes and devices in words."""
        ...

    def track(self, model: nn.Module, per: Literal["sample", "micro_batch"], fallback: Iterable[str] = ()) -> None:
        """Let backward passes collect squared gradients; before `prepare`.

        Args:
            model: as it was built.
            per: squares of every sample's gradient, or of each backward pass of a rank.
            fallback: names of modules to differentiate sample by sample.
        """
        ...

    def use_squares(self, optimizer: torch.optim.Optimizer) -> None:
        """Let an optimizer take its second moments from them; after `prepare`."""
        ...

    def watch_limit(self, optimizer: torch.optim.Optimizer) -> LimitMeter | None:
        """Measure how near an optimizer's steps are to the largest stable ones, from the squares of micro-batches.

        Returns:
            What is measured, the same on every rank; None where the engine, the optimizer or the squares do not tell.
        """
        ...

    def damp_steps(self, optimizer: torch.optim.Optimizer, reference_size: int) -> None:
        """Damp an optimizer's steps by the curvature that they meet, from the squares of micro-batches; after `prepare`.

        Args:
            optimizer: one that `largebatch.optim.damping` takes.
            reference_size: B_ref.
        """
        ...

    def squared_names(self, model: nn.Module) -> list[str]:
        """Return the names of the parameters whose squares are collected, in the order of `noise_sums`."""
        ...

    def prepare(
        self, model: nn.Module, build_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Move the model to the device and wrap it; return what to call, and the optimizer of its parameters.

        Args:
            model: after `track`, where squares are wanted.
            build_optimizer: called once, with `model`, when its parameters are those the optimizer has to hold.
        """
        ...

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of a forward pass."""
        ...

    def accumulate(self, sync: bool, idle: bool = False) -> AbstractContextManager[Any]:
        """Return the context of one micro-batch's forward and backward pass.

        Args:
            sync: whether it is the update's last, in which gradients are reduced. A parameter to which none of the update's
                passes gave a gradient, on any rank, has none afterwards, and the step leaves it alone.
            idle: whether it stands in for samples that this rank does not have, and counts as no use of a parameter.
        """
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this rank's share of the batch's mean loss."""
        ...

    def begin_update(self, batch_size: int, num_units: float, update: int) -> None:
        """Say what the coming update is, before its first backward pass.

        Args:
            batch_size: B.
            num_units: n, the units of its squares.
            update: its number in the run, from 0.
        """
        ...

    def shrink_update(self, num_samples: int, num_units: float) -> None:
        """Say, on every rank and before its last backward pass, that the update has fewer samples than were announced.

        Its losses, those of the last pass too, are still divided by B; the gradients become the mean over what is left.

        Args:
            num_samples: samples that are left, >= 1.
            num_units: n, the units of their squares.
        """
        ...

    def noise_sums(self, model: nn.Module) -> Tensor:
        """Return what the gradient noise is measured from, over all ranks; between the last backward pass and `step`.

        Args:
            model: with squares of P parameters, in the order of `squared_names`.

        Returns:
            (2, P), float64: of each parameter |ghat|^2 and the sum of its squares, averaged over ranks (`largebatch.noise`).
        """
        ...

    def step(self, optimizer: torch.optim.Optimizer, max_grad_norm: float | None = None) -> float:
        """Clip, update and zero the gradients; return the gradient's global norm before clipping.

        Raises:
            NonFiniteError: if that norm is not finite, on every rank alike; nothing was updated.
        """
        ...

    def sum(self, values: Tensor) -> Tensor:
        """Return the elementwise sum over ranks."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, by rank, on every rank; it must be picklable."""
        ...

    def barrier(self) -> None:
        """Wait for every rank."""
        ...

    def broadcast(self, value: T) -> T:
        """Return rank 0's value on every rank; it must be picklable."""
        ...

    def check_statistics(self, model: nn.Module, num_units: float = 1.0, names: list[str] | None = None) -> list[str]:
        """Refuse a parameter of a tracked model that has a gradient and no statistic; between backward and step.

        Args:
            model: as it was handed to `prepare`.
            num_units: n, the units whose gradients were added up.
            names: of the parameters to look at; None for all.

        Returns:
            The names of those whose gradient was too small to say, the same on every rank.

        Raises:
            UserError: naming the parameters.
        """
        ...

    def align_buffers(self, model: nn.Module, search: bool) -> None:
        """Give every rank rank 0's values of the buffers that were found to differ; between two updates.

        Args:
            model: as it was handed to `prepare`.
            search: compare all of them first, as models move buffers by what a rank has seen; one collective.
        """
        ...

    def state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Return model and optimizer by name for a checkpoint, as `distributed.state` spells it; every rank takes part."""
        ...

    def load_state(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Read what `state` named, whatever engine wrote it and on however many ranks."""
        ...

    def close(self) -> None:
        """Leave the process group."""
        ...

"""What the trainer asks of whatever runs the model: the Backend protocol, and the choice of one."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from largebatch.section import Section, UserError

Precision = Literal["fp32", "fp64", "bf16", "fp16"]


class BackendConfig(Section):
    """How the model is run."""

    name: Literal["auto", "ddp"] = "auto"
    """Engine: ddp (one process or many); auto chooses it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device type; auto takes a GPU where there is one."""
    compile: bool = False
    """Compile the model with torch.compile."""
    squares_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which the tracked squares travel between ranks."""
    squares_every: Annotated[int, Field(ge=1)] = 1
    """Updates between two reductions of the tracked squares; between them they add up on each rank."""


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
    """Place of this process among the processes of the run, as torchrun names it."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1


def launched_ranks() -> Ranks:
    """Read this process's place from the environment that torchrun sets; one process without it.

    Raises:
        UserError: if a variable is missing or not a number.
    """
    if "WORLD_SIZE" not in os.environ:
        return Ranks()
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    try:
        rank, local_rank, world_size = (int(os.environ[name]) for name in names)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"environment: WORLD_SIZE is set, so RANK and LOCAL_RANK must be numbers too ({error}); start with torchrun"
        ) from error
    return Ranks(rank, local_rank, world_size)


class Backend(Protocol):
    """Prepare, accumulate, backward, step, save and load. The trainer never asks which engine it has.

    A loss handed to `backward` is this rank's share of the mean over the global batch: sum of its samples' losses over B.
    """

    rank: int
    world_size: int
    device: torch.device

    def describe(self) -> str:
        """Return engine, processes and devices in words."""
        ...

    def prepare(self, model: nn.Module) -> nn.Module:
        """Move the model to the device and wrap it; return what to call."""
        ...

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of a forward pass."""
        ...

    def accumulate(self, sync: bool) -> AbstractContextManager[Any]:
        """Return the context of one micro-batch's forward and backward pass; gradients are reduced where ``sync``."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this rank's share of the batch's mean loss."""
        ...

    def set_squares_due(self, due: bool) -> None:
        """Say whether tracked squares are reduced in the coming update, or add up on each rank."""
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

    def barrier(self) -> None:
        """Wait for every rank."""
        ...

    def save(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, extra: dict[str, Any]) -> None:
        """Write model, optimizer and ``extra`` to ``path``; every rank takes part."""
        ...

    def load(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Read what `save` wrote into model and optimizer; return ``extra``."""
        ...

    def close(self) -> None:
        """Leave the process group."""
        ...


def create_backend(config: BackendConfig, precision: Precision, ranks: Ranks) -> Backend:
    """Return the engine of a config for this process.

    Raises:
        UserError: if the device is not there.
    """
    from largebatch.distributed.ddp import DataParallel

    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("backend.device: expected a GPU for 'cuda', found none; use --backend.device cpu")
    use_cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    if use_cuda and ranks.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"torchrun: {ranks.local_rank + 1} processes or more on this node, but {torch.cuda.device_count()} GPUs; "
            f"use --nproc-per-node={torch.cuda.device_count()}"
        )
    device = torch.device("cuda", ranks.local_rank) if use_cuda else torch.device("cpu")
    return DataParallel(ranks, device, precision, config.compile, getattr(torch, config.squares_dtype))

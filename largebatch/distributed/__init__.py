"""Backends: the only rooms that speak torch.distributed."""

from largebatch.distributed.backend import (
    Backend,
    BackendConfig,
    NonFiniteError,
    Precision,
    Ranks,
    create_backend,
    launched_ranks,
)
from largebatch.distributed.saving import CheckpointWriter
from largebatch.distributed.watch import is_communication

__all__ = [
    "Backend",
    "BackendConfig",
    "CheckpointWriter",
    "NonFiniteError",
    "Precision",
    "Ranks",
    "create_backend",
    "is_communication",
    "launched_ranks",
]

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

__all__ = ["Backend", "BackendConfig", "NonFiniteError", "Precision", "Ranks", "create_backend", "launched_ranks"]

"""Distributed large-batch training: state hyper-parameters at a small batch, train at any batch size."""

from typing import TYPE_CHECKING, Any

from largebatch import scaling
from largebatch.scaling import Reference

if TYPE_CHECKING:
    from largebatch import optim
    from largebatch.moments import grad_sample_sq, track, verify
    from largebatch.optim import batch_size_invariant, param_groups

__all__ = ["Reference", "batch_size_invariant", "grad_sample_sq", "optim", "param_groups", "scaling", "track", "verify"]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import: only for whom it is for.
    from importlib import import_module

    if name == "optim":
        return import_module("largebatch.optim")
    if name in ("track", "grad_sample_sq", "verify"):
        return getattr(import_module("largebatch.moments"), name)
    if name in ("param_groups", "batch_size_invariant"):
        return getattr(import_module("largebatch.optim"), name)
    raise AttributeError(f"module 'largebatch' has no attribute {name!r}")

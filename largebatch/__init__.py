"""Distributed large-batch training: state hyper-parameters at a small batch, train at any batch size."""

from typing import TYPE_CHECKING, Any

from largebatch import scaling
from largebatch.scaling import Reference

if TYPE_CHECKING:
    from largebatch import moments, noise, optim
    from largebatch.moments import grad_sample_sq, track, verify
    from largebatch.optim import batch_size_invariant, param_groups

__all__ = [
    "Reference",
    "batch_size_invariant",
    "grad_sample_sq",
    "moments",
    "noise",
    "optim",
    "param_groups",
    "scaling",
    "track",
    "verify",
]

# torch takes seconds to import: only for whom it is for.
_ROOMS = ("moments", "noise", "optim")
_NAMES = {
    "batch_size_invariant": "optim",
    "grad_sample_sq": "moments",
    "param_groups": "optim",
    "track": "moments",
    "verify": "moments",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _ROOMS:
        return import_module(f"largebatch.{name}")
    if name in _NAMES:
        return getattr(import_module(f"largebatch.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'largebatch' has no attribute {name!r}")

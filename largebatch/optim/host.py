"""Batch sizes from the loop around an optimizer: given as numbers, by loaders, or by Accelerate's state."""

from __future__ import annotations

import operator
import sys
import warnings
from typing import Any

from torch.utils.data import DataLoader

from largebatch.errors import UserError


def samples(name: str, value: Any) -> int:
    """Return a value as a number of samples.

    Raises:
        UserError: if the value is not a whole number of at least 1.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise UserError(f"{name}: expected a whole number of samples, at least 1, got {value!r}")
    return number


def loader_size(loader: DataLoader[Any]) -> int:
    """Return the number of samples in a loader's batches; warn if the last batch of an epoch has fewer."""
    sampler: Any = getattr(loader, "batch_sampler", None)
    size = getattr(sampler, "batch_size", None) or getattr(loader, "batch_size", None)
    if isinstance(size, int) and getattr(sampler, "split_batches", False):  # Accelerate splits it over its processes
        size //= sampler.num_processes
    if not isinstance(size, int):
        raise UserError(
            f"micro_batch_size: expected a number of samples or a DataLoader with a batch size, got {loader!r}"
        )
    if not (getattr(loader, "drop_last", False) or getattr(sampler, "drop_last", False)):
        inner = getattr(sampler, "sampler", None)
        length = len(inner) if hasattr(inner, "__len__") else None  # type: ignore[arg-type]
        if length is None or length % size:
            rest = "a smaller number of" if length is None else f"{length % size} of {size}"
            warnings.warn(
                f"the loader's last batch of an epoch has {rest} samples and will be counted as {size}; expected "
                "drop_last=True, or `with optimizer.micro_batch(size):` around its backward pass",
                stacklevel=4,
            )
    return size


def warn_of_short_batches() -> None:
    """Warn if Accelerate's loader ends its data with a smaller batch; Python's filters limit how often it is shown."""
    state = getattr(sys.modules.get("accelerate.state"), "GradientState", None)
    if state is None or not state._shared_state:
        return
    host = state()
    if not host.end_of_dataloader or host.remainder <= 0:
        return
    if host.active_dataloader is not None and getattr(host.active_dataloader.batch_sampler, "even_batches", False):
        return  # Accelerate fills the last batch up
    warnings.warn(
        f"the last batch of the data had {host.remainder} samples and was counted as a full one; expected drop_last=True, or "
        "`with optimizer.micro_batch(size):` around its backward pass",
        stacklevel=5,
    )

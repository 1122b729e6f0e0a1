"""What a data set is here: two sets of samples, asked for a batch at a time, and the task they pose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from largebatch.data.sampler import SampleKeys
from largebatch.errors import UserError
from largebatch.section import Section, user_path
from largebatch.task import Task

Batch: TypeAlias = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, dict[int, str]]


@runtime_checkable
class Samples(Protocol):
    """A set of samples that hands out whole batches.

    The stock DataLoader calls ``__getitems__`` with whatever its ``batch_sampler`` yields, so an object of this kind
    works there with ``collate_fn`` the identity. What comes back depends on the seed and on each sample's own
    (epoch, index) alone, never on the other samples of the batch.
    """

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def __getitems__(self, keys: SampleKeys) -> Batch:
        """Return the batch (inputs (n, ...), targets (n, ...)).

        A set whose samples may turn out to be unreadable has ``may_miss = True``, and returns {row: why} besides where there
        are such; what stands in such a row is of the samples' shape and counts for nothing.
        """
        ...


def may_miss(samples: Samples) -> bool:
    """Return whether samples of a set may turn out to be unreadable."""
    return bool(getattr(samples, "may_miss", False))


def readable(batch: Batch) -> tuple[Tensor, Tensor, dict[int, str]]:
    """Return a batch without the rows that could not be read, and why they are not there.

    Where none is left, the first of them stands in, so that there is something to run a model on.
    """
    inputs, targets = batch[:2]
    missing = _checked(batch[2], len(targets)) if len(batch) == 3 else {}
    if missing:
        rows = torch.tensor([row for row in range(len(targets)) if row not in missing] or [0])
        inputs, targets = inputs.index_select(0, rows), targets.index_select(0, rows)
    return inputs, targets, missing


def _checked(missing: object, num_rows: int) -> dict[int, str]:
    """Return what a data set says of rows that cannot be read.

    Raises:
        UserError: if it is not {row: why}.
    """
    if not isinstance(missing, Mapping):
        raise UserError(
            f"data: beside inputs and targets a data set may return {{row: why}}, not a {type(missing).__name__}"
        )
    for row in missing:
        if not isinstance(row, int | np.integer) or isinstance(row, bool) or not 0 <= row < num_rows:
            raise UserError(
                f"data: {{row: why}} names rows 0 to {num_rows - 1} of the batch by whole numbers, not {row!r}"
            )
    return {int(row): str(why) or "unreadable" for row, why in missing.items()}


@dataclass(frozen=True)
class Source:
    """A data set, ready for training.

    Args:
        train: training samples; augmentation, if any, happens in here.
        val: validation samples, never augmented.
        task: what the samples ask of a model.
        notes: what the user should know of them, a line each.
    """

    train: Samples
    val: Samples
    task: Task
    notes: tuple[str, ...] = ()


class DataSection(Section):
    """What every section of a config that names a data set has."""

    def declared(self) -> tuple[int, Task] | None:
        """Return the number of training samples and the task, where they are known without the data; else None."""
        return None

    def load(self, seed: int) -> Source:
        """Return the data set.

        Args:
            seed: of the run; augmentation depends on it.

        Raises:
            UserError: if it cannot be had.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class TensorSamples:
    """Samples that lie in memory as they go into the model.

    Args:
        inputs: (N, ...).
        targets: (N, ...).
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def __getitems__(self, keys: SampleKeys) -> tuple[Tensor, Tensor]:
        """Return (inputs (n, ...), targets (n, ...)): two index_selects, nothing else."""
        chosen = torch.from_numpy(keys.indices)
        return self.inputs.index_select(0, chosen), self.targets.index_select(0, chosen)


def data_path(path: str) -> Path:
    """Return the path of a config's ``data.path``, with ``~`` expanded.

    Raises:
        UserError: if nothing lies there, or it cannot be looked at.
    """
    found = user_path(path, "data.path")
    if not found.exists():
        raise UserError(f"data.path: nothing lies at '{found}'; give the place of the data on this machine")
    return found


def validation_size(num_samples: int, fraction: float) -> int:
    """Return how many of ``num_samples`` are validation samples.

    Raises:
        UserError: if training or validation would be left without a sample.
    """
    num_val = round(num_samples * fraction)
    if not 0 < num_val < num_samples:
        raise UserError(
            f"data.val_fraction: {fraction} of {num_samples} samples leaves {num_samples - num_val} for training and "
            f"{num_val} for validation; both need at least 1"
        )
    return num_val


def limited(num_samples: int, limit: int | None) -> int:
    """Return the training samples to use when ``data.num_train`` is ``limit``.

    Raises:
        UserError: if the data set has fewer.
    """
    if limit is not None and limit > num_samples:
        raise UserError(f"data.num_train: {limit} samples asked for, the training set has {num_samples}")
    return num_samples if limit is None else limit


def fixed_order(num_samples: int) -> np.ndarray:
    """Return one shuffle of a data set, the same in every run whatever its seed, int64 (num_samples,)."""
    return np.random.default_rng(0).permutation(num_samples)

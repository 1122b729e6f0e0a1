"""The interface of a data set: training and validation samples, which are read batch by batch, and their task."""

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
    """A set of samples that returns whole batches.

    torch's DataLoader calls ``__getitems__`` with each value of its ``batch_sampler``, so it accepts such an object if its
    ``collate_fn`` is the identity. A sample depends only on the seed and its own (epoch, index), never on the other samples of
    the batch.
    """

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def __getitems__(self, keys: SampleKeys) -> Batch:
        """Return the batch (inputs (n, ...), targets (n, ...)).

        A set with samples that may be unreadable has ``may_miss = True``, and then also returns {row: why} for batches with
        unreadable samples. The values in such a row have the shape of a sample and are ignored.
        """
        ...


def may_miss(samples: Samples) -> bool:
    """Return whether a set may have unreadable samples."""
    return bool(getattr(samples, "may_miss", False))


def readable(batch: Batch) -> tuple[Tensor, Tensor, dict[int, str]]:
    """Return a batch without its unreadable rows, and the reasons why they are missing.

    If no row is left, the first row is kept as a placeholder, so that a model can be run.
    """
    inputs, targets = batch[:2]
    missing = _checked(batch[2], len(targets)) if len(batch) == 3 else {}
    if missing:
        rows = torch.tensor([row for row in range(len(targets)) if row not in missing] or [0])
        inputs, targets = inputs.index_select(0, rows), targets.index_select(0, rows)
    return inputs, targets, missing


def _checked(missing: object, num_rows: int) -> dict[int, str]:
    """Validate a data set's mapping of unreadable rows, and return it as a dict of ints to strings.

    Raises:
        UserError: if it is not of the form {row: why}.
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
        train: training samples; they apply any augmentation themselves.
        val: validation samples, never augmented.
        task: the task that a model learns on the samples.
        notes: messages to the user about the data, one line each.
    """

    train: Samples
    val: Samples
    task: Task
    notes: tuple[str, ...] = ()


class DataSection(Section):
    """Base class of the config sections for data sets."""

    def declared(self) -> tuple[int, Task] | None:
        """Return the number of training samples and the task, if they are known without the data; otherwise None."""
        return None

    def load(self, seed: int) -> Source:
        """Return the data set.

        Args:
            seed: seed of the run, on which augmentation depends.

        Raises:
            UserError: if it cannot be loaded.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class TensorSamples:
    """Samples in memory, in the form in which the model takes them.

    Args:
        inputs: (N, ...).
        targets: (N, ...).
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def __getitems__(self, keys: SampleKeys) -> tuple[Tensor, Tensor]:
        """Return (inputs (n, ...), targets (n, ...)), selected by two calls of index_select."""
        chosen = torch.from_numpy(keys.indices)
        return self.inputs.index_select(0, chosen), self.targets.index_select(0, chosen)


def data_path(path: str) -> Path:
    """Return the path of a config's ``data.path``, with ``~`` expanded.

    Raises:
        UserError: if the path does not exist or cannot be accessed.
    """
    found = user_path(path, "data.path")
    if not found.exists():
        raise UserError(f"data.path: nothing lies at '{found}'; give the place of the data on this machine")
    return found


def validation_size(num_samples: int, fraction: float) -> int:
    """Return the number of validation samples among ``num_samples``.

    Raises:
        UserError: if training or validation would have no sample.
    """
    num_val = round(num_samples * fraction)
    if not 0 < num_val < num_samples:
        raise UserError(
            f"data.val_fraction: {fraction} of {num_samples} samples leaves {num_samples - num_val} for training and "
            f"{num_val} for validation; both need at least 1"
        )
    return num_val


def limited(num_samples: int, limit: int | None) -> int:
    """Return the number of training samples to use if ``data.num_train`` is ``limit``.

    Raises:
        UserError: if the data set has fewer samples.
    """
    if limit is not None and limit > num_samples:
        raise UserError(f"data.num_train: {limit} samples asked for, the training set has {num_samples}")
    return num_samples if limit is None else limit


def fixed_order(num_samples: int) -> np.ndarray:
    """Return a permutation of a data set that does not depend on the run's seed, int64 (num_samples,)."""
    return np.random.default_rng(0).permutation(num_samples)

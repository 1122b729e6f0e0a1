"""User-defined data sets, by import path."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate

from largebatch.data.hashing import sample_hashes
from largebatch.data.sampler import SampleKeys
from largebatch.data.seeding import random_states_kept, seed_generators
from largebatch.data.source import DataSection, Samples, Source, TensorSamples
from largebatch.errors import UserError
from largebatch.process.own_code import process_kept
from largebatch.section import call_factory
from largebatch.task import Task


@dataclass(frozen=True)
class MapSamples:
    """An adapter that reads batches from an ordinary map-style data set.

    Python's, NumPy's and torch's global random states are seeded from (seed, epoch, index) before each sample and restored
    after the batch, so the random numbers of a transform depend only on the sample.

    Args:
        dataset: object with ``__len__`` and ``__getitem__(int) -> (input, target)``.
        seed: seed of the run.
    """

    dataset: Any
    seed: int

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: SampleKeys) -> tuple[Tensor, Tensor]:
        """Return the samples stacked by torch's default_collate.

        Raises:
            UserError: if a sample is not a pair, or if the samples cannot be stacked.
        """
        samples = []
        with random_states_kept():
            hashes = sample_hashes(self.seed, keys.epochs, keys.indices)
            for index, sample_seed in zip(keys.indices.tolist(), hashes.tolist(), strict=True):
                random.seed(sample_seed)
                np.random.seed(sample_seed & 0xFFFFFFFF)
                # Only the CPU generator: torch.manual_seed would also seed the generators of accelerators.
                torch.default_generator.manual_seed(sample_seed & 0x7FFFFFFFFFFFFFFF)
                sample = self.dataset[index]
                if not isinstance(sample, tuple | list) or len(sample) != 2:
                    raise UserError(
                        f"data.name: sample {index} of {type(self.dataset).__name__} should be a pair (input, target), "
                        f"it is of type {type(sample).__name__}"
                    )
                samples.append(sample)
        try:
            inputs, targets = default_collate(samples)
        except (RuntimeError, TypeError) as error:
            why = str(error).splitlines()[0]
            raise UserError(
                f"data.name: samples of {type(self.dataset).__name__} cannot be stacked to a batch: {why}"
            ) from error
        return inputs, targets


def as_samples(dataset: Any, seed: int) -> Samples:
    """Return a map-style data set as Samples; a TensorDataset of two tensors becomes TensorSamples, which are faster.

    Raises:
        UserError: if it has no ``__len__`` or no ``__getitem__``.
    """
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2:
        return TensorSamples(*dataset.tensors)
    for method in ("__len__", "__getitem__"):
        if not hasattr(dataset, method):
            raise UserError(f"data.name: the factory's data set, a {type(dataset).__name__}, has no {method}")
    return MapSamples(dataset, seed)


class FactoryData(DataSection):
    """A data set from a function of your own.

    The function is called as ``factory(**options)``, with an additional ``seed=`` if it has a parameter of that name. It
    returns either a ``largebatch.data.Source`` or ``(train, val, task)``: two map-style data sets, whose samples are pairs
    (input, target), and a ``largebatch.task.Task``.
    """

    name: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]
    """Import path of the function: package.module:factory."""

    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the function."""

    def load(self, seed: int) -> Source:
        """Seed Python, NumPy and torch, call the factory, and return its result with map-style data sets adapted.

        Raises:
            UserError: if it cannot be imported, does not accept the options, or returns something else or an empty set.
        """
        seed_generators(seed)
        with process_kept():
            result = call_factory(self.name, "data", self.options, {"seed": seed})
        if isinstance(result, tuple) and len(result) == 3 and isinstance(result[2], Task):
            train, val, task = result
            result = Source(as_samples(train, seed), as_samples(val, seed), task)
        if not isinstance(result, Source):
            raise UserError(
                f"data.name: '{self.name}' should return a Source or (train, val, Task), it returned a "
                f"{type(result).__name__}"
            )
        for half, samples in (("training", result.train), ("validation", result.val)):
            if not isinstance(samples, Samples):
                raise UserError(
                    f"data.name: the {half} set of '{self.name}' should have __len__ and __getitems__(SampleKeys), it "
                    f"is a {type(samples).__name__}; ordinary data sets are returned as (train, val, Task)"
                )
            if len(samples) == 0:
                raise UserError(f"data.name: the {half} set of '{self.name}' is empty")
            if isinstance(samples, TensorSamples):  # other sets are checked as they are read
                result.task.check(samples.targets, range(len(samples)), samples.inputs)
        return result

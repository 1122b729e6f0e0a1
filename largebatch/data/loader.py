"""The stock DataLoader over a plan's micro-batches."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader

from largebatch.data.sampler import PlanSampler, SampleKeys
from largebatch.data.source import Batch, Samples, readable
from largebatch.section import Section, UserError


class LoaderConfig(Section):
    """The data loader."""

    num_workers: Annotated[int, Field(ge=0)] = 0
    """Worker processes per rank; 0 loads in the training process."""
    prefetch: Annotated[int, Field(ge=1)] = 2
    """Micro-batches each worker holds ready."""


@dataclass(frozen=True)
class MicroBatch:
    """The samples of one forward and backward pass on one rank.

    Args:
        inputs: (n, ...) on the device.
        targets: (n, ...) on the device.
        num_samples: samples that count; 0 where an idle rank holds a stand-in so that it can take part in the reduction.
        first: place of the first of them in the update's batch.
        missing: samples that could not be read and are not among them: place among the planned ones -> what and why.
    """

    inputs: Tensor
    targets: Tensor
    num_samples: int
    first: int = 0
    missing: Mapping[int, str] = field(default_factory=dict)

    @property
    def places(self) -> slice:
        """Places in the update's batch of the samples that were planned."""
        return slice(self.first, self.first + self.num_samples + len(self.missing))

    def rows(self, places: Iterable[int]) -> list[int]:
        """Return the rows of some of the planned samples, named by place among them; none for those that are missing."""
        return [place - sum(gap < place for gap in self.missing) for place in places if place not in self.missing]


def _as_is(batch: Any) -> Any:
    return batch


def _leave_signals_to_the_rank(_: int) -> None:
    """Ignore, in a worker, what asks the run to stop: Slurm and Ctrl-C reach all processes, and the update needs its data.

    A worker whose rank is gone notices that by itself.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _data_loader(samples: Samples, batch_sampler: Any, config: LoaderConfig, device: torch.device) -> DataLoader[Any]:
    workers: dict[str, Any] = {}
    if config.num_workers:
        workers = {"prefetch_factor": config.prefetch, "worker_init_fn": _leave_signals_to_the_rank}
    return DataLoader(
        samples,  # type: ignore[arg-type]  # a Samples is fetched by __getitems__, with the keys its batch sampler yields
        batch_sampler=batch_sampler,
        num_workers=config.num_workers,
        collate_fn=_as_is,
        pin_memory=device.type == "cuda",
        **workers,
    )


def _micro_batch(
    batches: Iterator[Batch], planned: int, first: int, device: torch.device, dtype: torch.dtype
) -> MicroBatch:
    """Take the next batch, of so many samples (0: a stand-in), to the device; floating-point tensors in the model's dtype."""
    inputs, targets, missing = readable(_read(batches))

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype if tensor.is_floating_point() else None, non_blocking=True)

    missing = missing if planned else {}
    return MicroBatch(move(inputs), move(targets), planned - len(missing), first, missing)


def _read(batches: Iterator[Batch]) -> Batch:
    try:
        return next(batches)
    except UserError as error:
        # A worker's error arrives with its traceback in the message; the last line is what was raised.
        line = str(error).strip().splitlines()[-1]
        raise UserError(line.removeprefix(f"{UserError.__module__}.{UserError.__name__}: ")) from error


class TrainLoader:
    """Hands out a run's micro-batches, update by update.

    One stock DataLoader runs through the whole plan, so its workers prefetch across updates, epochs and changes of the
    batch size.

    Args:
        samples: the training set.
        sampler: which samples enter which micro-batch of this rank.
        config: workers and prefetch.
        device: where batches go.
        dtype: of floating-point inputs.
    """

    def __init__(
        self, samples: Samples, sampler: PlanSampler, config: LoaderConfig, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.sampler, self.device, self.dtype = sampler, device, dtype
        self.batches = iter(_data_loader(samples, sampler, config, device))

    def next(self, batch_size: int) -> Iterator[tuple[MicroBatch, bool]]:
        """Yield this rank's micro-batches of the next update, and whether each is the last.

        Args:
            batch_size: B of this update over all ranks, as the plan says.
        """
        pieces = self.sampler.pieces(batch_size)
        for number, piece in enumerate(pieces, start=1):
            size = piece.stop - piece.start
            yield _micro_batch(self.batches, size, piece.start, self.device, self.dtype), number == len(pieces)


def evaluation_batches(
    samples: Samples,
    batch_size: int,
    rank: int,
    world_size: int,
    config: LoaderConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[MicroBatch]:
    """Yield this rank's part of a data set, each sample on exactly one rank.

    Every rank gets equally many batches, as a sharded model's forward pass is a collective: where a rank's part runs out
    early, a stand-in of no samples.
    """
    mine, most = np.arange(len(samples))[rank::world_size], -(-len(samples) // world_size)
    parts = [mine[start : start + batch_size] for start in range(0, most, batch_size)]
    loaded = [part if len(part) else np.zeros(1, dtype=np.int64) for part in parts]
    keys = [SampleKeys(np.zeros(len(part), dtype=np.int64), part) for part in loaded]
    batches = iter(_data_loader(samples, keys, config, device))
    for part in parts:
        yield _micro_batch(batches, len(part), 0, device, dtype)


def samples_twice(
    samples: Samples, places: Iterable[int], config: LoaderConfig
) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """Yield samples one at a time, each read twice in a batch of two: (place, (inputs (2, ...), targets (2, ...))).

    They are read where the run reads: in a worker where it has some, as a file that was opened before a worker is
    forked may be of no use in it.
    """
    chosen = list(places)
    keys = [SampleKeys(np.zeros(2, dtype=np.int64), np.full(2, place)) for place in chosen]
    one = config.model_copy(update={"num_workers": min(1, config.num_workers), "prefetch": 1})
    batches = iter(_data_loader(samples, keys, one, torch.device("cpu")))
    for place in chosen:
        yield place, readable(_read(batches))[:2]

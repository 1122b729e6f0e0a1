"""Loading of a plan's micro-batches with torch's DataLoader."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from largebatch.data.sampler import PlanSampler, SampleKeys
from largebatch.data.source import Samples, readable
from largebatch.data.workers import Batches, Check, LoaderConfig, MicroBatch, NoWorkersError


class TrainLoader:
    """Loader of a run's micro-batches, update by update.

    A single DataLoader iterates over the whole plan, so its workers prefetch across updates, epochs and changes of the batch
    size.

    Args:
        samples: the training set.
        config: number of workers, and prefetching.
        device: device to which batches are moved.
        dtype: data type of floating-point inputs and targets.
        timeout_seconds: how long to wait for a batch from the workers.
        check: function like `Task.check`.
        known: function like `Task.known`, if samples may have no target to learn.
    """

    def __init__(
        self,
        samples: Samples,
        config: LoaderConfig,
        device: torch.device,
        dtype: torch.dtype,
        timeout_seconds: float,
        check: Check,
        known: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._create = partial(
            Batches,
            samples,
            config=config,
            device=device,
            dtype=dtype,
            timeout_seconds=timeout_seconds,
            check=check,
            known=known,
        )
        self._batches: Batches | None = None
        self._told = False

    def begin(self, sampler: PlanSampler) -> None:
        """Load the micro-batches of a sampler from now on."""
        self.close()
        self.sampler, self._batches = sampler, self._create(sampler)

    def next(self, batch_size: int) -> Iterator[tuple[MicroBatch, bool]]:
        """Yield this rank's micro-batches of the next update, each with whether it is the last one.

        Args:
            batch_size: B, the global batch size of this update in the plan.
        """
        assert self._batches is not None  # begun
        pieces = self.sampler.pieces(batch_size)
        for number, piece in enumerate(pieces, start=1):
            yield self._batches.next(piece.stop - piece.start, piece.start), number == len(pieces)

    def shortage(self) -> str | None:
        """Return, once, a warning that workers have no shared memory and send batches as bytes; otherwise None."""
        if self._told or self._batches is None or self._batches.shortage is None:
            return None
        self._told = True
        return (
            f"no shared memory for workers' batches ({self._batches.shortage}): they are sent as bytes, which takes longer; "
            "give /dev/shm more room (docker run --shm-size 8g), or set a lower loader.num_workers or loader.prefetch"
        )

    def close(self) -> None:
        """End the workers."""
        if self._batches is not None:
            self._batches.close()


def evaluation_batches(
    samples: Samples,
    batch_size: int,
    rank: int,
    world_size: int,
    config: LoaderConfig,
    device: torch.device,
    dtype: torch.dtype,
    timeout_seconds: float,
    check: Check,
) -> Generator[MicroBatch]:
    """Yield this rank's part of a data set in batches, each sample on exactly one rank.

    Every rank gets the same number of batches, because a sharded model's forward pass is a collective. A rank whose part ends
    early gets a placeholder that counts no samples. Close the generator, also after an exception, to end its workers.
    """
    mine, most = np.arange(len(samples))[rank::world_size], -(-len(samples) // world_size)
    parts = [mine[start : start + batch_size] for start in range(0, most, batch_size)]
    loaded = [part if len(part) else np.zeros(1, dtype=np.int64) for part in parts]
    keys = [SampleKeys(np.zeros(len(part), dtype=np.int64), part) for part in loaded]
    try:
        batches = Batches(samples, keys, config, device, dtype, timeout_seconds, check)
    except NoWorkersError:  # the training workers use up the resources
        alone = config.model_copy(update={"num_workers": 0})
        batches = Batches(samples, keys, alone, device, dtype, timeout_seconds, check)
    try:
        for part in parts:
            yield batches.next(len(part))
    finally:
        batches.close()


def samples_twice(
    samples: Samples, places: Iterable[int], config: LoaderConfig, check: Check
) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """Yield samples one at a time, each read twice in a batch of two: (place, (inputs (2, ...), targets (2, ...))).

    If the run uses workers, the samples are read in a worker too, because a file that was opened before a worker is forked may
    not be usable in it.
    """
    chosen = list(places)
    keys = [SampleKeys(np.zeros(2, dtype=np.int64), np.full(2, place)) for place in chosen]
    one = config.model_copy(update={"num_workers": min(1, config.num_workers), "prefetch": 1})
    batches = Batches(samples, keys, one, torch.device("cpu"), torch.float32, 600.0, check)
    try:
        for place in chosen:
            inputs, targets, missing = readable(batches.read())
            if not missing:
                yield place, (inputs, targets)
    finally:
        batches.close()

"""The samples of each update, a pure function of the seed, the samples seen and the batch size.

One random permutation per epoch is split over ranks (Goyal et al. 2017, remark 4). Sample number k of a run is entry k mod N
of the permutation of epoch k // N, so (seed, samples seen, batch size) determines an update's batch: the number of ranks, the
micro-batch size and the loader's workers change where a sample is computed, never which samples are used. A batch that extends
past the end of an epoch continues in the next one, so every epoch uses every sample once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class SampleKeys:
    """The keys by which a data set is asked for the samples of one micro-batch.

    Args:
        epochs: epoch in which each sample is drawn, int64 (n,); together with the index it determines the augmentation.
        indices: indices into the data set, int64 (n,).
    """

    epochs: np.ndarray
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, part: slice) -> SampleKeys:
        return SampleKeys(self.epochs[part], self.indices[part])


@lru_cache(maxsize=2)
def epoch_permutation(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """Return the order in which an epoch visits the data set, int64 (num_samples,)."""
    return np.random.default_rng([seed, epoch]).permutation(num_samples)


def global_batch(seed: int, num_samples: int, samples_seen: int, batch_size: int) -> SampleKeys:
    """Return the keys of the samples of one update over all ranks, in order.

    Args:
        seed: seed of the run, >= 0.
        num_samples: N, number of samples in the data set.
        samples_seen: number of samples used by all earlier updates.
        batch_size: B, number of samples of this update.
    """
    epoch, offset = divmod(samples_seen, num_samples)
    epochs, indices = [], []
    left = batch_size
    while left > 0:
        part = epoch_permutation(seed, epoch, num_samples)[offset : offset + left]
        indices.append(part)
        epochs.append(np.full(len(part), epoch))
        left, epoch, offset = left - len(part), epoch + 1, 0
    if len(indices) == 1:
        return SampleKeys(epochs[0], indices[0])
    return SampleKeys(np.concatenate(epochs), np.concatenate(indices))


def rank_share(batch_size: int, rank: int, world_size: int, group_size: int = 1) -> slice:
    """Return the part of a global batch that one rank computes.

    Each rank takes a contiguous range of whole groups, and the first ranks take one more if the groups do not divide evenly. So
    the samples of a normalisation group (batch norm over a fixed number of samples) stay together on any number of ranks. A
    last, smaller group belongs to the last rank that has any samples.

    Args:
        batch_size: B, number of samples of the update over all ranks.
        rank: this rank, in [0, world_size).
        world_size: number of ranks.
        group_size: number of samples that must stay together.
    """
    num_groups = -(-batch_size // group_size)
    base, extra = divmod(num_groups, world_size)
    first = rank * base + min(rank, extra)
    last = first + base + (rank < extra)
    return slice(min(first * group_size, batch_size), min(last * group_size, batch_size))


def micro_batches(share: slice, micro_batch_size: int) -> list[slice]:
    """Split a rank's share of a batch into pieces for one forward and backward pass each.

    A rank without samples in this update gets one empty piece, because it must still take part in the reduction.
    """
    starts = range(share.start, share.stop, micro_batch_size)
    return [slice(start, min(start + micro_batch_size, share.stop)) for start in starts] or [slice(0, 0)]


def pieces_of_rank(
    batch_size: int,
    rank: int,
    world_size: int,
    micro_batch_size: int | None = None,
    group_size: int = 1,
    least_units: int = 1,
) -> list[slice]:
    """Split a rank's share of a batch into its micro-batches; one is empty only if the share is empty.

    The rank gets the wanted number of micro-batches, as even as whole groups allow, and more if they would be too large for one
    pass.

    Args:
        batch_size: B, number of samples of the update over all ranks.
        rank: this rank, in [0, world_size).
        world_size: number of ranks.
        micro_batch_size: largest number of samples in one forward pass on one rank; None for no bound.
        group_size: number of samples that must stay together.
        least_units: wanted number of micro-batches of the update over all ranks, if it has as many groups.
    """
    share = rank_share(batch_size, rank, world_size, group_size)
    length, wanted = share.stop - share.start, math.ceil(least_units / world_size)
    even = math.ceil(math.ceil(length / group_size) / wanted) * group_size
    if micro_batch_size is not None and micro_batch_size < even:
        return micro_batches(share, micro_batch_size)
    parts = (rank_share(length, number, wanted, group_size) for number in range(wanted))
    pieces = [slice(share.start + part.start, share.start + part.stop) for part in parts if part.stop > part.start]
    return pieces or [slice(0, 0)]


def largest_micro_batch(
    batch_size: int, world_size: int, micro_batch_size: int | None = None, group_size: int = 1, least_units: int = 1
) -> int:
    """Return the largest number of samples in one forward pass; see `pieces_of_rank`."""
    # No rank has a larger share than the first, whose first piece is its largest.
    piece = pieces_of_rank(batch_size, 0, world_size, micro_batch_size, group_size, least_units)[0]
    return piece.stop - piece.start


def smallest_micro_batch(
    batch_size: int, world_size: int, micro_batch_size: int | None = None, group_size: int = 1, least_units: int = 1
) -> int:
    """Return the smallest number of samples in one forward pass that is not empty; see `pieces_of_rank`."""
    cut = (micro_batch_size, group_size, least_units)
    pieces = (piece for rank in range(world_size) for piece in pieces_of_rank(batch_size, rank, world_size, *cut))
    return min(piece.stop - piece.start for piece in pieces if piece.stop > piece.start)


def evenly_spaced(batch_size: int, count: int, piece: slice) -> list[int]:
    """Return the positions, within a piece of a batch, of those of `count` evenly spaced samples of the batch that it contains.

    Because the order of a batch is random, these form a random subset, which does not depend on how the batch is split.
    """
    first = -(-(2 * piece.start * count - batch_size) // (2 * batch_size))
    chosen, number = [], max(0, first)
    while number < count and (place := (2 * number + 1) * batch_size // (2 * count)) < piece.stop:
        if place >= piece.start:
            chosen.append(place - piece.start)
        number += 1
    return chosen


@lru_cache(maxsize=64)  # called at every update, with a loop over all ranks
def effective_micro_batches(
    batch_size: int, world_size: int, micro_batch_size: int | None, group_size: int = 1, least_units: int = 1
) -> float:
    """Return 1 / sum(w^2) over the micro-batches of an update on all ranks, where w are their shares of the samples.

    This is the number of micro-batches if all have the same size, and replaces it in the estimate of a variance otherwise.
    """
    cut = (micro_batch_size, group_size, least_units)
    pieces = (piece for rank in range(world_size) for piece in pieces_of_rank(batch_size, rank, world_size, *cut))
    return batch_size**2 / sum((piece.stop - piece.start) ** 2 for piece in pieces)


class BatchSizes(Protocol):
    """The part of a plan that the sampler uses."""

    @property
    def most_samples(self) -> float:
        """Largest number of samples that the whole run uses; infinite if its end is not known."""
        ...

    def batch_size(self, samples_seen: int) -> int:
        """Return the global batch size of the update that starts after ``samples_seen`` samples."""
        ...


@dataclass(frozen=True)
class PlanSampler:
    """Batch sampler for torch's DataLoader: this rank's micro-batches of a whole run, update by update.

    Because the batch sizes come from the plan, the loader's workers prefetch across a change of the batch size.

    Args:
        plan: batch size as a function of the samples seen, and the largest number of samples of the run.
        num_samples: N, number of samples in the training set.
        seed: seed of the run.
        rank: this rank.
        world_size: number of ranks.
        micro_batch_size: largest number of samples in one forward pass on one rank; None for no bound.
        group_size: number of samples that must stay on one rank and in one micro-batch.
        samples_seen: number of samples seen at the start.
        units: function from an update's batch size to the wanted number of micro-batches over all ranks; None for one.
    """

    plan: BatchSizes
    num_samples: int
    seed: int
    rank: int = 0
    world_size: int = 1
    micro_batch_size: int | None = None
    group_size: int = 1
    samples_seen: int = 0
    units: Callable[[int], int] | None = None

    def _options(self, batch_size: int) -> tuple[int | None, int, int]:
        return self.micro_batch_size, self.group_size, 1 if self.units is None else self.units(batch_size)

    def num_units(self, batch_size: int) -> float:
        """Return the effective number of micro-batches of an update over all ranks; see `effective_micro_batches`."""
        return effective_micro_batches(batch_size, self.world_size, *self._options(batch_size))

    def pieces(self, batch_size: int) -> Sequence[slice]:
        """Return this rank's micro-batches of an update as slices of the global batch, the same number on every rank.

        A sharded model's forward and backward passes are collectives, so a rank that needs fewer gets empty ones at the end.
        """
        cut = self._options(batch_size)
        mine = pieces_of_rank(batch_size, self.rank, self.world_size, *cut)
        most = len(pieces_of_rank(batch_size, 0, self.world_size, *cut))  # no rank has a larger share than the first
        return mine + [slice(0, 0)] * (most - len(mine))

    def __iter__(self) -> Iterator[SampleKeys]:
        samples_seen = self.samples_seen
        while samples_seen < self.plan.most_samples:
            batch_size = self.plan.batch_size(samples_seen)
            keys = global_batch(self.seed, self.num_samples, samples_seen, batch_size)
            for piece in self.pieces(batch_size):
                # An idle rank loads one sample, which does not count in the loss.
                yield keys[piece] if piece.stop > piece.start else keys[0:1]
            samples_seen += batch_size

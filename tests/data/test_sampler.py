"""Which samples enter which update: coverage, independence of ranks and micro-batches, groups that stay together."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from largebatch.data.sampler import (
    PlanSampler,
    SampleKeys,
    epoch_permutation,
    evenly_spaced,
    global_batch,
    micro_batches,
    rank_share,
)


@dataclass(frozen=True)
class GrowingPlan:
    """Batch sizes 3, 5, 7, ... by the samples seen, up to a total that need not be a sum of them."""

    most_samples: int
    first: int = 3

    def batch_size(self, samples_seen: int) -> int:
        return min(self.first + 2 * (samples_seen // 20), self.most_samples - samples_seen)


def updates(sampler: PlanSampler) -> list[list[SampleKeys]]:
    """Group what a sampler yields by update, with the stand-ins of an idle rank left out."""
    stream = iter(sampler)
    seen, result = sampler.samples_seen, []
    while seen < sampler.plan.most_samples:
        batch_size = sampler.plan.batch_size(seen)
        pieces = sampler.pieces(batch_size)
        keys = [next(stream) for _ in pieces]
        for key, piece in zip(keys, pieces, strict=True):
            assert len(key) == max(1, piece.stop - piece.start)
        result.append([key for key, piece in zip(keys, pieces, strict=True) if piece.stop > piece.start])
        seen += batch_size
    assert next(stream, None) is None
    return result


@given(st.integers(0, 2**31), st.integers(1, 60), st.lists(st.integers(1, 150), min_size=1, max_size=12))
def test_every_epoch_uses_every_sample_once(seed, num_samples, batch_sizes):
    seen, epochs, indices = 0, [], []
    for batch_size in batch_sizes:
        keys = global_batch(seed, num_samples, seen, batch_size)
        assert len(keys) == batch_size
        epochs.append(keys.epochs)
        indices.append(keys.indices)
        seen += batch_size
    epoch_of, index_of = np.concatenate(epochs), np.concatenate(indices)
    np.testing.assert_array_equal(epoch_of, np.arange(seen) // num_samples)
    for epoch in range(seen // num_samples):
        assert sorted(index_of[epoch_of == epoch]) == list(range(num_samples))
    unfinished = index_of[epoch_of == seen // num_samples]
    assert len(set(unfinished)) == len(unfinished)


def test_the_order_differs_by_epoch_and_seed_and_nothing_else():
    order = epoch_permutation(1, 0, 100)
    np.testing.assert_array_equal(order, epoch_permutation(1, 0, 100))
    assert (order != epoch_permutation(1, 1, 100)).any()
    assert (order != epoch_permutation(2, 0, 100)).any()


def test_a_batch_reads_the_same_whatever_was_asked_before():
    whole = global_batch(5, 37, 0, 200)
    part = global_batch(5, 37, 60, 50)
    np.testing.assert_array_equal(part.indices, whole.indices[60:110])
    np.testing.assert_array_equal(part.epochs, whole.epochs[60:110])


@given(st.integers(0, 300), st.integers(1, 20), st.integers(1, 40))
def test_rank_shares_are_whole_groups_side_by_side(batch_size, world_size, group_size):
    shares = [rank_share(batch_size, rank, world_size, group_size) for rank in range(world_size)]
    assert [i for share in shares for i in range(share.start, share.stop)] == list(range(batch_size))
    busy = [share for share in shares if share.stop > share.start]
    assert all(share.start % group_size == 0 for share in busy)
    assert all(share.stop % group_size == 0 for share in busy[:-1])
    num_groups = [-(-(share.stop - share.start) // group_size) for share in shares]
    assert max(num_groups) - min(num_groups) <= 1


@given(st.integers(0, 50), st.integers(0, 100), st.integers(1, 40))
def test_micro_batches_cut_a_share_completely(start, length, size):
    pieces = micro_batches(slice(start, start + length), size)
    assert len(pieces) >= 1  # an idle rank takes part with an empty one
    assert [i for piece in pieces for i in range(piece.start, piece.stop)] == list(range(start, start + length))
    assert all(piece.stop - piece.start == size for piece in pieces[:-1])
    assert all(piece.stop - piece.start <= size for piece in pieces)


@settings(deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 120),
    st.integers(1, 5),
    st.one_of(st.none(), st.integers(1, 4)),
    st.integers(1, 4),
)
def test_an_update_holds_the_same_samples_on_any_ranks_and_micro_batches(
    num_samples, total, world_size, groups_per_micro_batch, group_size
):
    plan = GrowingPlan(total)
    micro = None if groups_per_micro_batch is None else groups_per_micro_batch * group_size
    by_rank = [
        updates(PlanSampler(plan, num_samples, 11, rank, world_size, micro, group_size)) for rank in range(world_size)
    ]
    seen = 0
    for number in range(len(by_rank[0])):
        batch_size = plan.batch_size(seen)
        expected = global_batch(11, num_samples, seen, batch_size)
        pieces = [key for rank in by_rank for key in rank[number]]
        np.testing.assert_array_equal(np.concatenate([key.indices for key in pieces]), expected.indices)
        np.testing.assert_array_equal(np.concatenate([key.epochs for key in pieces]), expected.epochs)
        # Only the very last piece may hold a group that is not whole.
        assert all(len(key) % group_size == 0 for key in pieces[:-1])
        seen += batch_size
    assert seen == total


def test_a_sampler_resumes_in_the_middle_of_a_run():
    plan = GrowingPlan(100)
    whole = updates(PlanSampler(plan, 17, 3, micro_batch_size=2))
    seen = sum(plan.first for _ in range(3))
    resumed = updates(PlanSampler(plan, 17, 3, micro_batch_size=2, samples_seen=seen))
    for ours, theirs in zip(resumed, whole[3:], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a.indices, b.indices)


@given(st.integers(1, 300), st.integers(1, 9), st.one_of(st.none(), st.integers(1, 40)), st.integers(1, 8))
def test_every_rank_takes_part_in_equally_many_passes(batch_size, world_size, micro, group):
    """Those of a sharded model are collectives: where one rank had fewer, the others would wait for it for good."""
    micro = micro and micro * group
    ranks = [PlanSampler(GrowingPlan(1000), 1000, 0, rank, world_size, micro, group) for rank in range(world_size)]
    pieces = [sampler.pieces(batch_size) for sampler in ranks]
    assert len({len(of_rank) for of_rank in pieces}) == 1
    covered = [number for of_rank in pieces for piece in of_rank for number in range(piece.start, piece.stop)]
    assert covered == list(range(batch_size))


def test_an_idle_rank_gets_a_stand_in():
    plan = GrowingPlan(3)
    keys = list(PlanSampler(plan, 10, 0, rank=3, world_size=4))
    assert [len(key) for key in keys] == [1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_stock_loader_hands_keys_to_getitems(num_workers):
    sampler = PlanSampler(GrowingPlan(60), 10, 0, micro_batch_size=2)
    loader = DataLoader(_Echo(), batch_sampler=sampler, num_workers=num_workers, collate_fn=_identity)
    for got, expected in zip(loader, sampler, strict=True):
        np.testing.assert_array_equal(got.indices, expected.indices)


class _Echo:
    def __getitems__(self, keys: SampleKeys) -> SampleKeys:
        return keys


def _identity(batch):
    return batch


@pytest.mark.parametrize(("batch_size", "count"), [(1, 1), (7, 3), (200, 16), (256, 16), (97, 96), (64, 64), (1000, 1)])
@pytest.mark.parametrize("micro_size", [1, 3, 16, 64, 1000])
def test_evenly_spaced_samples_are_the_same_however_a_batch_is_cut(batch_size, count, micro_size):
    pieces = [slice(first, min(first + micro_size, batch_size)) for first in range(0, batch_size, micro_size)]
    found = [piece.start + place for piece in pieces for place in evenly_spaced(batch_size, count, piece)]
    assert found == [(2 * i + 1) * batch_size // (2 * count) for i in range(count)]
    assert len(set(found)) == count and max(np.diff([*found, batch_size + found[0]])) <= math.ceil(batch_size / count)
    assert evenly_spaced(batch_size, count, slice(0, 0)) == []

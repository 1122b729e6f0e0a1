"""`batch_size_invariant` on several ranks: DistributedDataParallel and averages by hand, against the loop by hand in float64."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from loops import BY_HAND, EXACT, MAKERS, build, by_hand, data, mean_loss, ours, weights
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from largebatch import batch_size_invariant
from largebatch.errors import UserError

MICRO = 3


def units_of(count, world_size, update):
    """Return the units of an update: those of rank 0, then of rank 1, ..."""
    first = (update * MICRO * count * world_size) % (48 - MICRO * count * world_size)
    return [slice(first + MICRO * k, first + MICRO * (k + 1)) for k in range(count * world_size)]


def train(rank, world_size, name, count, clip, way):
    """Train on this rank's units; return the weights and the batch size counted."""
    model, (inputs, targets) = build(), data()
    if way == "before":  # the optimizer before the wrapper
        optimizer = batch_size_invariant(
            MAKERS[name](model.parameters()), reference_batch_size=2, micro_batch_size=MICRO
        )
    options = {"gradient_as_bucket_view": way != "before", "static_graph": way == "static", "bucket_cap_mb": 1e-5}
    wrapped = nn.Module() if way == "by hand" else DistributedDataParallel(model, **options)
    if way != "before":
        optimizer = batch_size_invariant(
            MAKERS[name](model.parameters()), reference_batch_size=2, micro_batch_size=MICRO
        )
    for update in range(8):
        mine = units_of(count, world_size, update)[rank * count : (rank + 1) * count]
        for index, u in enumerate(mine):
            waits = index < count - 1 and way not in ("every pass", "by hand")
            with wrapped.no_sync() if waits else nullcontext():
                network = model if way == "by hand" else wrapped
                (mean_loss(network, inputs[u], targets[u]) / count).backward()
        if way == "by hand":
            for p in model.parameters():
                dist.all_reduce(p.grad)
                p.grad /= world_size
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.samples_seen == 8 * optimizer.batch_size
    del wrapped
    return weights(model), optimizer.batch_size


@pytest.mark.parametrize("way", ["before", "after", "every pass", "static", "by hand"])
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_are_the_loop_by_hand(rank_pool, world_size, count, way):
    if way == "static" and count > 1:
        pytest.skip("a static graph is reduced at every pass")
    clip = 0.5 if count == 4 else None
    results = rank_pool(world_size, train, "adamw", count, clip, way)
    expected = by_hand("adamw", [units_of(count, world_size, k) for k in range(8)], 2, clip)
    for found, batch_size in results:
        torch.testing.assert_close(found, expected, **EXACT)
        assert torch.equal(found, results[0][0]) and batch_size == MICRO * count * world_size


@pytest.mark.parametrize("name", [name for name in BY_HAND if name != "adamw"])
def test_every_optimizer_on_two_ranks(rank_pool, name):
    expected = by_hand(name, [units_of(2, 2, k) for k in range(8)], 2, 0.5)
    for found, _ in rank_pool(2, train, name, 2, 0.5, "after"):
        torch.testing.assert_close(found, expected, **EXACT)


def test_other_ranks_go_on_where_two_stopped(rank_pool, tmp_path):
    """Two ranks of one unit each, and one rank of two: the same units in the same order."""
    updates = [units_of(1, 2, k) for k in range(8)]
    whole, _ = ours("adamw", updates, 2, MICRO)
    rank_pool(2, save_after_four, str(tmp_path / "saved.pt"))
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    model, (inputs, targets) = build(seed=5), data()
    model.load_state_dict(saved["model"])
    optimizer = batch_size_invariant(
        MAKERS["adamw"](model.parameters()), reference_batch_size=2, micro_batch_size=MICRO
    )
    optimizer.load_state_dict(saved["optimizer"])
    for units in updates[4:]:
        for u in units:
            (mean_loss(model, inputs[u], targets[u]) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(weights(model), whole, **EXACT)


def save_after_four(rank, world_size, path):
    model, (inputs, targets) = build(), data()
    optimizer = batch_size_invariant(
        MAKERS["adamw"](model.parameters()), reference_batch_size=2, micro_batch_size=MICRO
    )
    wrapped = DistributedDataParallel(model)
    for update in range(4):
        u = units_of(1, 2, update)[rank]
        mean_loss(wrapped, inputs[u], targets[u]).backward()
        optimizer.step()
        optimizer.zero_grad()
    if rank == 0:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    del wrapped


def unused(rank, world_size):
    torch.manual_seed(0)
    model = Experts()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = batch_size_invariant(
        torch.optim.AdamW(model.parameters(), 0.01), reference_batch_size=1, micro_batch_size=4
    )
    inputs, _ = data()
    for update in range(4):
        wrapped(inputs[4 * (rank + update) :][:4], (rank + update) % 2).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    del wrapped
    return weights(model)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 3) for _ in range(3)).double()

    def forward(self, inputs, index):
        return self.layers[index](inputs)


def test_parameters_that_only_some_ranks_use(rank_pool):
    torch.manual_seed(0)
    model = Experts()
    optimizer = batch_size_invariant(
        torch.optim.AdamW(model.parameters(), 0.01), reference_batch_size=1, micro_batch_size=4
    )
    inputs, _ = data()
    for update in range(4):
        for rank in range(2):
            (model(inputs[4 * (rank + update) :][:4], (rank + update) % 2).square().mean() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    for found in rank_pool(2, unused):
        torch.testing.assert_close(found, weights(model), **EXACT)


def uneven(rank, world_size):
    """Rank 0 has two micro-batches and rank 1 one of another size; gradients are the mean over all samples."""
    model, (inputs, targets) = build(), data()
    wrapped = DistributedDataParallel(model)
    optimizer = batch_size_invariant(MAKERS["adamw"](model.parameters()), reference_batch_size=2, micro_batch_size=4)
    for start in range(6):
        mine = [slice(start, start + 4), slice(start + 4, start + 8)] if rank == 0 else [slice(start + 8, start + 11)]
        for index, u in enumerate(mine):
            size = u.stop - u.start
            with wrapped.no_sync() if index < len(mine) - 1 else nullcontext(), optimizer.micro_batch(size):
                (mean_loss(wrapped, inputs[u], targets[u]) * size * world_size / 11).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.batch_size == 11
    del wrapped
    return weights(model)


def test_uneven_ranks_with_announced_sizes(rank_pool):
    updates = [[slice(k, k + 4), slice(k + 4, k + 8), slice(k + 8, k + 11)] for k in range(6)]
    expected = by_hand("adamw", updates, 2)
    for found in rank_pool(2, uneven):
        torch.testing.assert_close(found, expected, **EXACT)


def in_groups(rank, world_size):
    """Two pairs of replicas with models of different sizes, as in a pipeline."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    stage = rank // 2
    torch.manual_seed(stage)
    model = nn.Linear(5, 2 + stage).double()
    wrapped = DistributedDataParallel(model, process_group=groups[stage])
    params = [*model.parameters()]
    common = {"reference_batch_size": 2, "micro_batch_size": 4}
    message = ""
    try:
        wrong = batch_size_invariant(torch.optim.AdamW(params), **common)
        wrapped(torch.ones(4, 5).double()).sum().backward()
        wrong.step()
    except UserError as error:
        message = str(error)
        wrong.zero_grad()
    optimizer = batch_size_invariant(torch.optim.AdamW(params, 0.01), **common, process_group=groups[stage])
    for update in range(3):
        generator = torch.Generator().manual_seed(10 * update + rank % 2)
        wrapped(torch.randn(4, 5, generator=generator, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    del wrapped
    return weights(model), optimizer.batch_size, message


def test_the_data_parallel_ranks_are_those_of_process_group(rank_pool):
    results = rank_pool(4, in_groups)
    for rank, (found, batch_size, message) in enumerate(results):
        assert torch.equal(found, results[rank // 2 * 2][0]) and batch_size == 8
        assert "their elements: expected the same on every data-parallel rank, got [12, 12, 18, 18] by rank" in message


def not_averaged(rank, world_size):
    model, (inputs, targets) = build(), data()
    optimizer = batch_size_invariant(MAKERS["adamw"](model.parameters()), reference_batch_size=2, micro_batch_size=4)
    mean_loss(model, inputs[4 * rank :][:4], targets[4 * rank :][:4]).backward()
    with pytest.raises(UserError, match="average gradients over the ranks of process_group"):
        optimizer.step()


def test_gradients_that_no_one_averaged_are_an_error(rank_pool):
    rank_pool(2, not_averaged)


def sharded(rank, world_size):
    from torch.distributed.fsdp import fully_shard

    model = build()
    mesh = dist.init_device_mesh("cpu", (world_size,))
    fully_shard(model, mesh=mesh)
    with pytest.raises(UserError, match=r"is a DTensor; expected .* use the trainer's engines"):
        batch_size_invariant(torch.optim.AdamW(model.parameters()), reference_batch_size=2, micro_batch_size=4)


def test_sharded_parameters_are_refused_by_name(rank_pool):
    rank_pool(2, sharded)

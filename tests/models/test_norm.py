"""Batch norm over groups of samples against torch's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from largebatch.errors import UserError
from largebatch.models import (
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    GhostBatchNorm3d,
    batch_norms,
    commit_batch_statistics,
    convert_batch_norm,
    norm_group_size,
)


def alone(flat: torch.Tensor) -> torch.Tensor:
    """The sum over the ranks of a run on one rank."""
    return flat


# Batch norm over groups of samples

SHAPES = {"1d": (6,), "1d long": (6, 5), "2d": (6, 4, 3), "3d": (6, 2, 4, 3)}


def make_pair(shape, group_size):
    """A grouped norm and torch's, with the same random parameters, float64."""
    torch.manual_seed(0)
    kinds = {3: (nn.BatchNorm2d, GhostBatchNorm2d), 4: (nn.BatchNorm3d, GhostBatchNorm3d)}
    plain, grouped = kinds.get(len(shape), (nn.BatchNorm1d, GhostBatchNorm1d))
    reference = plain(6).double()
    with torch.no_grad():
        reference.weight.normal_()
        reference.bias.normal_()
        reference.running_mean.normal_()
        reference.running_var.uniform_(0.5, 2)
    ghost = grouped(6, group_size).double()
    ghost.load_state_dict(reference.state_dict())  # the names are torch's
    return ghost, reference


@pytest.mark.parametrize("num", [8, 24, 29, 5])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_group_by_group_it_is_torchs_batch_norm(shape, num):
    ghost, reference = make_pair(shape, 8)
    ours = (torch.randn(num, *shape, dtype=torch.float64) * 3 + 1).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    upstream = torch.randn_like(ours)
    got = ghost(ours)
    expected = torch.cat([reference(theirs[start : start + 8]) for start in range(0, num, 8)])
    got.backward(upstream)
    expected.backward(upstream)
    # The same kernel on the same groups; gradients of the parameters are summed over groups in another order.
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(ghost.weight.grad, reference.weight.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(ghost.bias.grad, reference.bias.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_evaluation_is_torchs(shape):
    ghost, reference = make_pair(shape, 8)
    inputs = torch.randn(11, *shape, dtype=torch.float64)
    assert torch.equal(ghost.eval()(inputs), reference.eval()(inputs))


def test_one_group_an_update_moves_the_running_statistics_as_torch_does():
    ghost, reference = make_pair((6, 4, 3), 8)
    for _ in range(3):
        inputs = torch.randn(8, 6, 4, 3, dtype=torch.float64) * 2 + 1
        ghost(inputs)
        reference(inputs)
        commit_batch_statistics([ghost], alone)
    torch.testing.assert_close(ghost.running_mean, reference.running_mean, rtol=0, atol=1e-14)
    torch.testing.assert_close(ghost.running_var, reference.running_var, rtol=0, atol=1e-14)
    assert ghost.num_batches_tracked == reference.num_batches_tracked == 3


def test_running_statistics_average_the_groups_by_their_samples():
    ghost, _ = make_pair((6, 4, 3), 8)
    old_mean, old_var = ghost.running_mean.clone(), ghost.running_var.clone()
    inputs = torch.randn(21, 6, 4, 3, dtype=torch.float64)
    ghost(inputs)
    assert torch.equal(ghost.running_mean, old_mean)  # nothing moves before the commit
    commit_batch_statistics([ghost], alone)
    groups = inputs.split(8)
    mean = sum(len(group) * group.mean((0, 2, 3)) for group in groups) / 21
    var = sum(len(group) * group.var((0, 2, 3), correction=1) for group in groups) / 21
    torch.testing.assert_close(ghost.running_mean, 0.9 * old_mean + 0.1 * mean, rtol=0, atol=1e-14)
    torch.testing.assert_close(ghost.running_var, 0.9 * old_var + 0.1 * var, rtol=0, atol=1e-14)
    assert ghost.num_batches_tracked == 1


def two_norms() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), GhostBatchNorm2d(6, 4), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5), GhostBatchNorm1d(5, 4)
    ).double()


def all_reduce(ranks: list[nn.Module]) -> torch.Tensor:
    """Return the sum of what the ranks would hand to the reduction, leaving them as they are."""
    flats: list[torch.Tensor] = []
    for model in ranks:
        commit_batch_statistics(batch_norms(copy.deepcopy(model)), lambda flat: flats.append(flat) or flat)
    assert all(flat.dtype == torch.float64 and flat.shape == (2 * 6 + 1 + 2 * 5 + 1,) for flat in flats)
    return sum(flats)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("micro_batch_size", [4, 8, 100])
def test_running_statistics_do_not_depend_on_ranks_and_micro_batches(world_size, micro_batch_size):
    from largebatch.data.sampler import micro_batches, rank_share

    batches = torch.randn(2, 14, 3, 4, 4, dtype=torch.float64)
    reference = two_norms()
    ranks = [copy.deepcopy(reference) for _ in range(world_size)]
    for batch in batches:
        reference(batch)
        commit_batch_statistics(batch_norms(reference), alone)
        shares = [rank_share(14, rank, world_size, norm_group_size(reference)) for rank in range(world_size)]
        idle = [share.stop == share.start for share in shares]
        for rank, model in enumerate(ranks):
            for piece in micro_batches(shares[rank], micro_batch_size):
                if idle[rank]:
                    model.eval()(batch[:1])  # an idle rank runs a stand-in, out of training mode
                else:
                    model.train()(batch[piece])
        total = all_reduce(ranks)
        for model in ranks:
            commit_batch_statistics(batch_norms(model), lambda flat, total=total: total)
    for model in ranks:
        for name, value in reference.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=1e-13)  # order of float64 sums


def test_an_update_without_a_sample_anywhere_moves_nothing():
    ghost, _ = make_pair((6, 4, 3), 8)
    before = ghost.running_mean.clone()
    commit_batch_statistics([ghost], alone)
    assert torch.equal(ghost.running_mean, before)


def test_a_single_value_comes_out_as_the_bias_and_does_not_count():
    ghost, _ = make_pair((6,), 4)
    inputs = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    outputs = ghost(inputs)
    assert torch.equal(outputs[4], ghost.bias)
    outputs.square().sum().backward()
    assert torch.isfinite(inputs.grad).all() and (inputs.grad[4] == 0).all()
    old = ghost.running_mean.clone()
    commit_batch_statistics([ghost], alone)
    expected = 0.9 * old + 0.1 * inputs[:4].mean(0)
    torch.testing.assert_close(ghost.running_mean, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("num", [32, 96])
def test_bfloat16_autocast_keeps_float32_statistics(num):
    torch.manual_seed(0)
    ghost = GhostBatchNorm2d(16, 32)
    inputs = (torch.randn(num, 16, 6, 6) + 3).to(torch.bfloat16).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = ghost(inputs)
    outputs.float().square().sum().backward()
    assert outputs.dtype == torch.bfloat16 and inputs.grad is not None
    commit_batch_statistics([ghost], alone)
    assert ghost.running_mean.dtype == torch.float32
    groups = inputs.detach().double().split(32)
    mean = 0.1 * torch.stack([group.mean((0, 2, 3)) for group in groups]).mean(0)
    # float32 sums: bfloat16 ones would be off by 2**-9 of 0.3.
    torch.testing.assert_close(ghost.running_mean.double(), mean, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("num", [32, 72])
def test_channels_last_stays_and_agrees(num):
    torch.manual_seed(0)
    inputs = torch.randn(num, 8, 5, 5, dtype=torch.float64)
    ghost = GhostBatchNorm2d(8, 32).double()
    outputs = ghost(inputs.to(memory_format=torch.channels_last))
    assert outputs.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(outputs, ghost(inputs), rtol=0, atol=1e-12)  # order of float64 sums


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("followed", [False, True], ids=["last", "followed"])
def test_activation_checkpointing_does_not_move_the_average(followed, use_reentrant):
    ghost, _ = make_pair((6, 4, 3), 8)
    plain = copy.deepcopy(ghost)
    inputs = torch.randn(2, 16, 6, 4, 3, dtype=torch.float64, requires_grad=True)
    region = nn.Sequential(ghost, nn.GELU()) if followed else ghost
    for micro_batch in inputs:
        checkpoint(region, micro_batch, use_reentrant=use_reentrant).square().sum().backward()
        plain(micro_batch)
    for norm in (ghost, plain):
        commit_batch_statistics([norm], alone)
    torch.testing.assert_close(ghost.running_var, plain.running_var, rtol=0, atol=1e-14)


def test_several_forwards_before_one_backward():
    ghost, _ = make_pair((6, 4, 3), 8)
    parts = torch.randn(3, 16, 6, 4, 3, dtype=torch.float64, requires_grad=True)
    sum(ghost(part).square().sum() for part in parts).backward()
    assert torch.isfinite(parts.grad).all()


def test_the_input_must_have_the_right_dimensions():
    with pytest.raises(ValueError, match="GhostBatchNorm2d expects an input of 4 dimensions, got 2"):
        GhostBatchNorm2d(6)(torch.randn(4, 6))
    with pytest.raises(ValueError, match="group_size must be at least 1"):
        GhostBatchNorm1d(6, 0)


def test_the_group_sizes_of_a_model_have_one_multiple():
    assert norm_group_size(nn.Linear(2, 2)) == 1
    assert norm_group_size(nn.Sequential(GhostBatchNorm1d(3, 6), GhostBatchNorm1d(3, 4))) == 12


# Conversion


def test_conversion_keeps_the_model():
    torch.manual_seed(0)
    shared = nn.BatchNorm2d(4, eps=1e-3, momentum=0.2)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), shared, nn.Sequential(shared), nn.Flatten(), nn.Linear(16, 6))
    model.append(nn.BatchNorm1d(6))
    model(torch.randn(20, 3, 4, 4))
    weights = dict(model.named_parameters())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    plain = copy.deepcopy(model)
    assert convert_batch_norm(model, 16) is model
    assert type(model[1]) is GhostBatchNorm2d and type(model[5]) is GhostBatchNorm1d
    assert model[1] is model[2][0] and (model[1].eps, model[1].momentum) == (1e-3, 0.2)
    assert all(parameter is weights[name] for name, parameter in model.named_parameters())
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    inputs = torch.randn(5, 3, 4, 4)
    assert torch.equal(model.eval()(inputs), plain.eval()(inputs))
    assert isinstance(convert_batch_norm(nn.BatchNorm1d(3), 2), GhostBatchNorm1d)
    assert isinstance(convert_batch_norm(nn.BatchNorm3d(3), 2), GhostBatchNorm3d)


class ActivatedNorm(nn.BatchNorm2d):
    def forward(self, inputs):
        return super().forward(inputs).relu()


@pytest.mark.parametrize(
    "norm",
    [
        nn.SyncBatchNorm(3),
        nn.BatchNorm2d(3, affine=False),
        nn.BatchNorm2d(3, track_running_stats=False),
        ActivatedNorm(3),
    ],
    ids=["3d", "no affine", "no statistics", "subclass"],
)
def test_a_batch_norm_that_cannot_be_converted_is_named(norm):
    model = nn.Sequential(nn.Identity(), nn.Sequential(norm))
    with pytest.raises(UserError, match=r"model\.norm_group_size: module '1\.0', \w+\(3.*; null leaves"):
        convert_batch_norm(model, 32)

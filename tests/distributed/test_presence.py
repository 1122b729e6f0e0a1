"""Squares that are missing beside a gradient, told from squares that are too small for their type."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from largebatch.distributed import BackendConfig, Ranks, create_backend
from largebatch.distributed.presence import FirstUpdates, check_statistics
from largebatch.errors import UserError
from largebatch.moments import shadows, track
from largebatch.optim import AdamW, param_groups

N = 4


class Branches(nn.Module):
    """A layer that is followed, and one that `outside` uses behind the tracked module's back."""

    def __init__(self):
        super().__init__()
        self.seen, self.outside = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        return self.seen(x)


def build(per="sample", dtype=torch.float32):
    torch.manual_seed(0)
    return track(Branches().to(dtype), per=per)


def inputs(dtype=torch.float32):
    return torch.randn(N, 3, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("per", ["sample", "micro_batch"])
@pytest.mark.parametrize("size", [1e-15, 1e-20, 1e-22, 1e-24, 1e-30, 1e-38])
def test_a_gradient_whose_square_is_too_small_is_no_absence(per, size):
    model = build(per)
    (model(inputs()).sum() * size).backward()
    left = check_statistics(model, N)
    assert {"outside.weight", "outside.bias"} <= set(left)  # no gradient says nothing
    assert ("seen.weight" in left) == (size < 1e-22)  # below it the squares are zero


@pytest.mark.parametrize("size", [1.0, 1e-15, 1e-24, 1e-35])
def test_an_operation_that_nobody_saw_is_refused_whatever_its_gradient(size):
    model = build()
    x = inputs()
    ((model(x) + x @ model.outside.weight.t()).sum() * size).backward()
    with pytest.raises(UserError, match=r"no second-moment statistic for 'outside\.weight'"):
        check_statistics(model, N)


@pytest.mark.parametrize(
    ("dtype", "floor"), [(torch.float32, 1.1e-19), (torch.bfloat16, 1.1e-19), (torch.float64, 1.5e-154)]
)
@pytest.mark.parametrize("num_units", [1, 64])
def test_squares_of_zero_are_an_absence_from_the_size_on_that_cannot_vanish(dtype, floor, num_units):
    """As an engine leaves them that fills in zeros."""
    model = build(dtype=dtype)
    for shadow in shadows(model).values():
        shadow.grad = torch.zeros_like(shadow)
    weight = model.outside.weight
    weight.grad = torch.zeros_like(weight)
    weight.grad[1, 2] = -num_units * floor * 0.9
    assert "outside.weight" in check_statistics(model, num_units)
    weight.grad[1, 2] = -num_units * floor * 1.1
    with pytest.raises(UserError, match=r"'outside\.weight'"):
        check_statistics(model, num_units)


def test_gradients_that_are_not_finite_are_no_absence():
    model = build()
    (model(inputs()).sum() * float("nan")).backward()
    assert "seen.weight" not in check_statistics(model, N)


def test_half_precision_squares_in_float32():
    """A gradient of 1e-4, whose square is zero in float16."""
    model = build(dtype=torch.float16)
    (model(inputs(torch.float16)).float().sum() * 1e-4).half().backward()
    left = check_statistics(model, N)
    assert "seen.weight" not in left
    assert float(model.seen.bias_grad_sq.grad[0]) == pytest.approx(N * 1e-8, rel=0.01)


def test_what_is_left_is_looked_at_in_updates_1_2_4_8_until_it_is_known():
    asked = []

    def check(names):
        asked.append(names)
        return ["b"] if len(asked) < 4 else []

    checks = FirstUpdates()
    for update in range(1, 40):
        before = len(asked)
        checks(check)
        assert (len(asked) > before) == (update in (1, 2, 4, 8))
    assert asked == [None, ["b"], ["b"], ["b"]] and checks.names == []


def absent_on_two_ranks(rank, world_size, engine, size):
    """Return what is left after an update of tiny gradients and after one of size `size`, and whether all went well."""
    backend = create_backend(BackendConfig(device="cpu", name=engine), "fp32", Ranks(rank, rank, world_size))
    model = Dimmed()
    backend.track(model, "sample")
    called, optimizer = backend.prepare(model, lambda m: AdamW(param_groups(m), lr=1e-3, reference_batch_size=2))
    x = inputs()[rank::world_size]
    left, message = [], ""
    for scale in (1e-25, size):
        backend.begin_update(N, N, 0)
        model.head_scale = scale
        with backend.accumulate(sync=True):
            backend.backward(called(x).sum() / N)
        try:
            left.append(backend.check_statistics(model, N, left[0] if left else None))
        except UserError as error:
            message = str(error)
        optimizer.set_batch(N, N, world_size)
        backend.step(optimizer)
    finite = all(bool(value.isfinite().all()) for value in backend.state(model, optimizer).values())
    backend.close()
    return left, message, finite


class Dimmed(nn.Module):
    """A layer whose gradients are as large as `head_scale`."""

    def __init__(self):
        super().__init__()
        self.layer, self.head_scale = nn.Linear(3, 2), 1.0

    def forward(self, x):
        return self.layer(x) * self.head_scale


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_ranks_train_on_and_agree_on_what_is_left(rank_pool, engine):
    found = rank_pool(2, absent_on_two_ranks, engine, 1.0)
    assert found[0] == found[1]
    left, message, finite = found[0]
    assert left == [["layer.weight", "layer.bias"], []] and not message and finite

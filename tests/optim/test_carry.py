"""Averages of gradients carried to each update's denominators: limits, closed forms, and rare gradients beside the reference."""

import math

import pytest
import torch
from torch import nn

from largebatch import batch_size_invariant, optim
from largebatch.optim.carry import carry, roots_before, uncarried_share

LINE = {"ours": optim.AdamW, "torch's": torch.optim.AdamW}


def trained(make, gradients, kappa, betas=(0.9, 0.95), eps=1e-8, units=2, dtype=torch.float64, lr=1.0):
    """Step one parameter by gradients (updates, *shape), each the same in all units; return its places (updates + 1, *shape)."""
    parameter = nn.Parameter(torch.zeros(gradients.shape[-1:], dtype=dtype))
    plain = make([parameter], lr=lr, betas=betas, eps=eps, weight_decay=0.0)
    optimizer = batch_size_invariant(plain, reference_batch_size=1, micro_batch_size=1)
    places = [parameter.detach().clone()]
    for gradient in gradients.to(dtype):
        for of_unit in gradient if gradients.ndim > 2 else [gradient] * units:
            (parameter * of_unit).sum().div(units).backward()
        optimizer.set_batch(kappa)
        optimizer.step()
        optimizer.zero_grad()
        places.append(parameter.detach().clone())
    return torch.stack(places)


@pytest.mark.parametrize("make", LINE.values(), ids=LINE)
def test_far_above_the_reference_gradients_are_divided_by_the_root_of_their_time(make):
    """Without noise s is the average of ghat^2; then the step is an average of quotients, as of RMSProp with momentum."""
    gradients = torch.randn(30, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kappa, beta2 = 10**6, 0.95 ** (1 / 10**6)  # such that beta2**kappa is 0.95
    places = trained(make, gradients, kappa, betas=(0.9, beta2))
    s, m, place = torch.zeros(5).double(), torch.zeros(5).double(), torch.zeros(5).double()
    for t, g in enumerate(gradients, start=1):
        s = 0.95 * s + 0.05 * g**2
        m = 0.9 * m + 0.1 * g / (s / (1 - 0.95**t)).sqrt()
        place = place - kappa * m / (1 - 0.9**t)
    torch.testing.assert_close(places[-1], place, rtol=1e-4, atol=0)


def rare(kappa, every, count):
    """Gradients at the reference, (count, 1): one in so many, else nothing; and those of batches of kappa updates, (n, 2, 1)."""
    at_reference = torch.zeros(count, dtype=torch.float64)
    at_reference[every // 2 :: every] = 1.0
    halves = at_reference.view(-1, 2, kappa // 2).mean(2)
    return at_reference[:, None], halves[:, :, None]


@pytest.mark.parametrize("make", LINE.values(), ids=LINE)
@pytest.mark.parametrize("every", [40, 160, 640])
def test_a_rare_gradient_moves_its_element_as_far_as_at_the_reference(every, make):
    """As of a word that is seldom used, with language models' beta2: 16 times the batch, within a quarter. With squares
    that are held for 20 updates, and averages of gradients as they are, it moves 1.2, 2.1 and 3.1 times as far."""
    at_reference, in_batches = rare(16, every, 400 + 4 * every)
    expected = trained(make, at_reference, 1, units=1)[-1]
    assert float(trained(make, in_batches, 16)[-1] / expected) == pytest.approx(1.0, abs=0.25)


@pytest.mark.parametrize("make", LINE.values(), ids=LINE)
def test_an_element_that_does_not_come_back_comes_to_rest(make):
    """Its squares are forgotten within an update or two, its average of gradients within ten."""
    gradients = torch.zeros(60, 1, dtype=torch.float64)
    gradients[3] = 1.0
    steps = trained(make, gradients, 64, eps=1e-12).diff(dim=0).abs().flatten()
    assert steps.isfinite().all() and steps.max() <= 64.0 / math.sqrt(1 - 0.95**64)
    torch.testing.assert_close(steps[30:40] / steps[20:30], torch.full((10,), 0.9**10).double(), rtol=0.1, atol=0)


@pytest.mark.parametrize("make", LINE.values(), ids=LINE)
@pytest.mark.parametrize(("kappa", "beta2"), [(16, 0.95), (64, 0.95), (128, 0.95), (16, 0.9), (64, 0.9), (256, 0.99)])
def test_without_gradients_steps_shrink_as_between_two_updates_of_the_reference(kappa, beta2, make):
    """By beta1 / sqrt(beta2), Adam's own ratio; with a share of 1/kappa they grow, from kappa 128 on without bound."""
    gradients = torch.ones(60, 1, dtype=torch.float64)
    gradients[50:] = 0.0
    steps = trained(make, gradients, kappa, betas=(0.9, beta2), eps=1e-60).diff(dim=0).abs().flatten()
    expected = torch.full((10,), 0.9 / math.sqrt(beta2), dtype=torch.float64)
    torch.testing.assert_close(
        steps[50:] / steps[49:-1], expected, rtol=0.006, atol=0
    )  # bias correction is 0.9**50 off


def test_the_share_that_is_not_carried():
    """All of it at the reference, 1/kappa where the average of squares is long, nothing where it is of one update alone."""
    assert uncarried_share(1.0, 0.95) == pytest.approx(1.0)
    assert uncarried_share(16.0, (1 - 1e-9) ** 16) == pytest.approx(1 / 16, rel=1e-6)
    assert uncarried_share(512.0, 0.0) == 0.0


@pytest.mark.parametrize("make", LINE.values(), ids=LINE)
def test_an_eps_of_zero_leaves_no_nan(make):
    gradients = torch.tensor([[1.0], [0.0], [0.0], [2.0]], dtype=torch.float64)
    assert trained(make, gradients, 8, eps=0.0).isfinite().all()


def test_what_float16_rounds_to_zero_is_not_divided_by():
    lost = torch.zeros(2, dtype=torch.float16)
    before = roots_before([lost], 0.003, 1e-4)
    averages = [torch.full((2,), 1e-3, dtype=torch.float16)]
    carry(averages, before, [torch.full((2,), 1.1e-4, dtype=torch.float16)], 1.0, 0.25)
    assert float(averages[0].max()) < 1e-3  # the root before may have been 2.4e-4


def test_at_the_reference_and_below_nothing_is_carried(monkeypatch):
    def refuse(*_):
        raise AssertionError("carried")

    monkeypatch.setattr("largebatch.optim.adaptive.carry", refuse)
    monkeypatch.setattr("largebatch.optim.shift.carry", refuse)
    gradients = torch.ones(3, 2, dtype=torch.float64)
    for make in LINE.values():
        trained(make, gradients, 1)
    optimizer = optim.AdamW([nn.Parameter(torch.ones(2))])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
    optimizer.step()
    optimizer.step()


@pytest.mark.parametrize(
    ("make", "options"),
    [(make, options) for make in LINE.values() for options in ({}, {"weight_decay": 0.1})]
    + [(torch.optim.Adam, options) for options in ({"weight_decay": 0.1}, {"amsgrad": True}, {"maximize": True})],
    ids=str,
)
def test_large_tensors_are_stepped_as_small_ones_are(make, options, monkeypatch):
    """They are stepped piece by piece: with one unit and with two, above the reference and below."""
    monkeypatch.setattr("largebatch.optim.carry.PIECE", 1000)
    torch.manual_seed(0)
    whole = nn.Parameter(torch.randn(400, 400, dtype=torch.float64))
    rows = [nn.Parameter(row.clone()) for row in whole.detach()]
    targets = torch.randn(6, 2, 400, 400, dtype=torch.float64)
    updates = (2, None), (2, 3), (1, None), (1, None), (2, 3), (2, None)
    for params in ([whole], rows):
        plain = make(params, lr=1e-2, betas=(0.9, 0.9), **options)
        optimizer = batch_size_invariant(plain, reference_batch_size=4, micro_batch_size=8)
        for both, (units, batch) in zip(targets, updates, strict=True):
            for target in both[:units]:
                values = torch.stack(params).view(400, 400)
                ((values - target).square().sum() / units).backward()
            if batch:
                optimizer.set_batch(batch)
            torch.nn.utils.clip_grad_norm_(params, 100.0)
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(torch.stack(rows), whole, rtol=1e-10, atol=1e-10)

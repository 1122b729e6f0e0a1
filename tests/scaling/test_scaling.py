"""Scaling rules against the published numbers, closed forms and real optimizers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from largebatch import optim
from largebatch.scaling.rules import (
    Reference,
    adam_per_sample,
    averaging_coefficient,
    averaging_length,
    averaging_updates,
    noise_scale,
    scaled_coefficient,
    scaled_lr,
    scaled_momentum,
    temperature,
)

sizes = st.integers(1, 2**20)
momenta = st.floats(0.0, 0.999)
rates = st.floats(1e-6, 1e3)

# (lr, B, momentum): each row one temperature, as published by Goyal et al. 2017 and Smith et al. 2018.
GOLDENS = {
    "goyal": [(0.1, 256, 0.9), (3.2, 8192, 0.9)],
    "smith cifar-10": [(0.1, 128, 0.9), (0.5, 640, 0.9), (0.5, 3200, 0.98)],
    "smith imagenet": [(3.0, 8192, 0.9), (3.0, 16384, 0.95), (3.0, 32768, 0.975)],
}


@pytest.mark.parametrize("row", GOLDENS.values(), ids=GOLDENS)
def test_published_settings_share_a_temperature(row):
    lr, batch_size, momentum = row[0]
    lr0 = temperature(lr, batch_size, momentum)
    for lr, batch_size, momentum in row[1:]:
        assert scaled_lr(lr0, batch_size, momentum) == pytest.approx(lr, rel=1e-12)
        assert scaled_momentum(lr0, batch_size, lr) == pytest.approx(momentum, rel=1e-12)
        at = Reference(row[0][1], row[0][0], momentum=row[0][2], momentum_rule=momentum).at(batch_size)
        assert at == pytest.approx({"lr": lr, "momentum": momentum}, rel=1e-12)
        assert noise_scale(lr, batch_size, 50_000, momentum) == pytest.approx(
            noise_scale(*row[0][:2], 50_000, row[0][2])
        )


@given(rates, sizes, momenta)
def test_temperature_inverts_scaled_lr(lr0, batch_size, momentum):
    assert temperature(scaled_lr(lr0, batch_size, momentum), batch_size, momentum) == pytest.approx(lr0, rel=1e-12)


@given(st.floats(1.0, 1e9), sizes)
def test_averaging_length(length_samples, batch_size):
    updates = averaging_updates(length_samples, batch_size)
    assert updates == max(1.0, length_samples / batch_size)
    assert averaging_length(averaging_coefficient(updates)) == pytest.approx(updates, rel=1e-6)


@given(momenta, st.floats(0.01, 1000))
def test_coefficients_fixed_in_samples(beta, kappa):
    half_life, length = (scaled_coefficient(beta, kappa, rule) for rule in ("half_life", "length"))
    assert 0 <= length < 1
    assert half_life == pytest.approx(beta**kappa)
    assert length == pytest.approx(max(0.0, 1 - kappa * (1 - beta)), abs=1e-12)  # Malladi et al., where it is positive
    assert scaled_coefficient(beta, kappa, "keep") == beta
    # Half-life in samples: kappa updates at B_ref are one at B.
    assert half_life ** (1 / kappa) == pytest.approx(beta, abs=1e-9) or half_life < 1e-12


def test_half_life_is_length_to_first_order():
    beta, kappa = 1 - 1e-5, 4
    # beta^k = 1 - k(1-beta) + k(k-1)/2 (1-beta)^2 - ...: the two differ by 6e-10.
    assert scaled_coefficient(beta, kappa, "half_life") == pytest.approx(
        scaled_coefficient(beta, kappa, "length"), abs=1e-9
    )


@given(st.integers(1, 4096), sizes, rates, momenta)
def test_reference_is_itself_at_its_own_batch_size(batch_size, _, lr, momentum):
    for rule in ("linear", "sqrt", "none"):
        reference = Reference(batch_size, lr, momentum=momentum, betas=(0.9, 0.99), alpha=0.9, eps=1e-8, rule=rule)
        values = reference.at(batch_size)
        assert values["lr"] == lr and values["momentum"] == momentum and values["eps"] == 1e-8
        assert values["betas"] == pytest.approx((0.9, 0.99), rel=1e-12) and values["alpha"] == pytest.approx(0.9)


def test_malladi_square_root_rule():
    at = Reference(256, 1e-3, betas=(0.9, 0.999), eps=1e-8, rule="sqrt").at(1024)
    assert at["lr"] == pytest.approx(2e-3)
    assert at["betas"] == pytest.approx((0.6, 0.996))
    assert at["eps"] == pytest.approx(0.5e-8)


@given(beta=st.floats(0.01, 0.9999), kappa=st.floats(0.1, 1000))
def test_a_second_moment_keeps_its_half_life_in_samples(beta, kappa):
    values, size = {"lr": 1e-3, "betas": (0.9, beta), "alpha": beta}, max(1, round(100 * kappa))
    at = Reference(100, **values).at(size)
    assert at["betas"] == (0.9, beta ** (size / 100)) and at["alpha"] == beta ** (size / 100)


def test_linear_rule_keeps_beta1_and_the_half_life_of_beta2():
    at = Reference(16, 1e-3, betas=(0.9, 0.999), eps=1e-8).at(256)
    assert at == {"lr": pytest.approx(16e-3), "betas": (0.9, pytest.approx(0.999**16)), "eps": 1e-8}


def test_rule_none_keeps_everything():
    values = {"lr": 0.1, "momentum": 0.9, "betas": (0.9, 0.99), "alpha": 0.9, "eps": 1e-8}
    reference = Reference(32, 0.1, momentum=0.9, betas=(0.9, 0.99), alpha=0.9, eps=1e-8, rule="none")
    assert reference.at(4096) == values


def test_adam_per_sample():
    values = adam_per_sample(0.5, 100, first_moment_samples=1000, second_moment_samples=50, eps=1e-3)
    assert values == {"lr": pytest.approx(1e-3 * 100 * 0.5), "betas": (pytest.approx(0.9), 0.0), "eps": 1e-3}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scaled_lr(-1.0, 8), "lr0: expected a learning rate per sample > 0, got -1.0"),
        (lambda: scaled_lr(0.1, 0), "batch_size: expected at least 1 sample, got 0"),
        (lambda: scaled_lr(0.1, 8, 1.0), r"momentum: expected a value in \[0, 1\), got 1.0"),
        (lambda: temperature(float("nan"), 8), "lr: expected a learning rate >= 0, got nan"),
        (lambda: scaled_momentum(0.001, 10, 0.5), "lr: expected at most"),
        (lambda: averaging_coefficient(0.5), "length: expected at least 1 update"),
        (lambda: scaled_coefficient(0.9, 2, "double"), "averaging rule: expected one of"),
        (lambda: Reference(32, 0.1, rule="cubic"), "rule: expected one of"),
        (lambda: Reference(32, 0.0), "lr: expected a learning rate > 0"),
        (lambda: Reference(32, 0.1, betas=(0.9, 1.0)), "beta: expected a value in"),
        (lambda: adam_per_sample(0.1, 8, 10, 10, eps=0.0), "eps: expected a value > 0"),
    ],
)
def test_arguments_out_of_range(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("form", ["sum", "velocity", "average"])
@pytest.mark.parametrize(("batch_size", "momentum"), [(1, 0.0), (8, 0.9), (256, 0.5), (1024, 0.98)])
def test_total_effect_of_one_gradient(form, batch_size, momentum):
    """One sample's gradient, then zeros: it moves the parameter by eta0 * g in all, whatever B and mu."""
    lr0, gradient = 0.01, 3.0
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = optim.SGD([p], scaled_lr(lr0, batch_size, momentum), momentum, form=form)
    for update in range(1 if momentum == 0 else math.ceil(40 / (1 - momentum))):
        p.grad = torch.full_like(p, gradient / batch_size if update == 0 else 0.0)
        optimizer.step()
    # What the tail of the geometric series leaves out: mu^(40/(1-mu)) < e^-40.
    assert -p.item() == pytest.approx(lr0 * gradient, rel=1e-12)


@pytest.mark.parametrize("form", ["sum", "velocity", "average"])
def test_total_effect_while_the_batch_grows(form):
    """Only a velocity that has taken the learning rate in keeps the total effect through a change of the batch size."""
    lr0, momentum = 0.01, 0.9
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = optim.SGD([p], 1.0, momentum, form=form)
    for update in range(400):
        batch_size = 8 if update < 3 else 64
        optim.set_hyperparameters(optimizer, {"lr": scaled_lr(lr0, batch_size, momentum)})
        p.grad = torch.full_like(p, 1.0 / batch_size if update == 0 else 0.0)
        optimizer.step()
    early = 1 - momentum**3  # part of the effect that falls before the change
    expected = lr0 if form == "velocity" else lr0 * (early + 8 * (1 - early))
    assert -p.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_stationary_variance_is_the_temperature(batch_size):
    """SGD on (beta - y)^2/2 settles at variance eta/(2-eta) * s2/B, which is eta0*s2/2 to first order for every B."""
    lr0, variance, runs, updates = 0.01, 4.0, 4000, 2600
    lr = scaled_lr(lr0, batch_size)
    generator = torch.Generator().manual_seed(batch_size)
    beta = torch.nn.Parameter(torch.zeros(runs, dtype=torch.float64))
    optimizer = optim.SGD([beta], lr)
    samples = []
    for update in range(updates):
        noise = torch.randn(runs, generator=generator, dtype=torch.float64)
        beta.grad = beta.detach() - noise * math.sqrt(variance / batch_size)  # mean of B targets of variance s2
        optimizer.step()
        if update >= 20 / lr and update % max(1, round(2 / lr)) == 0:  # past the transient, about independent draws
            samples.append(beta.detach().clone())
    measured = torch.cat(samples)
    exact = lr / (2 - lr) * variance / batch_size
    # Standard error of a variance from n normal draws is sqrt(2/n) of it; 5 of those.
    assert measured.var().item() == pytest.approx(exact, rel=5 * math.sqrt(2 / len(measured)))
    assert exact == pytest.approx(lr0 * variance / 2, rel=lr)

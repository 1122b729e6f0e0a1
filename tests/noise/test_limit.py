"""The limit of the step on a noisy quadratic: formulas against simulations."""

import pytest
import torch

from largebatch.errors import UserError
from largebatch.noise.limit import (
    change_ratio,
    curvature_of_steps,
    largest_kappa,
    share_of_change,
    stability_share,
    temperature_excess,
)

SHARES = torch.tensor([0.1, 0.3, 0.6, 0.85], dtype=torch.float64)


class Quadratic:
    """Many elements of a noisy quadratic under SGD with momentum, by hand: (shares, elements), noise of an update 1, rate 1.

    Args:
        beta: b of the running average.
        shares: r of each row.
        start: weights, in standard deviations of the stationary state.
    """

    def __init__(self, beta, shares=SHARES, start=1.0, num=1_500):
        self.generator = torch.Generator().manual_seed(0)
        self.beta, self.h = beta, (shares * 2 * (1 + beta) / (1 - beta))[:, None]
        self.w = self._normal(len(shares), num) if start == 1.0 else torch.full((len(shares), num), start).double()
        self.w *= (1 / (2 * self.h) / (1 - shares[:, None])).sqrt()
        self.m = torch.zeros_like(self.w)
        self.previous = None

    def _normal(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def update(self):
        """Do an update of two micro-batches; return d - V as they measure it, dw^2 before it, and (1-b) V of the one before."""
        units = [self._normal(*self.w.shape) * 2**0.5 + self.h * self.w for _ in range(2)]
        gradient, variance = (units[0] + units[1]) / 2, (units[0] - units[1]) ** 2 / 4
        measured = None
        if self.previous is not None:
            extra = (gradient - self.previous) ** 2 / 2 - variance
            measured = extra, self.m**2, (1 - self.beta) * variance
        self.previous = gradient
        self.m = self.beta * self.m + (1 - self.beta) * gradient
        self.w = self.w - self.m
        return measured


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.95])
def test_the_stationary_state_of_a_noisy_quadratic(beta):
    """Temperature, change of the gradient and curvature are the formulas' to 3 %."""
    quadratic, updates = Quadratic(beta), 300
    for _ in range(200):  # the momentum begins at zero
        quadratic.update()
    squares, sums = 0.0, torch.zeros(3, len(SHARES), dtype=torch.float64)
    for _ in range(updates):
        sums += torch.stack([value.mean(1) for value in quadratic.update()]) / updates
        squares += quadratic.w.square().mean(1) / updates
    small_steps = 1 / (2 * quadratic.h[:, 0])
    excess = torch.tensor([temperature_excess(r) for r in SHARES.tolist()])
    torch.testing.assert_close(squares / small_steps, excess.double(), rtol=0.03, atol=0)
    torch.testing.assert_close(sums[0], change_ratio(SHARES, beta), rtol=0.03, atol=0)
    torch.testing.assert_close(share_of_change(sums[0], beta), SHARES, rtol=0.03, atol=0)
    torch.testing.assert_close(curvature_of_steps(*sums), quadratic.h[:, 0], rtol=0.03, atol=0)


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_curvature_far_from_the_stationary_state(beta):
    """While the weights still fall from far away, the change of the gradient beside the steps gives the curvature to 3 %."""
    quadratic, sums = Quadratic(beta, start=30.0), 0.0
    quadratic.update()
    for _ in range(20):
        sums += torch.stack([value.mean(1) for value in quadratic.update()])
    torch.testing.assert_close(curvature_of_steps(*sums), quadratic.h[:, 0], rtol=0.03, atol=0)
    stationary = share_of_change(sums[0] / sums[2] * (1 - beta), beta)
    assert (stationary > 1.2 * SHARES).any()  # which is what the other formula asks for


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.95])
@pytest.mark.parametrize("share", [0.99, 1.01])
def test_an_update_diverges_from_the_limit_on(beta, share):
    """Without noise, weights decay below the limit and grow above it."""
    w, m, h = 1.0, 0.0, 2 * (1 + beta) / (1 - beta) * share
    for _ in range(4_000):
        m = beta * m + (1 - beta) * h * w
        w -= m
    assert (abs(w) > 1) == (share > 1)
    assert stability_share(1.0, h, beta) == pytest.approx(share)
    assert largest_kappa(0.1, h, beta) == pytest.approx(10 / share)


def test_the_change_of_the_gradient_is_inverted_exactly():
    """For numbers and tensors alike; without change no share, with all of it the whole."""
    shares = torch.linspace(0, 0.999, 50, dtype=torch.float64)
    for beta in (0.0, 0.5, 0.9, 0.99):
        torch.testing.assert_close(share_of_change(change_ratio(shares, beta), beta), shares, rtol=1e-9, atol=1e-12)
        assert share_of_change(change_ratio(0.3, beta), beta) == pytest.approx(0.3)
    assert share_of_change(1e12, 0.9) == pytest.approx(1.0)
    assert temperature_excess(1.0) == float("inf")


def test_a_curvature_that_nothing_says_is_zero():
    """Where nothing moved and nothing was noisy, and where the change is less than the noise."""
    assert curvature_of_steps(0.0, 0.0, 0.0) == curvature_of_steps(-1.0, 2.0, 1.0) == 0.0
    assert curvature_of_steps(
        torch.tensor([0.0, -1.0]), torch.tensor([0.0, 2.0]), torch.tensor([0.0, 1.0])
    ).tolist() == [0, 0]
    assert curvature_of_steps(2.0, 4.0, 0.0) == 1.0  # without noise the plain secant, |dg| / |dw|
    assert largest_kappa(1e-3, -2.0, 0.9) == float("inf")


def test_a_coefficient_of_one_is_refused():
    with pytest.raises(UserError, match=r"beta: expected a value in \[0, 1\), got 1.0"):
        change_ratio(0.5, 1.0)

"""AdaScale's gain against closed forms, and its clock against training at the reference batch size."""

import copy
import doctest
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import largebatch.noise.adascale
from largebatch.errors import UserError
from largebatch.noise.adascale import AdaScale, adascale_gain

moments = st.floats(0.0, 1e12)


def test_limits():
    assert adascale_gain(0.0, 2.0, 32, 512) == 1.0  # no noise
    assert adascale_gain(2.0, 0.0, 32, 512) == 16.0  # nothing but noise
    assert adascale_gain(2.0, -0.1, 32, 512) == 16.0  # as far as can be measured
    assert adascale_gain(-1e-9, 2.0, 32, 512) == 1.0
    assert adascale_gain(0.0, 0.0, 32, 512) == 1.0
    assert adascale_gain(5.0, 2.0, 32, 32) == 1.0
    # B_ref = B_simple: half noise
    assert adascale_gain(64.0, 2.0, 32, 32 * 3) == pytest.approx(2 / (1 / 3 + 1))


@given(moments, moments, st.integers(1, 4096), st.integers(1, 2**20))
def test_between_one_and_kappa(trace, signal, reference, size):
    gain = adascale_gain(trace, signal, reference, size)
    assert min(1.0, size / reference) <= gain <= max(1.0, size / reference)


@given(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6), st.integers(1, 512), st.integers(1, 64), st.floats(1e-6, 1.0))
def test_expected_progress_is_r_times_that_at_the_reference(trace, signal, reference, factor, lr):
    """On loss c*|w|^2/2 the expected progress of a step is lr*|G|^2 - c*lr^2/2*(|G|^2 + tr(Sigma)/B)."""

    def progress(rate, size):
        return rate * signal - 0.5 * rate**2 * (signal + trace / size)

    gain = adascale_gain(trace, signal, reference, reference * factor)
    scale = lr * signal + lr**2 * (signal + trace / reference)
    assert progress(gain * lr, reference * factor) == pytest.approx(
        gain * progress(lr, reference), rel=1e-9, abs=1e-9 * factor * scale
    )


def squared_distances(lr, size, updates, adapt, trace=4.0, start=100.0):
    """Return (clock, E[w^2]) after every update on loss w^2/2 with noise tr(Sigma)/B: exact, by its recursion."""
    path = [(0.0, start)]
    while path[-1][0] < updates:
        clock, value = path[-1]
        rate = adascale_gain(trace, value, 1, size) if adapt else 1.0
        path.append((clock + rate, (1 - rate * lr) ** 2 * value + (rate * lr) ** 2 * trace / size))
    return path


@pytest.mark.parametrize("kappa", [4, 16, 64])
@pytest.mark.parametrize("lr", [1e-2, 1e-3])
def test_same_distance_at_the_same_clock(kappa, lr):
    """All along the run, from no noise to nothing else, E[w^2] at tau is that of tau updates at the reference.

    Exact to first order in the largest step, kappa*lr: measured, the logarithms differ by up to 2.6*kappa*lr.
    """
    updates = round(4 / lr)
    reference = [math.log(value) for _, value in squared_distances(lr, 1, updates + kappa, adapt=False)]
    path = squared_distances(lr, kappa, updates, adapt=True)
    for clock, value in path:
        before, part = int(clock), clock % 1
        expected = (1 - part) * reference[before] + part * reference[before + 1]
        assert abs(math.log(value) - expected) < 3 * kappa * lr
    assert len(path) - 1 < 0.6 * updates


def test_the_linear_rule_diverges_where_the_gain_does_not():
    kappa, lr = 64, 0.05  # kappa*lr > 2
    linear = squared_distances(lr * kappa, kappa, 100, adapt=False)[-1][1]
    ours = squared_distances(lr, kappa, 100, adapt=True)[-1][1]
    assert linear > 1e6 and ours < 1.0


def test_clock_and_averages():
    """The average's weight in the long run is the paper's, 1 - theta = kappa/1000; before, the mean so far."""
    clock = AdaScale(32)
    assert clock.update(96.0, 1.0, 96) == 2.0
    assert clock.update(0.0, 1.0, 96) == pytest.approx((1.5 + 1) / (0.5 + 1))  # the mean of 96 and 0
    assert clock.updates == pytest.approx(2.0 + 5 / 3) and clock.samples == pytest.approx(32 * (2 + 5 / 3))
    for _ in range(400):
        clock.update(96.0, 1.0, 96)
    before = clock.state_dict()["trace"]
    clock.update(1096.0, 1.0, 96)
    assert clock.state_dict()["trace"] - before == pytest.approx((1096.0 - before) * 3 / 1000, rel=1e-9)


def test_a_batch_beyond_the_length_is_not_averaged():
    clock = AdaScale(1)
    clock.update(5.0, 1.0, 2000)
    assert clock.update(3.0, 1.0, 2000) == adascale_gain(3.0, 1.0, 1, 2000)


def test_an_overflow_moves_nothing():
    clock = AdaScale(8)
    gain = clock.update(30.0, 1.0, 64)
    state = clock.state_dict()
    assert clock.update(math.nan, 1.0, 64) == gain and clock.state_dict() == state


def test_state_continues():
    first = AdaScale(8, length_samples=400)
    for step in range(20):
        first.update(10.0 + step, 1.0, 64)
    second = AdaScale(8, length_samples=400)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert [second.update(3.0, 2.0, 64), second.updates] == [first.update(3.0, 2.0, 64), first.updates]


def test_bad_reference():
    with pytest.raises(UserError, match="adascale: reference_batch_size: expected at least 1 sample, got 0"):
        AdaScale(0)


def test_examples():
    assert doctest.testmod(largebatch.noise.adascale).failed == 0

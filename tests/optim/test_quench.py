"""Quenching SGD: the slides' loop, the one-dimensional theory, and what it does on quadratics with known L and sigma."""

import copy
import itertools

import pytest
import torch
from torch import nn

import largebatch
from largebatch import optim
from largebatch.errors import UserError
from largebatch.optim.quench import critical_batch_sizes, learning_rates

L, SIGMA = 2.0, 2.0  # loss L/2*(p - y)^2 with y of variance 1: gradients of variance L^2


class Quadratics:
    """n one-dimensional problems side by side, at distance ``start`` from their minima: an element is a run."""

    def __init__(self, n, start, mode, **options):
        self.generator = torch.Generator().manual_seed(0)
        self.p = nn.Parameter(torch.full((n,), start, dtype=torch.float64))
        self.shadow = nn.Parameter(torch.zeros(n, dtype=torch.float64))
        groups = [{"params": [self.p]}]
        if mode == "sample":
            groups.insert(0, {"params": [self.shadow], "role": "shadow"})
        self.optimizer = optim.Quench(groups, sigma2=mode, **options)

    def gradients(self, size):
        """Return per-sample gradients (B, n), and put their mean and squares where backward would."""
        y = torch.randn(size, len(self.p), generator=self.generator, dtype=torch.float64)
        g = L * (self.p.detach() - y)
        self.p.grad, self.shadow.grad = g.mean(0), (g / size).square().sum(0)
        return g

    def train(self, size, updates):
        for _ in range(updates):
            self.gradients(size)
            self.optimizer.set_batch(size)
            self.optimizer.step()
        return self

    def excess(self):
        """Return the expected loss above the floor, of every run."""
        return L / 2 * self.p.detach().square()


def slides(gradients, K, lambda_B, eps, lambda_eta, start):
    """The lecture's complete algorithm in one dimension, B = 1, as printed."""
    phi, g, s, Bstar, path = start, 0.0, 0.0, float(K), []
    for t, noise in enumerate(gradients, 1):
        ghat = L * phi + noise
        weight = 1 / Bstar
        g = (1 - weight) * g + weight * ghat
        s = (1 - weight) * s + weight * ghat**2
        variance = s - g**2
        Bstar = K if t <= K else lambda_B * variance / (g**2 + eps)
        eta = 0.0 if t <= K else lambda_eta * g**2 / variance
        phi = phi - eta * ghat
        path.append(phi)
        assert Bstar >= 2, "the bound on the weight would bind: choose another example"
    return path


def test_the_slides_loop():
    noise = (SIGMA * torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).tolist()
    options = {"K": 40, "lambda_B": 16.0, "eps": 1e-3}
    p = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = optim.Quench([p], lambda_eta=1 / (32 * L), **options)
    path = []
    for one in noise:
        p.grad = L * p.detach() + one
        optimizer.set_batch(1)
        optimizer.step()
        path.append(p.item())
    expected = slides(noise, lambda_eta=1 / (32 * L), start=1.0, **options)
    assert path == pytest.approx(expected, rel=1e-9)
    assert path[39] == 1.0 != path[40]  # K samples without a step


@pytest.mark.parametrize("mode", ["average", "sample"])
@pytest.mark.parametrize("start", [0.5, 40.0])  # from 40, Bstar is far below B
def test_the_rule_in_scalars(mode, start):
    """The docstring's rule with B = 4, element by element, bounds included."""
    K, lambda_B, eps, lambda_eta, size, n = 32, 8.0, 1e-4, 0.01, 4, 5
    problem = Quadratics(n, start, mode, K=K, lambda_B=lambda_B, eps=eps, lambda_eta=lambda_eta)
    phi, g, v, s, Bstar = ([value] * n for value in (start, 0.0, 0.0, 0.0, float(K)))
    for t in range(size, 100 * size + 1, size):
        rows = problem.gradients(size)
        kept = problem.p.grad.clone()
        problem.optimizer.set_batch(size)
        problem.optimizer.step()
        assert torch.equal(problem.p.grad, kept)
        for i in range(n):
            column = rows[:, i].tolist()
            ghat, q = sum(column) / size, sum(value**2 for value in column) / size
            w = min(size / Bstar[i], 0.5)
            g[i] = (1 - w) * g[i] + w * ghat
            s[i] = (1 - w) * s[i] + w * ghat**2
            v[i] = (
                (1 - w) * v[i] + w * size / (size - 1) * (q - ghat**2)
                if mode == "sample"
                else size * (s[i] - g[i] ** 2)
            )
            Bstar[i] = K if t <= K else lambda_B * v[i] / (g[i] ** 2 + eps)
            eta = 0.0 if t <= K else min(lambda_eta * size * g[i] ** 2 / v[i], lambda_eta * lambda_B)
            phi[i] -= eta * ghat
    # sbar - gbar^2 loses digits where the gradient is large, here and not there
    torch.testing.assert_close(problem.p.tolist(), phi, rtol=1e-7, atol=1e-10)
    found, rates = problem.optimizer.critical_batch_sizes_and_rates()[problem.p]
    torch.testing.assert_close(found.tolist(), Bstar, rtol=1e-6, atol=1e-9)
    expected = [min(lambda_eta * size * gi**2 / vi, lambda_eta * lambda_B) for gi, vi in zip(g, v, strict=True)]
    torch.testing.assert_close(rates.tolist(), expected, rtol=1e-6, atol=1e-12)


def test_theory_by_search():
    """Bstar and eta* maximise the guaranteed progress per sample, eta*(g - 2*sigma/sqrt(B))*g - L/2*eta^2*g^2, over B."""
    g, variance = 0.3, 5.0
    sizes = torch.linspace(1, 5000, 200_001, dtype=torch.float64)
    eta = torch.clamp(1 - 2 * (variance / sizes).sqrt() / g, min=0) / L  # the best rate at each B
    progress = eta * (g - 2 * (variance / sizes).sqrt()) * g - L / 2 * eta**2 * g**2
    best = (progress / sizes).argmax()
    mean, sigma2 = torch.tensor([g], dtype=torch.float64), torch.tensor([variance], dtype=torch.float64)
    (size,) = critical_batch_sizes([mean], [sigma2], 16.0, 1e-12)
    assert size.item() == pytest.approx(sizes[best].item(), rel=1e-3)
    for at, expected in ((size.item(), eta[best].item()), (size.item() / 50, eta[best].item() / 50)):
        (rate,) = learning_rates([mean], [sigma2], at, 16.0, 1 / (32 * L))
        assert rate.item() == pytest.approx(expected, rel=1e-3)
    assert eta[best].item() == pytest.approx(1 / (2 * L), rel=1e-3)


@pytest.mark.parametrize(("mode", "size"), [("average", 1), ("average", 8), ("sample", 2), ("sample", 8)])
def test_quadratic_with_known_L_and_sigma(mode, size):
    """Held where the gradient is 0.5, sigma 2: Bstar = 16*4/0.25 = 256, eta = B/256/(2L), whatever the batch size.

    Averaged over 2000 elements and 20 readings. The running average of the gradient itself has a relative variance of 1/32,
    so that Bstar scatters; its harmonic mean is that of g^2, about 1 + 1/32 too large, and the elements with a long average
    keep it longer: within 15 %.
    """
    problem = Quadratics(2000, 0.25, mode, K=256, eps=1e-12, lambda_eta=1e-30)
    problem.train(size, 1024 // size)
    means, variances, rates, sizes = [], [], [], []
    for _ in range(20):
        problem.train(size, 64 // size)
        state = problem.optimizer.state[problem.p]
        means.append(state["exp_avg"].mean().item())
        variances.append(state["exp_avg_sq"].mean().item())
        found, rate = problem.optimizer.critical_batch_sizes_and_rates()[problem.p]
        sizes.append(1 / (1 / found).mean().item())
        rates.append(rate.mean().item() / 1e-30 / (32 * L))
    average = [sum(values) / 20 for values in (means, variances, sizes, rates)]
    expected = [0.5, 4.0, 256.0, size / 256 / (2 * L)]
    assert average == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("mode", ["average", "sample"])
def test_it_quenches(mode):
    """From 3 deviations away: the rate falls as the loss nears its floor, and no one constant rate does as well.

    Measured over five lengths, its excess loss is 1.3 to 2.5 times that of the constant rate best for that length in
    hindsight; each constant rate has at some length at least 5 times the excess of ours.
    """
    size, lengths, samples = 8, (1024, 2048, 4096, 8192, 16384), 0
    problem = Quadratics(300, 3.0, mode, K=64, eps=1e-2, lambda_eta=1 / (32 * L))
    ours, rates = [], []
    for length in lengths:
        problem.train(size, (length - samples) // size)
        samples = length
        ours.append(problem.excess().mean().item())
        rates.append(problem.optimizer.critical_batch_sizes_and_rates()[problem.p][1].mean().item())
    constant = [
        [constant_rate_excess(eta, size, length // size) for length in lengths]
        for eta in torch.logspace(-4, -0.3, 200).tolist()
    ]
    hindsight = [found / min(column) for found, column in zip(ours, zip(*constant, strict=True), strict=True)]
    one_rate = min(max(theirs / found for theirs, found in zip(row, ours, strict=True)) for row in constant)
    print(mode, [round(ratio, 2) for ratio in hindsight], round(one_rate, 1))
    assert max(hindsight) < 3.0 and one_rate > 4.0
    assert all(later < earlier for earlier, later in itertools.pairwise(rates))
    assert rates[-1] < 0.01 / (2 * L)  # of eta*, which it starts from


def constant_rate_excess(eta, size, updates):
    square = 9.0
    decay, noise = (1 - eta * L) ** 2, eta**2 * SIGMA**2 / size
    return L / 2 * (square * decay**updates + noise * (1 - decay**updates) / (1 - decay))


@pytest.mark.parametrize("mode", ["average", "sample"])
def test_it_leaves_the_noiseless_phase(mode):
    """Far away averages are short, at their bound with ``sample``; near the minimum they lengthen again.

    With ``average`` the gradient's own drift counts as variance, so Bstar does not fall below a few updates.
    """
    problem = Quadratics(500, 1000.0, mode, K=32, eps=1e-2, lambda_eta=1 / (32 * L)).train(8, 10)
    assert bool((problem.optimizer.critical_batch_sizes_and_rates()[problem.p][0] < 32).all())
    problem.train(8, 400)
    sizes, rates = problem.optimizer.critical_batch_sizes_and_rates()[problem.p]
    assert bool((sizes > 80).all()) and rates.max() < 0.1 / (2 * L)


def test_sigma2_of_a_tracked_model():
    """After one update, K/B of the average: the unbiased variance of per-sample gradients, from a loop."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    plain = copy.deepcopy(model)
    inputs, targets = torch.randn(12, 5).double(), torch.randn(12, 3).double()
    rows = [
        torch.autograd.grad((plain(x[None]) - y).square().sum(), list(plain.parameters()))
        for x, y in zip(inputs, targets, strict=True)
    ]
    optimizer = optim.Quench(optim.param_groups(largebatch.track(model), 0.1), K=120, sigma2="sample")
    (model(inputs) - targets).square().sum(dim=1).mean().backward()
    optimizer.set_batch(12)
    optimizer.step()
    named = {name: p for name, p in model.named_parameters() if not name.endswith("_grad_sq")}
    for index, (name, p) in enumerate(named.items()):
        variance = torch.stack([row[index] for row in rows]).var(dim=0, unbiased=True)
        torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], variance / 10, rtol=1e-10, atol=0.0, msg=name)


def test_a_parameter_without_gradients_stands_still():
    p = nn.Parameter(torch.ones(3))
    optimizer = optim.Quench([p], K=2)
    for _ in range(8):
        p.grad = torch.zeros_like(p)
        optimizer.set_batch(4)
        optimizer.step()
    assert torch.equal(p.detach(), torch.ones(3))


def test_state_dict_continues_the_trajectory():
    first = Quadratics(6, 2.0, "average", K=32, lambda_eta=0.01).train(4, 30)
    second = Quadratics(6, 2.0, "average", K=32, lambda_eta=0.01)
    with torch.no_grad():
        second.p.copy_(first.p)
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.generator.set_state(first.generator.get_state())
    assert torch.equal(first.train(4, 10).p, second.train(4, 10).p)


def test_weight_decay_is_part_of_the_gradient():
    twins = []
    for decay in (0.0, 0.1):
        p = nn.Parameter(torch.ones(2, dtype=torch.float64))
        optimizer = optim.Quench([p], K=8, lambda_eta=0.1, weight_decay=decay)
        for step in range(20):
            p.grad = torch.tensor([1.0 + step % 3, -1.0], dtype=torch.float64) + (0.0 if decay else 0.1 * p.detach())
            optimizer.set_batch(2)
            optimizer.step()
        twins.append(p.detach())
    torch.testing.assert_close(*twins, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lambda_eta": 0.0}, "lambda_eta: expected a value > 0, got 0.0"),
        ({"K": 0}, "K: expected"),
        ({"lambda_B": -1.0}, "lambda_B: expected"),
        ({"eps": 0.0}, "eps: expected"),
        ({"sigma2": "exact"}, "sigma2: expected average or sample, got 'exact'"),
        ({"weight_decay": -1.0}, "weight_decay: expected"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        optim.Quench([nn.Parameter(torch.zeros(1))], **options)


def test_what_it_needs():
    p = nn.Parameter(torch.zeros(1))
    p.grad = torch.ones(1)
    with pytest.raises(RuntimeError, match="call set_batch"):
        optim.Quench([p]).step()
    optimizer = optim.Quench([p], sigma2="sample")
    optimizer.set_batch(4)
    with pytest.raises(UserError, match="sigma2: 'sample' needs the parameter groups of a tracked model"):
        optimizer.step()
    with pytest.raises(UserError, match="sigma2: 'sample' needs at least 2 samples in an update, got 1"):
        Quadratics(1, 1.0, "sample").train(1, 1)


def test_a_last_batch_of_one_sample_leaves_the_variance():
    problem = Quadratics(3, 1.0, "sample", K=8).train(8, 2)
    variance = problem.optimizer.state[problem.p]["exp_avg_sq"].clone()
    problem.train(1, 1)
    assert torch.equal(problem.optimizer.state[problem.p]["exp_avg_sq"], variance)

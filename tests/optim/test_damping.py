"""Damped steps: against loops by hand in float64, and on a noisy quadratic that they are derived from."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from damping import LIMITS, variance
from invariant_oracle import carried
from loops import EXACT, build, data, equal, mean_loss, weights
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from largebatch import batch_size_invariant, optim
from largebatch.errors import UserError

MAKERS = {
    "sgd": lambda p, lr=0.05, b=0.9: torch.optim.SGD(p, lr, momentum=b),
    "nesterov": lambda p, lr=0.05, b=0.9: torch.optim.SGD(p, lr, momentum=b, nesterov=True),
    "adamw": lambda p, lr=0.01, b=0.9: torch.optim.AdamW(p, lr, betas=(b, 0.99), weight_decay=0.1),
    "rmsprop": lambda p, lr=0.01, b=0.9: torch.optim.RMSprop(p, lr, alpha=0.99, momentum=b),
}
OURS = {
    "sgd": lambda p: optim.SGD(p, 0.05, momentum=0.9),
    "velocity": lambda p: optim.SGD(p, 0.05, momentum=0.9, form="velocity"),
    "average": lambda p: optim.SGD(p, 0.05, momentum=0.9, form="average"),
    "adamw": lambda p: optim.AdamW(p, 0.01, betas=(0.9, 0.99), weight_decay=0.1),
    "rmsprop": lambda p: optim.RMSProp(p, 0.01, alpha=0.99, momentum=0.9),
}


def coefficient(beta, kappa):
    """Of a second moment whose steps are damped."""
    return max(beta**kappa, min(beta, 0.95))


class ByHand:
    """The damped step of docs/limit.md, written out for each optimizer."""

    def __init__(self, params, name, reference):
        self.params, self.name, self.reference, self.b = list(params), name, reference, 0.9
        self.kept = [{} for _ in self.params]
        self.size = None

    @torch.no_grad()
    def step(self, units, size, clip):
        """``units``: of each parameter the gradients of two or more micro-batches of one size, (n, *shape)."""
        kappa = size / self.reference
        spread = None if self.size is None else 1 / (1 + size / self.size)
        beta = coefficient(0.999 if self.name in ("sgd", "nesterov") else 0.99, kappa)
        for p, g, kept in zip(self.params, units, self.kept, strict=True):
            n, mean, start = len(g), g.mean(0), p.clone()
            variance = (g.square().mean(0) - mean**2) / (n - 1)
            p.copy_(start * (1 - 0.01 * kappa * 0.1) if self.name == "adamw" else start)
            step, response = getattr(self, self.name)(mean * clip, variance * clip**2, kappa, kept)
            response = response * clip
            factor = 1.0
            if "g" in kept:
                extra = (mean - kept["g"]).square() / 2 - variance / (2 * spread)
                kept["E"] = beta * kept["E"] + (1 - beta) * extra
                E = kept["E"].clamp(min=0)
                h = (-kept["N"] + (kept["N"] ** 2 + 2 * kept["U"] * E).sqrt()) / kept["U"]
                b, per_step = self.b, response
                limit = 2 * (1 + b)
                if self.name == "nesterov":
                    limit, per_step = 2 * (1 + b) / (1 + 2 * b), response / (1 + b)
                factor = 1 / (1 + (1 - 1 / kappa) * (per_step * h / limit).clamp(max=kappa))
            p.sub_(factor * step)
            zero = torch.zeros_like(p)
            kept["g"], kept["E"] = mean, kept.get("E", zero)
            kept["U"] = beta * kept.get("U", zero) + (1 - beta) * (p - start) ** 2
            kept["N"] = beta * kept.get("N", zero) + (1 - beta) * factor * response * variance
        self.size = size

    def sgd(self, g, variance, kappa, kept):
        kept["v"] = self.b * kept.get("v", 0.0) + g
        return 0.05 * kappa * kept["v"], 0.05 * kappa

    def nesterov(self, g, variance, kappa, kept):
        kept["v"] = self.b * kept.get("v", 0.0) + g
        return 0.05 * kappa * (g + self.b * kept["v"]), 0.05 * kappa * (1 + self.b)

    def adamw(self, g, variance, kappa, kept):
        beta2 = coefficient(0.99, kappa)
        kept["t"], kept["log"] = kept.get("t", 0) + 1, kept.get("log", 0.0) + math.log(beta2)
        older = None
        if "s" in kept:
            older = (kept["s"] / (1 - math.exp(kept["log"] - math.log(beta2)))).sqrt() + 1e-8
        kept["s"] = beta2 * kept.get("s", 0.0) + (1 - beta2) * (g**2 + (kappa - 1) * variance)
        denominator = (kept["s"] / (1 - math.exp(kept["log"]))).sqrt() + 1e-8
        if older is not None and kappa > 1 and beta2 < 0.98:
            kept["m"] *= carried(denominator / older, kappa, beta2)
        kept["m"] = self.b * kept.get("m", 0.0) + (1 - self.b) * g
        c1 = 1 - self.b ** kept["t"]
        return 0.01 * kappa * kept["m"] / c1 / denominator, 0.01 * kappa * (1 - self.b) / c1 / denominator

    def rmsprop(self, g, variance, kappa, kept):
        alpha = coefficient(0.99, kappa)
        kept["s"] = alpha * kept.get("s", 0.0) + (1 - alpha) * (g**2 + (kappa - 1) * variance)
        denominator = kept["s"].sqrt() + 1e-8
        kept["v"] = self.b * kept.get("v", 0.0) + g / denominator
        return 0.01 * kappa * kept["v"], 0.01 * kappa / denominator


def by_hand(name, updates, reference, clip=None):
    model, (inputs, targets) = build(), data()
    hand = ByHand(model.parameters(), name, reference)
    for units in updates:
        rows = [torch.autograd.grad(mean_loss(model, inputs[u], targets[u]), hand.params) for u in units]
        stacked = [torch.stack(tensors) for tensors in zip(*rows, strict=True)]
        norm = float(torch.stack([g.mean(0).norm() for g in stacked]).norm())
        size = sum(u.stop - u.start for u in units)
        hand.step(stacked, size, 1.0 if clip is None else min(1.0, clip / (norm + 1e-6)))
    return weights(model)


def ours(make, updates, reference, micro, clip=None):
    model = build()
    optimizer = batch_size_invariant(
        make(model.parameters()), reference_batch_size=reference, micro_batch_size=micro, damping=True
    )
    train(model, optimizer, updates, clip)
    return weights(model), optimizer


def train(model, optimizer, updates, clip=None):
    inputs, targets = data()
    for units in updates:
        for u in units:
            (mean_loss(model, inputs[u], targets[u]) / len(units)).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()


GROWING = [*equal(2, 4, 5), *equal(4, 4, 5), *equal(3, 4, 4)]


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("name", MAKERS)
def test_a_damped_step_is_the_one_by_hand(name, clip):
    """Through a batch that grows and falls, clipped and not."""
    found, _ = ours(MAKERS[name], GROWING, 2, 4, clip)
    torch.testing.assert_close(found, by_hand(name, GROWING, 2, clip), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", OURS)
def test_our_optimizers_are_damped_as_torchs(name):
    """In every form of momentum, while the batch size is constant."""
    updates = equal(4, 4)
    torchs = MAKERS.get(name, MAKERS["sgd"])
    torch.testing.assert_close(
        ours(OURS[name], updates, 2, 4)[0], ours(torchs, updates, 2, 4)[0], rtol=1e-8, atol=1e-10
    )


@pytest.mark.parametrize("name", MAKERS)
def test_at_the_reference_nothing_is_damped(name):
    """Nor below it, nor is anything kept; and one unit alone says nothing of the change."""
    model = build()
    plain = batch_size_invariant(MAKERS[name](model.parameters()), reference_batch_size=8, micro_batch_size=4)
    train(model, plain, updates := equal(2, 4))
    found, optimizer = ours(MAKERS[name], updates, 8, 4)
    assert torch.equal(found, weights(model))
    assert not any("step_sq" in state for state in optimizer.state.values())
    _, optimizer = ours(MAKERS[name], equal(1, 4), 1, 4)
    assert not any("step_sq" in state for state in optimizer.state.values())


@pytest.mark.parametrize("name", MAKERS)
def test_a_resume_is_exact(name):
    model = build()
    optimizer = batch_size_invariant(
        MAKERS[name](model.parameters()), reference_batch_size=2, micro_batch_size=4, damping=True
    )
    train(model, optimizer, GROWING[:7])
    other = copy.deepcopy(model)
    saved = copy.deepcopy(optimizer.state_dict())
    resumed = batch_size_invariant(
        MAKERS[name](other.parameters()), reference_batch_size=2, micro_batch_size=4, damping=True
    )
    resumed.load_state_dict(saved)
    copied = copy.deepcopy((model, optimizer))
    for network, its in ((model, optimizer), (other, resumed), copied):
        train(network, its, GROWING[7:])
    assert torch.equal(weights(other), weights(model)) and torch.equal(weights(copied[0]), weights(model))
    assert set(optimizer.to_torch().state[model[0].weight]).isdisjoint({"previous_grad", "step_sq"})


def on_rank(rank, world_size, name, updates=12, damping=True, tell=None):
    model, (inputs, targets) = build(), data()
    optimizer = batch_size_invariant(
        MAKERS[name](model.parameters()), reference_batch_size=2, micro_batch_size=4, damping=damping
    )
    wrapped = DistributedDataParallel(model)
    for units in equal(4, 4, updates):
        mine = units[2 * rank : 2 * rank + 2]
        for index, u in enumerate(mine):
            with wrapped.no_sync() if index == 0 else nullcontext():
                (mean_loss(wrapped, inputs[u], targets[u]) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    del wrapped
    if tell is not None:
        tell(optimizer)
    return weights(model)


@pytest.mark.parametrize("name", MAKERS)
def test_two_ranks_are_one(rank_pool, name):
    """The change is that of the reduced gradient."""
    alone, _ = ours(MAKERS[name], equal(4, 4), 2, 4)
    for found in rank_pool(2, on_rank, name):
        torch.testing.assert_close(found, alone, **EXACT)


def test_what_cannot_be_damped_is_refused_by_name():
    model = build()
    for made in (torch.optim.Adagrad(model.parameters()), optim.LARS(model.parameters(), 0.1)):
        with pytest.raises(UserError, match="damping: expected Adam, AdamW, RMSprop or SGD.*" + type(made).__name__):
            batch_size_invariant(made, reference_batch_size=2, micro_batch_size=2, damping=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the batch of")
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.95])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_stationary_variance_is_that_of_the_reference(name, beta):
    """Of four curvatures at once, to twice the limit of the steepest, within 10 %; without damping it is lost there."""
    reference = variance(name, beta, 1, 3_000, damping=False)
    for kappa in (8, 16, 32):
        torch.testing.assert_close(variance(name, beta, kappa, 1_200, damping=True), reference, rtol=0.1, atol=0.0)
    assert not float((variance(name, beta, 32, 800, damping=False) / reference)[0]) < 1.5  # it may be nan


@pytest.mark.filterwarnings("ignore:the batch of")
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_no_kappa_diverges(name):
    """At 64 times the limit of the steepest, which without damping grows by orders of magnitude in an update."""
    found = variance(name, 0.9, 1_024, 500, damping=True, num=50)
    small_steps = LIMITS / (4 * (1 + 0.9) / (1 - 0.9))
    assert (found < 3.0 * small_steps).all() and (found > 0.3 * small_steps).all()

"""Gradients whose squares are below the smallest number of their type, beside others: plain Adam's update, and no NaN.

Every unit's gradient is the same here, so that the second moment of the reference batch is the square of the batch's own,
and torch.optim with the scaled learning rate is the oracle at whatever batch size.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from largebatch import batch_size_invariant, track
from largebatch.optim import LAMB, Adagrad, AdamW, RMSProp, param_groups
from largebatch.optim.shift import coefficient_at

SIZES = torch.logspace(-27, -12, 6000)
UPDATES = 4


class Scaled(nn.Module):
    """One output whose gradient with respect to `weight` is SIZES, whatever the sample."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(len(SIZES)))
        self.register_buffer("sizes", SIZES)

    def forward(self, x):
        return (x * (self.weight * self.sizes)).sum(1)


def by_torch(make, updates=UPDATES):
    weight = nn.Parameter(torch.zeros(len(SIZES)))
    optimizer = make([weight])
    for _ in range(updates):
        weight.grad = SIZES.clone()
        optimizer.step()
    return weight.detach()


def assert_as(weight, expected):
    """Up to what a second moment in float32's last digits is worth: below 1e-38, where eps is all of the denominator."""
    assert bool(weight.isfinite().all())
    torch.testing.assert_close(weight.detach(), expected, rtol=2e-4, atol=1e-30)


@pytest.mark.parametrize(("kappa", "num_units"), [(1, 2), (2, 2), (16, 2), (64, 2), (64, 8), (256, 4), (64, 1)])
@pytest.mark.parametrize("name", ["AdamW", "Adam", "RMSprop", "Adagrad"])
def test_the_one_line_does_what_torch_does_at_the_reference(name, kappa, num_units):
    base = getattr(torch.optim, name)
    options = {} if name == "Adagrad" else {"eps": 1e-8}
    micro = 256
    model = Scaled()
    optimizer = base(model.parameters(), lr=1e-3, **options)
    group = optimizer.param_groups[0]
    optimizer = batch_size_invariant(optimizer, reference_batch_size=micro * num_units // kappa, micro_batch_size=micro)
    for _ in range(UPDATES):
        for _ in range(num_units):
            (model(torch.ones(1, 1)).sum() / num_units).backward()
        optimizer.step()
        optimizer.zero_grad()
    scaled = dict(options, lr=1e-3 * kappa)
    if "betas" in group:
        scaled["betas"] = (group["betas"][0], coefficient_at(group, kappa, 0.0))
    elif "alpha" in group:
        scaled["alpha"] = coefficient_at(group, kappa, 0.0)
    expected = by_torch(lambda params: base(params, **scaled))
    assert bool(model.weight.isfinite().all())
    # But an update of Adagrad stands for kappa of the reference, whose squares add up, and of one pass alone the first
    # gradient counts as noise.
    if kappa == 1 or (name != "Adagrad" and num_units > 1):
        assert_as(model.weight, expected)


@pytest.mark.parametrize("per", ["sample", "micro_batch"])
@pytest.mark.parametrize("reference", [128, 64, 4])
@pytest.mark.parametrize("kind", [AdamW, RMSProp, Adagrad, LAMB])
def test_the_optimizers_of_the_trainer_do_too(kind, reference, per):
    batch = 128
    model = track(Scaled(), per=per)
    optimizer = kind(param_groups(model, 0.0), lr=1e-3, reference_batch_size=reference)
    num_units = batch if per == "sample" else 2
    for _ in range(UPDATES):
        for _ in range(1 if per == "sample" else 2):
            (model(torch.ones(batch if per == "sample" else batch // 2, 1)).sum() / batch).backward()
        optimizer.set_batch(batch, num_units)
        optimizer.step()
        optimizer.zero_grad()
    if kind is AdamW:
        assert_as(model.weight, by_torch(lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0)))
    assert bool(model.weight.isfinite().all())

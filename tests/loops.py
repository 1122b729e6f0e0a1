"""Loops of one's own with `batch_size_invariant`, and the same loops by hand."""

from __future__ import annotations

import torch
from invariant_oracle import ByHand
from torch import nn

from largebatch import batch_size_invariant

EXACT = {"rtol": 1e-10, "atol": 1e-12}
# Elements that a batch does not move at all differ by what eps = 1e-8 makes of rounding.
MAKERS = {
    "adamw": lambda params: torch.optim.AdamW(params, 0.01, weight_decay=0.1),
    "adam": lambda params: torch.optim.Adam(params, 0.01, betas=(0.8, 0.9), weight_decay=0.1),
    "rmsprop": lambda params: torch.optim.RMSprop(params, 0.01, alpha=0.9, weight_decay=0.1, momentum=0.5),
    "adagrad": lambda params: torch.optim.Adagrad(params, 0.05, weight_decay=0.1),
    "sgd": lambda params: torch.optim.SGD(params, 0.01, momentum=0.9, nesterov=True, weight_decay=0.1),
}
BY_HAND = {
    "adamw": {"lr": 0.01, "wd": 0.1},
    "adam": {"lr": 0.01, "wd": 0.1, "betas": (0.8, 0.9)},
    "rmsprop": {"lr": 0.01, "wd": 0.1, "alpha": 0.9, "momentum": 0.5},
    "adagrad": {"lr": 0.05, "wd": 0.1},
    "sgd": {"lr": 0.01, "wd": 0.1, "momentum": 0.9, "nesterov": True},
}


def build(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def data(samples=48, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 5, generator=generator).double(), torch.randn(samples, 3, generator=generator).double()


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def mean_loss(model, inputs, targets):
    return (model(inputs) - targets).square().sum(1).mean()


def pieces(sizes, start=0):
    """Return slices of these sizes, one after the other."""
    found = []
    for size in sizes:
        found.append(slice(start, start + size))
        start += size
    return found


def by_hand(name, updates, reference, clip=None, **options):
    """Train by hand; ``updates``: for each the slices of its units. Return the weights."""
    model, (inputs, targets) = build(), data()
    hand = ByHand(model.parameters(), name, reference, **{**BY_HAND[name], **options})
    for units in updates:
        rows = [torch.autograd.grad(mean_loss(model, inputs[u], targets[u]), hand.params) for u in units]
        stacked = [torch.stack(tensors) for tensors in zip(*rows, strict=True)]
        sizes = [u.stop - u.start for u in units]
        shares = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
        norm = torch.stack([torch.einsum("u...,u->...", g, shares).norm() for g in stacked]).norm()
        hand.step(stacked, sizes, 1.0 if clip is None else min(1.0, clip / (float(norm) + 1e-6)))
    return weights(model)


def ours(name, updates, reference, micro, clip=None, make=None, announce=False):
    """Train by the one line, and return the weights and the optimizer."""
    model, (inputs, targets) = build(), data()
    optimizer = batch_size_invariant(
        (make or MAKERS[name])(model.parameters()), reference_batch_size=reference, micro_batch_size=micro
    )
    for units in updates:
        total = sum(u.stop - u.start for u in units)
        for u in units:
            size = u.stop - u.start
            loss = mean_loss(model, inputs[u], targets[u]) * (size / total)
            if announce:
                with optimizer.micro_batch(size):
                    loss.backward()
            else:
                loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return weights(model), optimizer


def equal(count, size, updates=12):
    return [pieces([size] * count, start=(count * size * k) % 24) for k in range(updates)]


# State


def trained(steps, optimizer=None, model=None, count=2, start=0):
    model = model or build()
    inputs, targets = data()
    optimizer = optimizer or batch_size_invariant(
        MAKERS["adamw"](model.parameters()), reference_batch_size=2, micro_batch_size=6
    )
    for step in range(start, start + steps):
        for u in pieces([6] * count, start=step):
            (mean_loss(model, inputs[u], targets[u]) / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer

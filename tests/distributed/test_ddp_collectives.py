"""Replicas ask each other which parameters were used only where the reduced gradients do not say it."""

import gc

import torch
from torch import nn

from largebatch import optim
from largebatch.distributed import BackendConfig, Ranks, create_backend

# What the second branch's loss is multiplied by in each update; None where no rank takes the branch.
FACTORS = [1.0, 0.0, None, 1.0]


class Branches(nn.ModuleDict):
    """Adds up the losses of the branches that are named."""

    def forward(self, x, names):
        return sum(self[name](x).square().sum() for name in names)


def train(rank, world_size):
    """Return weights, norms of gradients, and collectives of each update; the last rank alone takes the second branch."""
    backend = create_backend(BackendConfig(device="cpu", name="ddp"), "fp64", Ranks(rank, rank, world_size))
    torch.manual_seed(0)
    model = Branches({"always": nn.Linear(3, 2), "second": nn.Linear(3, 2)}).double()
    called, optimizer = backend.prepare(model, lambda m: optim.AdamW(optim.param_groups(m, 0.1), 0.05, (0.8, 0.9)))
    add_up, sums, collectives, norms = backend.sum, [], [], []
    backend.sum = lambda values: sums.append(values) or add_up(values)
    x = torch.ones(2, 3).double()
    for factor in FACTORS:
        with backend.accumulate(sync=True):
            loss = called(x, ["always"]) / world_size
            if rank == world_size - 1 and factor is not None:
                loss = loss + factor * called(x, ["second"])
            backend.backward(loss)
        norms.append(backend.step(optimizer))
        collectives.append(len(sums))
        sums.clear()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    backend.close()
    del called, model
    gc.collect()
    return weights, norms, collectives


def test_ranks_ask_only_where_a_reduced_gradient_is_zero(rank_pool):
    """A parameter whose gradient is zero decays and counts; one that nobody used is left alone. One process knows which."""
    expected, norms, _ = train(0, 1)
    for weights, found, collectives in rank_pool(2, train):
        assert collectives == [0, 1, 1, 0]
        torch.testing.assert_close(torch.tensor(found), torch.tensor(norms), rtol=1e-12, atol=0)
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-12, atol=1e-12)

"""Buffers of a model are the same on every rank, and what a seed draws is one run."""

import random

import numpy as np
import pytest
import torch
from buffers import LENGTH, MODELS, check_same_buffers, train_and_again
from runs import digits

from largebatch.distributed import Ranks
from largebatch.task import Task
from largebatch.training.run import train


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("engine", ["ddp", "fsdp", pytest.param("accelerate", marks=pytest.mark.slow)])
def test_buffers_are_the_same_on_every_rank(engine, world_size, model, rank_pool, tmp_path):
    if engine == "accelerate":
        pytest.importorskip("accelerate")
    run = digits(**{**LENGTH, **MODELS[model], "backend.name": engine})
    check_same_buffers(run, rank_pool(world_size, train_and_again, run, tmp_path), tmp_path, 0.0)


def test_float32_resumes_with_an_expanded_buffer(rank_pool, tmp_path):
    """Of which no element can be written by itself."""
    run = digits(**{**LENGTH, **MODELS["drawn"], "precision": "fp32"})
    check_same_buffers(run, rank_pool(1, train_and_again, run, tmp_path), tmp_path, 1e-6)


def factory_rows(num=200):
    """Draw the data from generators that nobody has seeded here."""
    inputs = torch.randn(num, 4) + random.random() + torch.from_numpy(np.random.normal(size=(num, 4)))
    halves = inputs[: num // 2], inputs[num // 2 :]
    pairs = [torch.utils.data.TensorDataset(half, (half.sum(dim=1) > 1).long()) for half in halves]
    return *pairs, Task("classification", (4,), 2)


def _loss_of_drawn(rank, world_size, flags, state):
    random.seed(state + rank)
    np.random.seed(state + rank)
    torch.manual_seed(state + rank)
    return train(digits(**flags), None, ranks=Ranks(rank, rank, world_size)).summary.val_loss


@pytest.mark.parametrize("world_size", [1, 2])
def test_one_config_twice_is_one_run(world_size, rank_pool):
    """Whatever was drawn before: model and data come from the config's seed."""
    flags = {**LENGTH, "model.name": "buffers:drawn", "model.options": {"seeded": True}}
    data = {
        **LENGTH,
        "data.name": "test_buffers:factory_rows",
        "batch.size": 50,
        "model.hidden": [8],
        "model.name": "mlp",
    }
    for chosen in (flags, data):
        losses = [loss for state in (0, 50) for loss in rank_pool(world_size, _loss_of_drawn, chosen, state)]
        assert len(set(losses)) == 1, losses

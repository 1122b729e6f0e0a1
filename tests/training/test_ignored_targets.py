"""Targets that are ignored, and data whose own code ends the process."""

import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from largebatch.config.file import parse_config
from largebatch.data.sampler import global_batch
from largebatch.distributed import Ranks
from largebatch.errors import UserError
from largebatch.reporting.loggers import read_metrics
from largebatch.task import Task
from largebatch.training.run import build_model, train

DATA = """
import torch
from torch.utils.data import TensorDataset
from largebatch.task import Task

def data(ignored="half"):
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(96, 6, generator=draw), torch.randint(0, 5, (96,), generator=draw)
    if ignored == "half":
        y[:64:2] = -100
    elif ignored == "all":
        y[:64] = -100
    return TensorDataset(x[:64], y[:64]), TensorDataset(x[64:], y[64:]), Task("classification", (6,), 5)

def likelihoods(outputs, targets):
    return -outputs.gather(1, targets[:, None]).squeeze(1)

def own():
    train, val, _ = data("none")
    return train, val, Task("classification", (6,), 5, loss=likelihoods)

class Ways(torch.nn.Module):
    # A second way makes something else of the samples without a target.
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(6, 5), torch.nn.Linear(6, 5)
    def forward(self, x):
        far = x[:, 0] > 1
        out = self.first(x)
        return torch.where(far[:, None], self.second(x), out) if bool(far.any()) else out

def ways():
    return Ways()

def far_ignored():
    train, val, task = data("none")
    x, y = train.tensors
    y[x[:, 0] > 1] = -100
    return train, val, task

class Exits(torch.utils.data.Dataset):
    def __len__(self):
        return 64
    def __getitem__(self, index):
        if index == 50:
            raise SystemExit(0)
        return torch.zeros(6), 0

def exits():
    return Exits(), data()[1], data()[2]
"""


def _ignoring(rank, world_size, folder, place, **options):
    """Train one epoch of two updates of 32 by SGD; return the weights."""
    sys.path.insert(0, str(folder))
    values = {
        "data": {"name": "ignoring:data", "options": options}, "model": {"name": "mlp", "hidden": []}, "precision": "fp64",
        "batch": {"reference_size": 32, "size": 32, "micro_size": 8}, "optimizer": {"name": "sgd", "lr": 0.1},
        "schedule": {"name": "constant", "epochs": 1}, "log": {"every_updates": 1},
    }  # fmt: skip
    train(parse_config(values), place, ranks=Ranks(rank, rank, world_size))
    return load_file(place / "model.safetensors") if rank == 0 else None


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_update_is_the_mean_over_what_has_a_target(world_size, tmp_path, rank_pool, monkeypatch):
    (tmp_path / "ignoring.py").write_text(DATA)
    monkeypatch.syspath_prepend(tmp_path)
    found = rank_pool(world_size, _ignoring, tmp_path, tmp_path / "run")[0]
    namespace = {}
    exec(DATA, namespace)
    (inputs, labels), model = namespace["data"]()[0].tensors, nn.Linear(6, 5)
    model.double()
    first = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    names = sorted(found)
    torch.manual_seed(0)
    model.load_state_dict(dict(zip(("bias", "weight"), _initial(tmp_path, names), strict=True)))
    for number in range(2):
        rows = torch.from_numpy(global_batch(0, 64, 32 * number, 32).indices)
        loss = F.cross_entropy(model(inputs[rows].double()), labels[rows], ignore_index=-100)
        assert first[number]["loss"] == pytest.approx(loss.item(), rel=1e-12)
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
    for name, parameter in zip(names, (model.bias, model.weight), strict=True):
        torch.testing.assert_close(found[name], parameter.detach(), rtol=1e-12, atol=1e-14)


def _initial(folder, names):
    values = {"data": {"name": "ignoring:data"}, "model": {"name": "mlp", "hidden": []}, "batch": {"reference_size": 32, "size": 32},
              "optimizer": {"name": "sgd", "lr": 0.1}, "schedule": {"epochs": 1}}  # fmt: skip
    state = build_model(parse_config(values), Task("classification", (6,), 5)).state_dict()
    return [state[name] for name in names]


def test_an_update_without_a_target_stops_the_run(tmp_path, monkeypatch):
    (tmp_path / "ignoring.py").write_text(DATA)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="every target of an update is ignored"):
        _ignoring(0, 1, tmp_path, tmp_path / "run", ignored="all")


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
@pytest.mark.parametrize("size", [8, 16])
def test_what_samples_without_a_target_would_have_used_is_left_alone(engine, size, tmp_path, monkeypatch):
    """Each is a micro-batch of its own here, and none of a second way's other samples has a target."""
    (tmp_path / "ignoring.py").write_text(DATA)
    monkeypatch.syspath_prepend(tmp_path)
    values = {
        "data": {"name": "ignoring:far_ignored"}, "model": {"name": "ignoring:ways"}, "precision": "fp64",
        "batch": {"reference_size": 8, "size": size, "micro_size": 1}, "backend": {"name": engine, "device": "cpu"},
        "optimizer": {"name": "adamw", "lr": 0.1, "weight_decay": 0.5}, "schedule": {"name": "constant", "epochs": 1},
    }  # fmt: skip
    run = parse_config(values)
    train(run, tmp_path / "run")
    found = load_file(tmp_path / "run" / "model.safetensors")
    initial = build_model(run, Task("classification", (6,), 5)).double().state_dict()
    assert all(torch.equal(found[name], initial[name]) == name.startswith("second") for name in initial)


def test_the_loss_of_half_precision_is_the_mean_of_the_samples(tmp_path, monkeypatch):
    (tmp_path / "ignoring.py").write_text(DATA)
    monkeypatch.syspath_prepend(tmp_path)
    values = {
        "data": {"name": "ignoring:own"}, "model": {"name": "mlp", "hidden": []}, "precision": "bf16", "log": {"every_updates": 1},
        "batch": {"reference_size": 64, "size": 64}, "optimizer": {"name": "sgd", "lr": 0.1}, "schedule": {"epochs": 1},
    }  # fmt: skip
    run = parse_config(values)
    train(run, tmp_path / "run")
    source = run.data.load(run.seed)
    model = build_model(run, source.task)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        losses = source.task.losses(model(source.train.inputs), source.train.targets)
    assert losses.dtype == torch.bfloat16
    row = read_metrics(tmp_path / "run" / "metrics.jsonl")[0][0]
    assert row["loss"] == pytest.approx(float(losses.double().mean()), rel=1e-6)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_data_set_that_exits_is_a_mistake(num_workers, tmp_path, monkeypatch):
    (tmp_path / "ignoring.py").write_text(DATA)
    monkeypatch.syspath_prepend(tmp_path)
    values = {"data": {"name": "ignoring:exits"}, "model": {"name": "mlp", "hidden": []}, "batch": {"reference_size": 8, "size": 8},
              "optimizer": {"name": "sgd", "lr": 0.1}, "schedule": {"epochs": 1}, "loader": {"num_workers": num_workers}}  # fmt: skip
    with pytest.raises(UserError, match=r"called sys\.exit\(0\) for a sample"):
        train(parse_config(values))

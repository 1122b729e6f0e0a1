"""Damped steps in a run: the one line's, whatever the ranks and the resumes; where they cannot be had it is refused by name."""

from __future__ import annotations

import pytest
import torch
from resumed import assert_close, assert_same_bits, part_of_run
from rich.console import Console
from runs import digits, rows_of
from torch import nn

import largebatch
from largebatch.cli import main
from largebatch.data.sampler import global_batch
from largebatch.distributed import Ranks
from largebatch.distributed.state import read_tensors, tensor_metadata
from largebatch.errors import UserError
from largebatch.optim.damping import STATE
from largebatch.planner.resolve import resolve
from largebatch.planner.show import describe_plan
from largebatch.training.run import build_model

OPTIMIZERS = {
    "sgd": {"optimizer.name": "sgd", "optimizer.lr": 0.05, "optimizer.momentum": 0.9},
    "adamw": {"optimizer.name": "adamw", "optimizer.lr": 3e-3, "optimizer.max_grad_norm_of": "batch"},
    "rmsprop": {"optimizer.name": "rmsprop", "optimizer.lr": 1e-3, "optimizer.max_grad_norm_of": "batch"},
}
DAMPED = {
    "optimizer.damping": True, "optimizer.max_grad_norm": 1.0, "batch.reference_size": 25, "batch.size": 100, "batch.micro_size": 25,
    "schedule.name": "constant", "schedule.epochs": 1400 / 1438, "warmup.name": "none", "warmup.epochs": 0,
}  # fmt: skip
RAMP = {"warmup.name": "gradual", "warmup.epochs": 0.5, "warmup.realize": "batch", "schedule.epochs": 2150 / 1438}


def weights_of(folder):
    last = max((folder / "checkpoints").glob("samples-*"))
    return read_tensors(last, [name for name in tensor_metadata(last) if not name.startswith("random")])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_damped_run_is_the_one_line_in_a_loop(name, tmp_path):
    config = digits(**OPTIMIZERS[name] | DAMPED)
    rows_of(config, tmp_path / "run")
    source = config.data.load(config.seed)
    model = build_model(config, source.task).double()
    make = {
        "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
        "adamw": lambda p: torch.optim.AdamW(p, 3e-3, weight_decay=0.0),
        "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3),
    }[name]
    optimizer = largebatch.batch_size_invariant(
        make(model.parameters()), reference_batch_size=25, micro_batch_size=25, damping=True
    )
    for update in range(14):
        chosen = torch.from_numpy(global_batch(config.seed, len(source.train), 100 * update, 100).indices)
        for part in chosen.split(25):
            inputs, targets = source.train.inputs[part].double(), source.train.targets[part]
            (nn.functional.cross_entropy(model(inputs), targets) / 4).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    found = weights_of(tmp_path / "run")
    for key, p in model.named_parameters():
        torch.testing.assert_close(found[f"model.{key}"], p.detach(), rtol=1e-9, atol=1e-11)
        for slot in STATE:
            own = optimizer.state[p][slot]
            torch.testing.assert_close(found[f"optimizer.{key}.{slot}"], own, rtol=1e-7, atol=1e-12)
    undamped = digits(**OPTIMIZERS[name] | DAMPED | {"optimizer.damping": False})
    rows_of(undamped, tmp_path / "undamped")
    plain = weights_of(tmp_path / "undamped")
    assert any(not torch.allclose(plain[key], found[key], rtol=1e-4) for key in plain if key.startswith("model."))
    assert not any(key.endswith(STATE) for key in plain)


def run_on_rank(rank, world_size, run, folder):
    return rows_of(run, folder, Ranks(rank, rank, world_size))


@pytest.mark.parametrize("name", ["sgd", pytest.param("adamw", marks=pytest.mark.slow)])
def test_ranks_and_resumes_change_nothing(name, rank_pool, tmp_path):
    """Through a batch that grows, with the noise measured beside it."""
    run = digits(**OPTIMIZERS[name] | DAMPED | RAMP | {"noise.measure": True})
    rows_of(run, tmp_path / "one")
    rank_pool(2, run_on_rank, run, tmp_path / "two")
    for updates in (9, 25, None):
        part_of_run(0, 1, run, tmp_path / "parts", updates)
    assert_close(tmp_path / "two", tmp_path / "one", 1e-9)
    assert_same_bits(tmp_path / "parts", tmp_path / "one")


def test_at_the_reference_nothing_is_damped_and_nothing_tracked():
    run = resolve(digits(**OPTIMIZERS["sgd"] | DAMPED | {"batch.size": 25}), 1438)
    assert not run.damps and run.tracked is None


def test_a_plan_says_what_damping_keeps(capsys):
    describe_plan(digits(**OPTIMIZERS["sgd"] | DAMPED), 2, Console(width=200))
    printed = capsys.readouterr().out
    assert (
        "damping: 4 more tensors of state for each parameter (previous_grad, grad_change, step_sq, step_noise)"
        in printed
    )
    assert "0.0735 MiB on each rank" in printed  # 4 tensors of 2,410 elements of 8 bytes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"optimizer.name": "lamb", "optimizer.lr": 1e-3}, "expected optimizer.name sgd, rmsprop, adam or adamw, got lamb"),
        ({"backend.name": "fsdp"}, "expected backend.name ddp, which holds whole gradients, got fsdp"),
        ({"scaling.rule": "none"}, "expected scaling.rule linear, whose steps it damps, got none"),
        ({"noise.measure": True, "noise.per": "sample"}, "expected noise.per micro_batch, .* got sample"),
        ({**OPTIMIZERS["adamw"], "optimizer.second_moment": "sample"}, "expected optimizer.second_moment micro_batch, .* got sample"),
        ({**OPTIMIZERS["adamw"], "optimizer.second_moment": "batch"}, "expected optimizer.second_moment micro_batch, .* got batch"),
    ],
)  # fmt: skip
def test_what_cannot_be_damped_is_refused_by_name(flags, message):
    first = {} if "optimizer.name" in flags else OPTIMIZERS["sgd"]
    config = digits(**first | flags | DAMPED)
    with pytest.raises(UserError, match=r"^optimizer.damping: " + message):
        resolve(config, 1438)


def test_squares_of_every_update_are_needed(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(digits(**OPTIMIZERS["adamw"] | DAMPED).to_yaml())
    assert main(["plan", str(path), "--backend.squares_every", "8"]) == 2
    assert "backend.squares_every: got 8, expected 1: the damping is of every update" in capsys.readouterr().err

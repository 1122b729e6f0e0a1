"""Runs resumed exactly, on any number of ranks."""

import functools
import math
import shutil

import pytest
import torch
from resumed import (
    ADAMW,
    OFTEN,
    SAMPLES,
    _no_pictures,  # noqa: F401
    assert_close,
    assert_same_bits,
    in_parts,
    part_of_run,
    rows,
    saved,
)
from runs import digits

from largebatch.checkpoint.folder import (
    CheckpointFolder,
    read_state,
    samples_of,
)
from largebatch.distributed import Ranks, stopping
from largebatch.training.run import train

GROWING = {"schedule.name": "step", "schedule.milestones_epochs": [0.6, 1.2], "schedule.factor": 0.4,
           "schedule.epochs": 2, "schedule.realize": "batch", "batch.size": 60}  # fmt: skip


# --- resumed exactly ----------------------------------------------------------------------------------------------


def noisy(task):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 24), torch.nn.ReLU(), torch.nn.Dropout(0.3),
                               torch.nn.Linear(24, task.num_outputs))  # fmt: skip


EXACT = {
    "sgd, growing batch": GROWING,
    "adamw, carried averages": ADAMW | {"optimizer.betas": [0.9, 0.95]},
    "adamw, squares of samples, dropout": SAMPLES | {"model.name": "test_resume:noisy"},
    "rmsprop, variance of every fourth update, growing batch": GROWING | {
        "optimizer.name": "rmsprop", "optimizer.lr": 1e-3, "optimizer.momentum": 0.9, "backend.squares_every": 4},
    "batch norm, rows of several updates": {
        "model.name": "cnn", "model.channels": [4], "model.norm": "batch", "model.norm_group_size": 16,
        "batch.size": 96, "schedule.epochs": 1.0, "log.every_updates": 5},
    "fp16": {"precision": "fp16", "schedule.epochs": 1.0, "batch.size": 60},
}  # fmt: skip


def quick(cases, names):
    """Return parameters of which only those of these names are in the default suite."""
    return [pytest.param(case, marks=() if case in names else pytest.mark.slow) for case in cases]


RANKS_OF_CASES = [pytest.param(1, case, id=case) for case in EXACT] + [
    pytest.param(2, case, id=f"2 ranks, {case}", marks=() if "dropout" in case else pytest.mark.slow) for case in EXACT
]


@pytest.mark.parametrize("world_size, case", RANKS_OF_CASES)
def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(world_size, case, rank_pool, tmp_path):
    run = digits(**({"precision": "fp32"} | EXACT[case] | OFTEN | {"checkpoint.asynchronous": world_size == 2}))
    in_parts(rank_pool, run, tmp_path / "whole", [(world_size, None, None)])
    in_parts(
        rank_pool, run, tmp_path / "parts", [(world_size, 3, None), (world_size, 2, None), (world_size, None, None)]
    )
    assert_same_bits(tmp_path / "parts", tmp_path / "whole")
    assert (tmp_path / "parts" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


def test_a_resumed_fp16_run_keeps_its_loss_scale(rank_pool, tmp_path, monkeypatch):
    """The scale doubles every 4 updates until gradients overflow, which costs an update each time."""
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, growth_interval=4))
    run = digits(**(EXACT["fp16"] | OFTEN))
    in_parts(rank_pool, run, tmp_path / "whole", [(1, None, None)])
    in_parts(rank_pool, run, tmp_path / "parts", [(1, 11, None), (1, 2, None), (1, None, None)])
    assert_same_bits(tmp_path / "parts", tmp_path / "whole")
    norms = [row["grad_norm"] for row in rows(tmp_path / "whole") if "grad_norm" in row]
    assert 0 < sum(norm is None or not math.isfinite(norm) for norm in norms) < len(norms) / 2


ELASTIC = {
    "sgd, growing batch": GROWING,
    "adamw, squares of samples, growing batch": GROWING | SAMPLES,
    "rmsprop, squares of samples": {"optimizer.name": "rmsprop", "optimizer.lr": 1e-3, "optimizer.second_moment": "sample",
                                    "optimizer.momentum": 0.9, "batch.size": 60},
    "adamw, variance of every fourth update": ADAMW | {"backend.squares_every": 4, "batch.size": 60, "batch.micro_size": 5,
                                                       "schedule.epochs": 1440 / 1438},
    "batch norm over 16 samples, growing batch": {**GROWING, "batch.size": 64,
        "model.name": "cnn", "model.channels": [4], "model.norm": "batch", "model.norm_group_size": 16},
}  # fmt: skip


@pytest.mark.parametrize("case", quick(ELASTIC, ["adamw, squares of samples, growing batch"]))
def test_four_ranks_then_two_three_and_one_follow_one_trajectory(case, rank_pool, tmp_path):
    """Changed in mid-epoch, with another micro-batch on the way."""
    run = digits(**(ELASTIC[case] | OFTEN))
    other = digits(**({"batch.micro_size": 16} | ELASTIC[case] | OFTEN | {"evaluate.batch_size": 33}))
    in_parts(rank_pool, run, tmp_path / "whole", [(1, None, None)])
    in_parts(rank_pool, run, tmp_path / "parts", [(4, 3, None), (2, 4, None), (3, 4, other), (1, None, None)])
    seen = [read_state(path)["world_size"] for path in saved(tmp_path / "parts")]
    assert set(seen) == {4, 2, 3, 1} and seen == sorted(seen, key=[4, 2, 3, 1].index)
    assert_close(tmp_path / "parts", tmp_path / "whole")


def test_a_smaller_world_accumulates_what_it_cannot_hold(rank_pool, tmp_path):
    run = digits(**OFTEN)  # 200 samples: 50 on each of 4 ranks
    in_parts(rank_pool, run, tmp_path / "run", [(4, 2, None)])
    assert read_state(saved(tmp_path / "run")[-1])["micro_size"] == 50
    in_parts(rank_pool, run, tmp_path / "run", [(1, 2, None)])
    assert read_state(saved(tmp_path / "run")[-1])["micro_size"] == 50


def test_a_finished_run_stays_as_it_is(tmp_path):
    run = digits(**OFTEN)
    first = part_of_run(0, 1, run, tmp_path / "run", None)
    before = rows(tmp_path / "run"), saved(tmp_path / "run")
    again = part_of_run(0, 1, run, tmp_path / "run", None)
    assert (rows(tmp_path / "run"), saved(tmp_path / "run")) == before
    assert {k: v for k, v in again.items() if "second" not in k} == {
        k: v for k, v in first.items() if "second" not in k
    }


def test_a_run_that_died_before_its_first_checkpoint_begins_again(tmp_path):
    run = digits(**OFTEN)
    train(run, tmp_path / "whole", ranks=Ranks())
    train(run, tmp_path / "run", ranks=Ranks())
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    for name in ("model.safetensors", "summary.json", "curve.png"):  # of the end, which it had not come to
        (tmp_path / "run" / name).unlink(missing_ok=True)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "sam')
    train(run, tmp_path / "run", ranks=Ranks(), resume="auto")
    assert_same_bits(tmp_path / "run", tmp_path / "whole")


def test_the_best_checkpoint_is_kept(tmp_path):
    """With a rate that grows the validation loss turns, so that the best is not the last."""
    flags = {
        "checkpoint.every_minutes": None,
        "checkpoint.keep_best": True,
        "checkpoint.keep_last": 1,
        "schedule.epochs": 3,
    }
    train(digits(**flags), tmp_path / "good", ranks=Ranks())
    folder = CheckpointFolder(tmp_path / "good" / "checkpoints")
    scores = {row["samples"]: row["val_loss"] for row in rows(tmp_path / "good") if "val_loss" in row}
    best = min(scores, key=scores.get)
    assert samples_of(folder.best()) == best and folder.best().is_dir()
    assert {samples_of(path) for path in folder.saved()} == {best, max(scores)}


def test_the_ranks_agree_soon_after_a_run_was_resumed(tmp_path, monkeypatch):
    """A late resume counts its updates from where it stands, not from 0, when it computes how often to ask."""
    monkeypatch.setattr(stopping, "AGREE_SECONDS", 1e-9)  # ask at each update
    run = digits(**OFTEN, **{"batch.size": 20})
    part_of_run(0, 1, run, tmp_path / "run", 20)
    resumed = read_state(saved(tmp_path / "run")[-1])["progress"]["step"]
    part_of_run(0, 1, run, tmp_path / "run", 2)
    assert read_state(saved(tmp_path / "run")[-1])["progress"]["step"] - resumed <= 3

"""Checkpoints: whole or not there, resumed exactly on any number of ranks, refused where they do not belong."""

import errno
import functools
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from test_trainer import digits

from largebatch.checkpoint.folder import (
    MANIFEST,
    STATE,
    CheckpointFolder,
    describe_file,
    find_problems,
    read_state,
    samples_of,
)
from largebatch.cli import main
from largebatch.data import TensorSamples
from largebatch.distributed import Ranks, stopping
from largebatch.distributed.state import read_tensors, tensor_metadata
from largebatch.distributed.stopping import StopRequest
from largebatch.errors import UserError
from largebatch.reporting.loggers import read_metrics
from largebatch.training import trainer as trainer_module
from largebatch.training.run import train

TESTS = Path(__file__).parent
# A checkpoint every few updates, by samples and not by the clock.
OFTEN = {"checkpoint.every_minutes": None, "checkpoint.every_epochs": 0.25, "checkpoint.keep_last": 100}
ADAMW = {"optimizer.name": "adamw", "optimizer.lr": 1e-3}
SAMPLES = ADAMW | {"optimizer.second_moment": "sample"}
GROWING = {"schedule.name": "step", "schedule.milestones_epochs": [0.6, 1.2], "schedule.factor": 0.4,
           "schedule.epochs": 2, "schedule.realize": "batch", "batch.size": 60}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    """Drawing curve.png takes longer than most of these runs."""
    monkeypatch.setattr("largebatch.reporting.plots.plot_run", lambda *_: None)


def rows(folder):
    text = (folder / "metrics.jsonl").read_text()
    return [{k: v for k, v in json.loads(line).items() if k != "samples_per_second"} for line in text.splitlines()]


def saved(folder):
    return CheckpointFolder(folder / "checkpoints").saved()


def tensors(path):
    return read_tensors(path, tensor_metadata(path))


def assert_same_bits_of_tensors(folder, expected):
    ours, theirs = (tensors(saved(path)[-1]) for path in (folder, expected))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name].numpy().tobytes() != theirs[name].numpy().tobytes()] == []


def assert_same_bits(folder, expected):
    assert_same_bits_of_tensors(folder, expected)
    assert rows(folder) == rows(expected)


def assert_close(folder, expected, tolerance=1e-10):
    """The same run but for the order of sums: rows, weights, statistics."""
    mine, others = rows(folder), rows(expected)
    assert [(row["step"], row["samples"]) for row in mine] == [(row["step"], row["samples"]) for row in others]
    for row, other in zip(mine, others, strict=True):
        assert row.keys() == other.keys()
        for name in row.keys() & {"loss", "val_loss", "val_accuracy", "lr", "grad_norm", "batch_size"}:
            assert row[name] == pytest.approx(other[name], rel=tolerance, abs=tolerance), name
    ours, theirs = (tensors(saved(path)[-1]) for path in (folder, expected))
    names, own = ({name for name in state if name.startswith(("model.", "optimizer."))} for state in (theirs, ours))
    assert names == own
    for name in names:
        error = (ours[name].double() - theirs[name].double()).norm() / theirs[name].double().norm().clamp_min(1e-300)
        assert error <= tolerance, f"{name}: {error:.1e}"


class StopAfter(StopRequest):
    """Asks for a stop after so many questions."""

    asked, most = 0, 0

    def reason(self):
        type(self).asked += 1
        return "signal" if self.asked > self.most else None


@contextmanager
def stopping_after(updates):
    """Stop runs after so many updates (about: ranks ask each other from time to time)."""
    before = trainer_module.StopRequest, stopping.AGREE_SECONDS
    trainer_module.StopRequest = type("Stop", (StopAfter,), {"most": updates})
    stopping.AGREE_SECONDS = 0.0
    try:
        yield
    finally:
        trainer_module.StopRequest, stopping.AGREE_SECONDS = before


def part_of_run(rank, world_size, run, folder, updates):
    """Continue a run for so many updates; None to its end."""
    ranks = Ranks(rank, rank, world_size)
    if updates is None:
        return train(run, folder, ranks=ranks, resume="auto").summary.as_dict()
    with stopping_after(updates):
        return train(run, folder, ranks=ranks, resume="auto").summary.as_dict()


def in_parts(rank_pool, run, folder, parts):
    """Train in parts of (world size, updates, flags for `digits`)."""
    for world_size, updates, config in parts:
        if world_size == 1:
            summary = part_of_run(0, 1, config or run, folder, updates)
        else:
            summary = rank_pool(world_size, part_of_run, config or run, folder, updates)[0]
        assert summary["status"] == ("finished" if updates is None else "preempted"), summary
    return summary


# --- the folder ---------------------------------------------------------------------------------------------------


def commit(folder, samples, content=b"tensors"):
    part = folder.begin(samples)
    (part / "__0_0.distcp").write_bytes(content)
    place = folder.commit(part, {"samples": samples}, {"__0_0.distcp": describe_file(part / "__0_0.distcp")})
    folder.mark_latest(place)
    return place


def test_a_committed_checkpoint_is_whole_and_the_latest(tmp_path):
    folder = CheckpointFolder(tmp_path / "run" / "checkpoints")
    assert folder.newest_whole() == (None, []) and folder.saved() == []
    first, second = commit(folder, 40), commit(folder, 100)
    assert folder.saved() == [first, second] and [samples_of(path) for path in folder.saved()] == [40, 100]
    assert folder.newest_whole() == (second, []) and (folder.path / "latest").read_text() == second.name + "\n"
    assert read_state(second) == {"format": 1, "samples": 100}
    folder.mark_best(first)
    assert folder.best() == first
    assert sorted(path.name for path in second.iterdir()) == ["__0_0.distcp", MANIFEST, STATE]
    assert list(folder.path.glob("*.part")) == []


DAMAGES = {
    "a flipped byte": lambda path: flip(path / "__0_0.distcp"),
    "a file cut short": lambda path: os.truncate(path / "__0_0.distcp", 3),
    "a file gone": lambda path: (path / "__0_0.distcp").unlink(),
    "no manifest": lambda path: (path / MANIFEST).unlink(),
    "an empty manifest": lambda path: (path / MANIFEST).write_text("{}"),
    "a list for a manifest": lambda path: (path / MANIFEST).write_text('{"files": [1]}'),
    "a manifest of nothing": lambda path: (path / MANIFEST).write_text('{"files": {}}'),
    "no state": lambda path: (path / STATE).unlink(),
    "another state": lambda path: flip(path / STATE),
}


def flip(path, position=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found(damage, tmp_path):
    folder = CheckpointFolder(tmp_path)
    first, second = commit(folder, 40), commit(folder, 100)
    DAMAGES[damage](second)
    newest, lines = folder.newest_whole()
    assert newest == first and len(lines) == 1 and f"{second} is damaged: " in lines[0]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_flipped_byte_anywhere_is_found(data, tmp_path_factory):
    """In the manifest, too: it cannot say that another file is whole."""
    folder = CheckpointFolder(tmp_path_factory.mktemp("run"))
    path = commit(folder, 40, b"some tensors")
    chosen = path / data.draw(st.sampled_from(["__0_0.distcp", MANIFEST, STATE]))
    content = bytearray(chosen.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    before = json.loads((path / MANIFEST).read_text())
    chosen.write_bytes(content)
    try:
        same = json.loads((path / MANIFEST).read_bytes()) == before and chosen.name == MANIFEST
    except ValueError:
        same = False
    assert same or find_problems(path)  # only blanks between words may differ


@settings(max_examples=25, deadline=None)
@given(
    steps=st.lists(st.integers(1, 50), min_size=1, max_size=8),
    keep_last=st.integers(1, 4),
    keep_every=st.none() | st.integers(20, 120),
    best=st.none() | st.integers(0, 7),
)
def test_pruning_keeps_the_last_the_best_and_one_in_so_many(steps, keep_last, keep_every, best, tmp_path_factory):
    """Pruned after each checkpoint or only at the end, the same ones are left."""
    folder, late = (CheckpointFolder(tmp_path_factory.mktemp("run")) for _ in range(2))
    samples = [sum(steps[: n + 1]) for n in range(len(steps))]
    for number, count in enumerate(samples):
        for each in (folder, late):
            place = commit(each, count)
            if number == best:
                each.mark_best(place)
        folder.prune(folder.place(count), keep_last, keep_every)
    late.prune(late.place(samples[-1]), keep_last, keep_every)
    expected = set(samples[-keep_last:]) | ({samples[best]} if best is not None and best < len(samples) else set())
    if keep_every is not None:
        for multiple in range(keep_every, samples[-1] + 1, keep_every):
            expected.add(next(count for count in samples if count >= multiple))
    assert {samples_of(path) for path in late.saved()} == expected
    assert {samples_of(path) for path in folder.saved()} == expected
    assert list(folder.path.glob("*.part")) == []


def test_pruning_does_not_count_what_the_run_came_back_from(tmp_path):
    """The newest one was damaged, the run went on from the one before it: the next must not be thrown away for it."""
    folder = CheckpointFolder(tmp_path)
    commit(folder, 40)
    flip(commit(folder, 100) / STATE)
    folder.prune(commit(folder, 60), keep_last=1)
    assert [samples_of(path) for path in folder.saved()] == [60]


def test_nothing_that_is_not_a_checkpoint_is_touched(tmp_path):
    folder = CheckpointFolder(tmp_path)
    commit(folder, 40)
    for name in ("samples-000000000050.part", "samples-mine", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "latest.part").write_text("samples")
    folder.prune(commit(folder, 100), keep_last=1)
    folder.clean()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latest",
        "notes",
        "samples-000000000100",
        "samples-mine",
    ]


class Crash(BaseException):
    """The process dies here."""


def crash_at(monkeypatch, number):
    """Die before the file operation of that number; return the list of those that were reached."""
    reached = []

    def dying(function, name):
        def call(*arguments, **options):
            reached.append(name)
            if len(reached) == number:
                raise Crash
            return function(*arguments, **options)

        return call

    for owner, names in (
        (Path, ("rename", "replace", "mkdir", "open", "write_bytes", "unlink")),
        (os, ("fsync", "unlink", "rmdir")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, dying(getattr(owner, name), name))
    return reached


@pytest.mark.parametrize("again", [False, True], ids=["a new one", "over a damaged one"])
def test_a_crash_between_any_two_file_operations_leaves_a_whole_checkpoint(again, tmp_path):
    number, operations = 1, []
    while True:
        path = tmp_path / str(number)
        folder = CheckpointFolder(path)
        commit(folder, 20)
        first = commit(folder, 40)
        if again:
            flip(commit(folder, 100) / STATE)
        with pytest.MonkeyPatch.context() as monkeypatch:
            operations = crash_at(monkeypatch, number)
            try:
                folder.prune(commit(folder, 100), keep_last=1)
                crashed = False
            except Crash:
                crashed = True
        newest, _ = folder.newest_whole()
        assert newest in (first, folder.place(100)), f"after {operations}"
        assert read_state(newest)["samples"] == samples_of(newest)
        # Whatever was left, the next attempt finds its way.
        folder.clean()
        assert folder.newest_whole()[0] == newest
        folder.prune(commit(folder, 120), keep_last=1)
        assert folder.saved() == [folder.place(120)] and (path / "latest").read_text() == folder.place(120).name + "\n"
        assert sorted(p.name for p in path.iterdir()) == ["latest", folder.place(120).name]
        if not crashed:
            break
        number += 1
    assert number > 10


# --- resumed exactly ----------------------------------------------------------------------------------------------


def noisy(task):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 24), torch.nn.ReLU(), torch.nn.Dropout(0.3),
                               torch.nn.Linear(24, task.num_outputs))  # fmt: skip


EXACT = {
    "sgd, growing batch": GROWING,
    "adamw, squares of samples, dropout": SAMPLES | {"model.name": "test_checkpoint:noisy"},
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


# --- refused, one line each ---------------------------------------------------------------------------------------


SHORT = OFTEN | {"checkpoint.every_epochs": 0.14, "schedule.epochs": 0.8, "evaluate.every_epochs": 10.0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 6 updates with 5 checkpoints; copied by `begun`."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(digits(**SHORT), folder, ranks=Ranks())
    assert len(saved(folder)) == 5
    return folder


@pytest.fixture
def begun(trained, tmp_path):
    """That run without its last checkpoint, as if it had died before it."""
    folder = tmp_path / "begun"
    shutil.copytree(trained, folder)
    shutil.rmtree(saved(folder)[-1])
    return folder


def command(tmp_path, flags, *words):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(digits(**(SHORT | flags)).model_dump(mode="json")))
    return main(["train", str(config), *map(str, words)])


def contents(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


REFUSALS = {
    "model.hidden [32] there, [16] here": {"model.hidden": [16]},
    "optimizer.name sgd there, adamw here": ADAMW,
    "optimizer.lr 0.02 there, 0.03 here": {"optimizer.lr": 0.03},
    "seed 0 there, 1 here": {"seed": 1},
    "precision fp64 there, fp32 here": {"precision": "fp32"},
    "schedule.epochs 0.8 there, 2.0 here": {"schedule.epochs": 2},
    "batch.size 200 there, 100 here": {"batch.size": 100},
    "backend.squares_every 1 there, 2 here": {"backend.squares_every": 2},
}


@pytest.mark.parametrize("message", REFUSALS)
def test_another_run_is_not_continued(message, begun, tmp_path, capsys):
    before = contents(begun)
    assert command(tmp_path, REFUSALS[message], "--out", begun, "--resume", "auto") == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "may differ: the number of ranks, batch.micro_size" in error and "\n" not in error
    assert contents(begun) == before


def test_another_data_set_is_refused(begun):
    run = digits(**SHORT)
    source = run.data.load(0)
    train_half = TensorSamples(source.train.inputs[:1000], source.train.targets[:1000])
    fewer = type(source)(train_half, source.val, source.task)
    with pytest.raises(UserError, match="another data set: 1,438 training samples there, 1,000 here"):
        train(run, begun, ranks=Ranks(), source=fewer, resume="auto")


def test_what_may_differ_may_differ(begun, trained, tmp_path):
    flags = {"batch.micro_size": 64, "loader.num_workers": 1, "evaluate.batch_size": 100, "log.every_updates": 1,
             "checkpoint.keep_last": 3, "checkpoint.asynchronous": False}  # fmt: skip
    assert command(tmp_path, flags, "--out", begun, "--resume", "auto") == 0
    assert_close(begun, trained)


def test_a_branch_goes_on_with_another_rate_in_a_folder_of_its_own(begun, trained, tmp_path, capsys):
    """From a checkpoint in the middle; started again with the same command, it continues instead of branching again."""
    flags, new = {"optimizer.lr": 0.01}, tmp_path / "new"
    middle, before = saved(begun)[1], contents(begun)
    assert command(tmp_path, flags, "--resume", middle, "--out", new) == 0
    assert "branches off at" in capsys.readouterr().out
    first = samples_of(middle)
    assert saved(new)[0] == CheckpointFolder(new / "checkpoints").place(first + 200)  # one at its beginning, by its end
    lr = {row["samples"]: row["lr"] for row in map(json.loads, (new / "metrics.jsonl").open()) if "lr" in row}
    usual = {row["samples"]: row["lr"] for row in map(json.loads, (trained / "metrics.jsonl").open()) if "lr" in row}
    assert lr and min(lr) > first and all(lr[s] == pytest.approx(usual[s] / 2) for s in lr)
    assert contents(begun) == before
    assert command(tmp_path, flags, "--resume", middle, "--out", new) == 0
    assert "was begun at" in capsys.readouterr().out
    # Another optimizer is no branch.
    assert command(tmp_path, ADAMW, "--resume", middle, "--out", tmp_path / "other") == 2
    assert "optimizer.name sgd there" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_a_branch_off_a_finished_run_has_a_checkpoint_of_its_own(trained, tmp_path):
    assert command(tmp_path, {}, "--resume", trained, "--out", tmp_path / "new") == 0
    assert_same_bits_of_tensors(tmp_path / "new", trained)
    assert (tmp_path / "new" / "model.safetensors").exists()


def test_checkpoints_without_their_config_are_not_overwritten(trained, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(trained / "checkpoints", copy / "checkpoints")
    before = contents(copy)
    assert "already holds a run" in refused(tmp_path, capsys, "--out", copy)
    assert "already has checkpoints" in refused(tmp_path, capsys, "--resume", trained, "--out", copy)
    assert {k: v for k, v in contents(copy).items() if not k.endswith(".lock")} == before


def test_a_row_that_is_cut_short_is_not_read(trained, tmp_path):
    copy = tmp_path / "metrics.jsonl"
    copy.write_text((trained / "metrics.jsonl").read_text() + '{"step": 9, "loss')
    assert read_metrics(copy) == read_metrics(trained / "metrics.jsonl")


def test_a_run_folder_is_held_by_one_process(tmp_path):
    from largebatch.checkpoint.folder import locked

    with (
        locked(tmp_path),
        pytest.raises(UserError, match=f"is being written by process {os.getpid()} on "),
        locked(tmp_path, wait_seconds=0.3),
    ):
        pass
    with locked(tmp_path, wait_seconds=0.3):
        pass


def refused(tmp_path, capsys, *words):
    assert command(tmp_path, {}, *words) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("largebatch: error: ") and "\n" not in error
    return error


def test_a_path_that_is_not_there_is_refused(begun, tmp_path, capsys):
    missing = begun / "checkpoints" / "samples-000000000007"
    assert f"{missing} does not exist" in refused(tmp_path, capsys, "--resume", missing)
    assert "has no checkpoint" in refused(tmp_path, capsys, "--resume", tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    assert "auto needs --out" in refused(tmp_path, capsys, "--resume", "auto")
    assert "already holds a run" in refused(tmp_path, capsys, "--out", begun)


def test_a_checkpoint_of_a_later_format_is_refused(begun, tmp_path, capsys):
    path = saved(begun)[-1]
    state = json.loads((path / STATE).read_text())
    (path / STATE).write_text(json.dumps(state | {"format": 7, "versions": {"largebatch": "9.1"}}))
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"][STATE] = describe_file(path / STATE)
    (path / MANIFEST).write_text(json.dumps(manifest))
    before = contents(begun)
    error = refused(tmp_path, capsys, "--out", begun, "--resume", "auto")
    assert "checkpoint format 7, this version reads 1" in error and "9.1" in error
    assert contents(begun) == before


REAL_DAMAGES = {
    "flipped byte": lambda path: flip(next(path.glob("*.distcp"))),
    "cut short": lambda path: os.truncate(next(path.glob("*.distcp")), 100),
    "no manifest": lambda path: (path / MANIFEST).unlink(),
    "no metadata": lambda path: (path / ".metadata").unlink(),
}


@pytest.mark.parametrize("damage", REAL_DAMAGES)
def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_it_used(damage, begun, trained, tmp_path, capsys):
    *_, before, newest = saved(begun)
    REAL_DAMAGES[damage](newest)
    assert f"{newest} is damaged" in refused(tmp_path, capsys, "--resume", newest)
    assert command(tmp_path, {}, "--out", begun, "--resume", "auto") == 0
    printed = "".join(capsys.readouterr().out.split())
    assert f"{newest}isdamaged:" in printed and "theonebeforeitisused" in printed and f"resumedfrom{before}" in printed
    assert_same_bits(begun, trained)
    assert all(not find_problems(path) for path in saved(begun))


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_again(begun, tmp_path, capsys):
    for path in saved(begun):
        (path / MANIFEST).unlink()
    before = contents(begun)
    assert "no checkpoint of" in refused(tmp_path, capsys, "--out", begun, "--resume", "auto")
    assert contents(begun) == before


def test_a_run_branches_off_at_a_checkpoint_in_a_new_folder_only(begun, trained, tmp_path, capsys):
    first, *_, newest = saved(begun)
    assert "has newer checkpoints" in refused(tmp_path, capsys, "--resume", first)
    flip(newest / STATE)  # there are still whole ones in between
    assert "has newer checkpoints" in refused(tmp_path, capsys, "--resume", first)
    assert command(tmp_path, {}, "--resume", first, "--out", tmp_path / "branch") == 0
    branch = rows(tmp_path / "branch")
    assert branch == [row for row in rows(trained) if row["samples"] > samples_of(first)]
    ours, theirs = (tensors(saved(folder)[-1]) for folder in (tmp_path / "branch", trained))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if name.startswith(("model.", "optimizer.")))


# --- NaN and infinity ---------------------------------------------------------------------------------------------


class Poisoned(torch.nn.Module):
    """Its outputs are NaN in the training passes of these numbers, counted from 1; on rank 1 where there are ranks."""

    passes, bad = 0, frozenset()

    def __init__(self, num_outputs):
        super().__init__()
        self.linear = torch.nn.Linear(64, num_outputs)

    def forward(self, inputs):
        import torch.distributed as dist

        Poisoned.passes += self.training
        here = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1
        outputs = self.linear(inputs.flatten(1))
        return outputs * torch.nan if self.training and here and Poisoned.passes in Poisoned.bad else outputs


def poisoned(task):
    return Poisoned(task.num_outputs)


def train_poisoned(rank, world_size, folder, bad, flags):
    Poisoned.passes, Poisoned.bad = 0, frozenset(bad)
    run = digits(
        **({"model.name": "test_checkpoint:poisoned", "warmup.name": "none", "warmup.epochs": 0.0} | OFTEN | flags)
    )
    return train(run, folder, ranks=Ranks(rank, rank, world_size), resume="auto").summary


def train_by_its_own_clock(rank, world_size, folder):
    return train_poisoned(
        rank, world_size, folder / f"by-the-clock-of-{rank}", [8], {"optimizer.non_finite": "roll_back"}
    )


def test_rank_0_names_the_run_folder(rank_pool, tmp_path):
    """Each rank names runs/NAME-DATE-TIME by its own clock, and two of them may be a second apart."""
    summaries = rank_pool(2, train_by_its_own_clock, tmp_path)
    assert [(s.status, s.rollbacks) for s in summaries] == [("finished", 1)] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["by-the-clock-of-0"]


def test_a_skipped_update_is_left_out(rank_pool, tmp_path):
    """Against a plain torch loop that knows nothing of NaN: the third update is not there, its samples are used up."""
    import numpy as np

    summaries = rank_pool(2, train_poisoned, tmp_path / "run", [3], {"optimizer.non_finite": "skip"})
    assert [(s.status, s.skipped, s.updates) for s in summaries] == [("finished", 1, 11)] * 2

    run = digits(**{"model.name": "test_checkpoint:poisoned"})
    source = run.data.load(0)
    torch.manual_seed(0)
    model = poisoned(source.task).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    inputs, targets = source.train.inputs.double(), source.train.targets
    num, size, total = len(inputs), 200, 1.5 * len(inputs)
    order = np.concatenate([np.random.default_rng([0, epoch]).permutation(num) for epoch in range(2)])
    Poisoned.bad = frozenset()
    updates = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert len(updates) == 11
    for number, row in enumerate(updates):
        seen = number * size
        chosen = order[seen : min(seen + size, int(total))]
        assert row["samples"] == seen + len(chosen) and row.get("skipped", 0) == (number >= 2)
        if number == 2:
            assert row["loss"] is None and row["grad_norm"] is None
            continue
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * len(chosen) / 32 * 0.5 * (1 + np.cos(np.pi * seen / total))
        loss = torch.nn.functional.cross_entropy(model(inputs[chosen]), targets[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-10), number
    weights = tensors(saved(tmp_path / "run")[-1])
    torch.testing.assert_close(weights["model.linear.weight"], model.linear.weight.detach(), rtol=1e-10, atol=1e-12)
    events = [row for row in rows(tmp_path / "run") if "event" in row]
    assert len(events) == 1 and "update 3" in events[0]["event"] and "skipped, 1 in all" in events[0]["event"]
    assert events[0]["samples"] == 600 and "rank 1" in events[0]["event"]


QUICK_FP16 = {
    ("ddp", 1, "skip", "adamw"),
    ("ddp", 2, "roll_back", "adamw"),
    ("fsdp", 2, "skip", "adamw"),
    ("fsdp", 2, "roll_back", "sgd"),
}


@pytest.mark.parametrize(
    ("engine", "world_size", "choice", "optimizer"),
    [
        pytest.param(*case, marks=[] if case in QUICK_FP16 else [pytest.mark.slow])
        for case in itertools.product(("ddp", "fsdp"), (1, 2), ("skip", "roll_back"), ("sgd", "adamw"))
    ],
)
def test_fp16_goes_on_after_a_loss_that_is_not_finite(engine, world_size, choice, optimizer, rank_pool, tmp_path):
    flags = ADAMW if optimizer == "adamw" else {}
    """Its loss scaling has seen gradients that are gone."""
    flags = flags | {"precision": "fp16", "optimizer.non_finite": choice, "batch.size": 90, "backend.name": engine}
    passes = 2 if flags.get("optimizer.name") == "adamw" and world_size == 1 else 1
    bad = [12 * passes]
    if world_size == 1:
        summaries = [train_poisoned(0, 1, tmp_path / "run", bad, flags)]
    else:
        summaries = rank_pool(world_size, train_poisoned, tmp_path / "run", bad, flags)
    assert [s.status for s in summaries] == ["finished"] * world_size
    assert all((s.skipped, s.rollbacks) == ((1, 0) if choice == "skip" else (0, 1)) for s in summaries)
    losses = [row["loss"] for row in rows(tmp_path / "run") if row.get("loss") is not None]
    assert losses[-1] < losses[0]


class _Overflow(torch.autograd.Function):
    """The identity, whose gradients are beyond what float16 holds."""

    @staticmethod
    def forward(ctx, outputs):
        return outputs.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 1e30


class Overflowing(Poisoned):
    """Its losses are finite and its gradients overflow in the passes that are bad."""

    def forward(self, inputs):
        Poisoned.passes += self.training
        outputs = self.linear(inputs.flatten(1))
        return _Overflow.apply(outputs) if self.training and Poisoned.passes in Poisoned.bad else outputs


def overflowing(task):
    return Overflowing(task.num_outputs)


OVERFLOWS = {  # (passes, choice, updates, skipped)
    "one, stop": ([12], "stop", 48, 0),
    "all, stop": (range(4, 999), "stop", 34, 0),
    "all, skip": (range(4, 999), "skip", 54, 20),
}


@pytest.mark.parametrize(
    ("engine", "world_size"),
    [("ddp", 1), ("fsdp", 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("ddp", 2), ("fsdp", 1)))],
)
@pytest.mark.parametrize("case", OVERFLOWS)
def test_an_overflow_that_no_loss_scale_mends_is_none_of_the_scale(case, engine, world_size, rank_pool, tmp_path):
    """Its scale begins at 2^16 and is halved at each overflow; below 2^-14 the gradient is what is not finite."""
    bad, choice, updates, skipped = OVERFLOWS[case]
    flags = {"model.name": "test_checkpoint:overflowing", "precision": "fp16", "optimizer.non_finite": choice,
             "batch.size": 90, "backend.name": engine, "schedule.epochs": 3 if "one" in case else 6}  # fmt: skip
    if world_size == 1:
        summaries = [train_poisoned(0, 1, tmp_path / "run", bad, flags)]
    else:
        summaries = rank_pool(world_size, train_poisoned, tmp_path / "run", bad, flags)
    for summary in summaries:
        assert (summary.status, summary.updates, summary.skipped) == (
            "finished" if "one" in case else "diverged", updates, skipped
        )  # fmt: skip
        assert "one" in case or "the gradient is NaN or infinite, every loss was finite" in summary.message
    norms = [row["grad_norm"] for row in rows(tmp_path / "run") if "loss" in row]
    assert norms.count(None) == (1 if "one" in case else updates - 3)


def test_a_skip_is_told_once_however_often_the_run_is_resumed(tmp_path):
    """Killed after the skipped update and resumed before it, it comes past it again."""
    flags = {"optimizer.non_finite": "skip", "batch.size": 90} | SAMPLES  # of one pass an update
    train_poisoned(0, 1, tmp_path / "whole", [9], flags)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for path in saved(tmp_path / "run")[2:]:
        shutil.rmtree(path)
    done = read_state(saved(tmp_path / "run")[-1])["progress"]["step"]
    assert done == 8
    train_poisoned(0, 1, tmp_path / "run", [9 - done], flags)
    assert_same_bits(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    ("flags", "passes"), [({}, 1), (ADAMW | {"backend.squares_every": 3}, 2)], ids=["sgd", "adamw, variance every 3"]
)
def test_a_run_that_rolls_back_goes_on_with_other_samples(flags, passes, tmp_path):
    flags = flags | {"optimizer.non_finite": "roll_back", "batch.size": 90}
    summaries = [
        train_poisoned(0, 1, tmp_path / name, bad, flags)
        for name, bad in (("whole", []), ("run", [12 * passes]), ("again", [12 * passes]))
    ]
    assert [s.status for s in summaries] == ["finished"] * 3 and [s.rollbacks for s in summaries] == [0, 1, 1]
    for name in ("run", "again"):  # the event names the folder
        path = tmp_path / name / "metrics.jsonl"
        path.write_text(path.read_text().replace(str(tmp_path / name), ""))
    assert_same_bits(tmp_path / "run", tmp_path / "again")
    whole, run = (rows(tmp_path / name) for name in ("whole", "run"))
    event = next(row for row in run if "event" in row)
    assert "update 12" in event["event"] and "back at" in event["event"] and "other samples" in event["event"]
    back = event["samples"]
    assert 0 < back < 12 * 90
    updates = [[row for row in each if "loss" in row] for each in (whole, run)]
    assert [row["samples"] for row in updates[0]] == [row["samples"] for row in updates[1]]  # none twice, none left out
    for ours, theirs in zip(*updates, strict=True):
        assert (ours["loss"] == theirs["loss"]) == (ours["samples"] <= back)
        assert ours["lr"] == theirs["lr"] and ours["loss"] < 20


LIMITS = {
    "stop": ([4], "stop", "update 4", 3, 0, 0),
    "skips in a row": (range(4, 99), "skip", "20 updates in a row were skipped", 23, 20, 0),
    "returns": (range(12, 999), "roll_back", "after 10 returns to a checkpoint", None, 0, 10),
    "nothing to return to": ([2], "roll_back", "no checkpoint yet", 1, 0, 0),
}


@pytest.mark.parametrize("case", LIMITS)
def test_a_run_that_cannot_go_on_stops_with_its_last_good_state(case, tmp_path):
    bad, choice, message, updates, skipped, rollbacks = LIMITS[case]
    flags = {"optimizer.non_finite": choice, "batch.size": 90, "schedule.epochs": 3}
    summary = train_poisoned(0, 1, tmp_path / "run", bad, flags)
    assert summary.status == "diverged" and message in summary.message
    assert (summary.skipped, summary.rollbacks) == (skipped, rollbacks) and updates in (None, summary.updates)
    path = saved(tmp_path / "run")[-1]
    assert str(path) in summary.message and not find_problems(path)
    assert all(
        value.isfinite().all() for name, value in tensors(path).items() if name.startswith(("model.", "optimizer."))
    )
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_skipping_does_not_go_with_a_variance_that_is_kept():
    from largebatch.planner.resolve import resolve

    with pytest.raises(UserError, match=r"squares_every.*skip"):
        resolve(digits(**ADAMW, **{"optimizer.non_finite": "skip", "backend.squares_every": 2}), 1438)


# --- stopped ------------------------------------------------------------------------------------------------------


class Signalled(torch.nn.Module):
    """Sends this process signals in its training passes, as a cluster or a person would: {pass: signal}."""

    passes, signals = 0, {}

    def __init__(self, num_outputs):
        super().__init__()
        self.linear = torch.nn.Linear(64, num_outputs)

    def forward(self, inputs):
        Signalled.passes += self.training
        if self.training and Signalled.passes in Signalled.signals:
            for pid in [
                worker.pid for worker in multiprocessing.active_children() if not worker.name.startswith("Spawn")
            ] + [os.getpid()]:
                os.kill(pid, Signalled.signals[Signalled.passes])
        return self.linear(inputs.flatten(1))


def signalled(task):
    return Signalled(task.num_outputs)


def train_signalled(tmp_path, folder, signals, **flags):
    Signalled.passes, Signalled.signals = 0, signals
    # So rarely that only the stop itself saves.
    flags = {"model.name": "test_checkpoint:signalled", "checkpoint.every_epochs": 50.0, "schedule.epochs": 4.0} | flags
    return command(tmp_path, flags, "--out", folder, "--resume", "auto")


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_and_stops(number, code, tmp_path, capsys):
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    assert train_signalled(tmp_path, tmp_path / "whole", {}) == 0
    assert train_signalled(tmp_path, tmp_path / "run", {7: number}) == code
    message = capsys.readouterr().err
    assert f"continue with --resume auto --out {tmp_path / 'run'}" in message
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == handlers
    (path,) = saved(tmp_path / "run")
    assert not find_problems(path) and read_state(path)["progress"]["step"] >= 7
    status = json.loads((tmp_path / "run" / "summary.json").read_text())["status"]
    assert status == {75: "preempted", 130: "interrupted"}[code]
    assert train_signalled(tmp_path, tmp_path / "run", {}) == 0
    assert_same_bits(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_to_all_processes_leaves_the_loaders_workers_at_work(number, code, tmp_path):
    """As Slurm sends it to every process of a step, and a terminal to every process of a job."""
    workers = {"loader.num_workers": 1, "batch.micro_size": 50}
    assert train_signalled(tmp_path, tmp_path / "run", {9: number}, **workers) == code
    (path,) = saved(tmp_path / "run")
    assert read_state(path)["progress"]["step"] >= 3 and not find_problems(path)


def test_a_second_ctrl_c_stops_at_once_and_costs_the_last_updates_only(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stopping, "IMPATIENCE_SECONDS", -1.0)
    monkeypatch.setattr(stopping.StopCoordinator, "ask", lambda *_: (None, False))  # the first one is not heard in time
    assert train_signalled(tmp_path, tmp_path / "whole", {}, **{"checkpoint.every_epochs": 0.5}) == 0
    assert (
        train_signalled(
            tmp_path, tmp_path / "run", {9: signal.SIGINT, 10: signal.SIGINT}, **{"checkpoint.every_epochs": 0.5}
        )
        == 130
    )
    assert "continue with" not in capsys.readouterr().err
    assert [samples_of(path) for path in saved(tmp_path / "run")] == [800, 1600]
    assert train_signalled(tmp_path, tmp_path / "run", {}, **{"checkpoint.every_epochs": 0.5}) == 0
    assert_same_bits(tmp_path / "run", tmp_path / "whole")


def test_a_time_limit_saves_and_stops(tmp_path, capsys):
    assert train_signalled(tmp_path, tmp_path / "whole", {}) == 0
    assert train_signalled(tmp_path, tmp_path / "run", {}, **{"checkpoint.time_limit_minutes": 1e-9}) == 75
    assert "time limit reached after update 1;" in capsys.readouterr().err
    assert train_signalled(tmp_path, tmp_path / "run", {}) == 0
    assert_same_bits(tmp_path / "run", tmp_path / "whole")


def test_first_things_first_when_several_ask():
    now = StopRequest(time_limit_minutes=1e-9)
    time.sleep(0.001)
    assert now.reason() == "time_limit"
    with now:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGINT)  # the first one counts
        assert now.reason() == "signal"


# --- no room, no right --------------------------------------------------------------------------------------------


def failing(monkeypatch, name, failures):
    """Let a step of the folder's work fail with ENOSPC in the calls of these numbers, counted from 1."""
    function, calls = getattr(CheckpointFolder, name), []

    def call(self, *arguments, **options):
        calls.append(1)
        if len(calls) in failures:
            raise OSError(errno.ENOSPC, "No space left on device", str(self.path))
        return function(self, *arguments, **options)

    monkeypatch.setattr(CheckpointFolder, name, call)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("step", ["begin", "commit"])
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(step, asynchronous, trained, tmp_path, monkeypatch, capsys):
    failing(monkeypatch, step, {2})
    assert command(tmp_path, {"checkpoint.asynchronous": asynchronous}, "--out", tmp_path / "run") == 0
    events = [row["event"] for row in rows(tmp_path / "run") if "event" in row]
    assert len(events) == 1 and "samples-000000000600 not written: No space left on device" in events[0]
    assert len(saved(tmp_path / "run")) == len(saved(trained)) - 1
    assert all(not find_problems(path) for path in saved(tmp_path / "run"))
    assert list((tmp_path / "run").rglob("*.part")) == []


def test_a_full_disk_at_the_end_is_exit_code_4(trained, tmp_path, monkeypatch, capsys):
    last = len(saved(trained))
    with pytest.MonkeyPatch.context() as patch:
        failing(patch, "commit", {last})
        assert command(tmp_path, {}, "--out", tmp_path / "run") == 4
    assert (
        "unsaved: the last state is lost: checkpoint samples-000000001150 not written: No space left on device"
        in capsys.readouterr().err
    )
    assert [path.name for path in saved(tmp_path / "run")] == [path.name for path in saved(trained)[:-1]]
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert command(tmp_path, {}, "--out", tmp_path / "run", "--resume", "auto") == 0
    assert_same_bits(tmp_path / "run", trained)


def test_a_name_that_cannot_be_moved_loses_nothing(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "largebatch.training.run.check_folder", lambda *_: None
    )  # which refuses what is there at the start
    (tmp_path / "run" / "checkpoints" / "latest" / "in the way").mkdir(parents=True)
    assert command(tmp_path, {"checkpoint.keep_last": 1}, "--out", tmp_path / "run") == 0
    events = [row["event"] for row in rows(tmp_path / "run") if "event" in row]
    assert events and all("is whole, but: Is a directory" in event and "latest" in event for event in events)
    (path,) = saved(tmp_path / "run")
    assert path.name == saved(trained)[-1].name and not find_problems(path)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()


@contextmanager
def small_disk(path, size):
    """A file system of its own of so many bytes; skips where this process may not mount one."""
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a small disk is not permitted here")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_disk_that_fills_up(tmp_path, capsys):
    """A real one: room for one checkpoint and a half. What was whole stays so, no line is half written."""
    flags = {"model.hidden": [256, 256], "checkpoint.keep_last": 1}
    assert command(tmp_path, flags, "--out", tmp_path / "whole") == 0
    whole = saved(tmp_path / "whole")[-1]
    size = sum(path.stat().st_size for path in whole.iterdir())
    with small_disk(tmp_path / "disk", int(1.6 * size)) as disk:
        assert command(tmp_path, flags, "--out", disk / "run") in (2, 4)
        assert "No space left on device" in capsys.readouterr().err
        (path,) = saved(disk / "run")
        assert not find_problems(path)
        subprocess.run(["mount", "-o", f"remount,size={8 * size}", str(disk)], check=True)
        assert command(tmp_path, flags, "--out", disk / "run", "--resume", "auto") == 0
        assert_same_bits(disk / "run", tmp_path / "whole")


def test_a_disk_that_may_only_be_read(begun, tmp_path, capsys):
    with small_disk(tmp_path / "disk", "16m") as disk:
        shutil.copytree(begun, disk / "run")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for words in (("--out", disk / "run", "--resume", "auto"), ("--out", disk / "new")):
            assert "Read-only file system" in refused(tmp_path, capsys, *words)


# --- drill --------------------------------------------------------------------------------------------------------


def drill(*words):
    done = subprocess.run(
        [sys.executable, str(TESTS / "kill_drill.py"), *map(str, words)],
        capture_output=True,
        text=True,
        cwd=TESTS.parent,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_three_kills_leave_no_trace():
    assert "3 kills" in drill("--kills", 3, "--seed", 5)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_kills_leave_no_trace():
    assert "100 kills" in drill("--kills", 100, "--seed", 0)

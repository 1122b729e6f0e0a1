"""What is continued, branched off or refused."""

import json
import os
import shutil

import pytest
import torch
from resumed import (
    ADAMW,
    SHORT,
    _no_pictures,  # noqa: F401
    assert_close,
    assert_same_bits,
    assert_same_bits_of_tensors,
    begun,  # noqa: F401
    command,
    flip,
    refused,
    rows,
    saved,
    tensors,
    trained,  # noqa: F401
)
from runs import digits

from largebatch.checkpoint.folder import (
    MANIFEST,
    STATE,
    CheckpointFolder,
    describe_file,
    find_problems,
    samples_of,
)
from largebatch.data import TensorSamples
from largebatch.distributed import Ranks
from largebatch.errors import UserError
from largebatch.reporting.loggers import read_metrics
from largebatch.training.run import train


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

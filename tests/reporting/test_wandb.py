"""Weights & Biases, offline, read back from its own files: after a kill no row is lost, and none is there twice."""

import json

import pytest
from runs import digits

from largebatch.checkpoint.folder import CheckpointFolder
from largebatch.distributed import Ranks
from largebatch.errors import UserError
from largebatch.reporting.loggers import JsonLines, Loggers, WandB, _wandb_rows
from largebatch.training.run import train

wandb = pytest.importorskip("wandb")
RUN = digits(**{"log.trackers": ["wandb"]})


def kept(folder):
    """Return the rows of all parts of a run, as Weights & Biases holds them."""
    wandb.teardown()  # it writes in a process of its own
    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert len({path.name for path in files}) == 1  # of one id
    return [row for path in files for row in _wandb_rows(path)]


def row(samples, **values):
    return {"step": samples // 10, "samples": samples, "loss": 1.0 / samples, **values}


def part_of(folder, done, *counts):
    """Log rows behind a checkpoint after so many samples."""
    loggers = Loggers([JsonLines(folder / "metrics.jsonl"), WandB(RUN, folder, "name")])
    loggers.rewind(done)
    for samples in counts:
        loggers.log(row(samples))
        if samples % 50 == 0:
            loggers.log({"step": samples // 10, "samples": samples, "val_loss": 2.0 / samples})
    loggers.close()


def cut(folder, share):
    """Leave of the newest file what was written of it when a run was killed."""
    wandb.teardown()
    path = max(folder.glob("wandb/offline-run-*/run-*.wandb"))
    data = path.read_bytes()
    path.write_bytes(data[: 7 + int(share * (len(data) - 7))])
    begun = path.parent.name.split("-")
    path.parent.rename(
        path.parent.with_name("-".join([*begun[:2], "20260101_000000", begun[-1]]))
    )  # not within a second


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.95, 1.0])
def test_a_resumed_run_goes_on_behind_what_is_kept(share, tmp_path):
    whole = list(range(10, 210, 10))
    part_of(tmp_path, 0, *whole[:12])  # killed between a checkpoint after 50 samples and the next
    cut(tmp_path, share)
    part_of(tmp_path, 50, *whole[5:])
    rows = kept(tmp_path)
    assert [each["_step"] for each in rows] == [each["samples"] for each in rows] == whole
    assert [each["loss"] for each in rows] == [1.0 / samples for samples in whole]
    assert [each["samples"] for each in rows if "val_loss" in each] == [50, 100, 150, 200]


def test_a_run_that_returns_to_a_checkpoint_keeps_both_ways(tmp_path):
    """The rows after the return have samples that were there before: their steps go on, their axis is the samples."""
    loggers = Loggers([JsonLines(tmp_path / "metrics.jsonl"), WandB(RUN, tmp_path, "name")])
    loggers.rewind(0)
    for samples in (10, 20, 30):
        loggers.log(row(samples))
    loggers.rewind(10)
    for samples in (20, 30):
        loggers.log(row(samples))
    loggers.close()
    cut(tmp_path, 1.0)
    part_of(tmp_path, 20, 30, 40)  # and is resumed
    assert [(each["_step"], each["samples"]) for each in kept(tmp_path)] == [
        (10, 10), (20, 20), (30, 30), (40, 20), (50, 30), (60, 40)
    ]  # fmt: skip


def test_a_run_of_two_parts_has_the_rows_of_metrics_jsonl(tmp_path, monkeypatch):
    monkeypatch.setattr("largebatch.reporting.plots.plot_run", lambda *_: None)
    folder = tmp_path / "run"
    flags = {"checkpoint.every_minutes": None, "checkpoint.every_epochs": 0.5, "log.trackers": ["wandb"]}
    train(digits(**flags), folder, ranks=Ranks())
    for path in CheckpointFolder(folder / "checkpoints").saved()[1:]:
        path.rename(tmp_path / path.name)
    cut(folder, 0.6)
    train(digits(**flags), folder, ranks=Ranks(), resume="auto")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [each["_step"] for each in kept(folder)] == sorted({each["samples"] for each in rows})
    assert {each["samples"]: each["val_loss"] for each in kept(folder) if "val_loss" in each} == {
        each["samples"]: each["val_loss"] for each in rows if "val_loss" in each
    }


@pytest.mark.parametrize("name", ["a/b", "", "x" * 129, "50%"])
def test_a_project_that_is_no_name(name):
    with pytest.raises(UserError, match=r"log\.project"):
        digits(**{"log.project": name})

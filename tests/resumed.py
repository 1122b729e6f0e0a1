"""Runs that are stopped and resumed, and their checkpoints compared."""

import json
import shutil
from contextlib import contextmanager

import pytest
import yaml
from runs import digits

from largebatch.checkpoint.folder import MANIFEST, CheckpointFolder, describe_file
from largebatch.cli import main
from largebatch.distributed import Ranks, stopping
from largebatch.distributed.state import read_tensors, tensor_metadata
from largebatch.distributed.stopping import StopRequest
from largebatch.training import trainer as trainer_module
from largebatch.training.run import train

# A checkpoint every few updates, by samples and not by the clock.
OFTEN = {"checkpoint.every_minutes": None, "checkpoint.every_epochs": 0.25, "checkpoint.keep_last": 100}
ADAMW = {"optimizer.name": "adamw", "optimizer.lr": 1e-3}
SAMPLES = ADAMW | {"optimizer.second_moment": "sample"}


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


def flip(path, position=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 0x10
    path.write_bytes(content)


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


def refused(tmp_path, capsys, *words):
    assert command(tmp_path, {}, *words) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("largebatch: error: ") and "\n" not in error
    return error


def rewrite(path, name, data):
    """Change a file of a checkpoint, and its checksum."""
    (path / name).write_bytes(data)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"][name] = describe_file(path / name)
    (path / MANIFEST).write_text(json.dumps(manifest))

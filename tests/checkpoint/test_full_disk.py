"""Disks that are full, and kills at any moment: no run and no checkpoint is lost."""

import errno
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from resumed import (
    _no_pictures,  # noqa: F401
    assert_same_bits,
    begun,  # noqa: F401
    command,
    refused,
    rows,
    saved,
    trained,  # noqa: F401
)

from largebatch.checkpoint.folder import (
    CheckpointFolder,
    find_problems,
)

TESTS = Path(__file__).parents[1]


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

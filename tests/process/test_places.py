"""Disks that are full or closed, names that hold anything: a tracker or a picture ends no run, and text is text."""

from __future__ import annotations

import errno
import getpass
import json
import os
import signal
import sys
import tempfile
import threading
import types

import pytest
import yaml
from runs import digits
from safetensors import SafetensorError

from largebatch.checkpoint import folder as checkpoint
from largebatch.cli import main
from largebatch.config.file import load_config
from largebatch.distributed import Ranks
from largebatch.errors import UserError
from largebatch.process.surroundings import settle
from largebatch.reporting.loggers import JsonLines, Lenient, TensorBoard
from largebatch.reporting.tables import create_console
from largebatch.training.run import train

SHORT = {"schedule.epochs": 0.2, "evaluate.every_epochs": 0.2, "warmup.name": "none", "warmup.epochs": 0.0}
FULL = OSError(errno.ENOSPC, "No space left on device")


def fails(*_, **__):
    raise FULL


class Tracker:
    """Counts its rows; fails in one of its methods."""

    def __init__(self, where):
        self.where, self.rows = where, 0

    def _do(self, name):
        if name == self.where:
            raise FULL

    def log(self, row):
        self._do("log")
        self.rows += 1

    def sync(self):
        self._do("sync")

    def rewind(self, samples):
        self._do("rewind")

    def close(self):
        self._do("close")


@pytest.mark.parametrize("where", ["create", "log", "sync", "rewind", "close", "nowhere"])
def test_a_tracker_that_fails_is_told_of_once(where):
    told = []
    tracker = Lenient("wandb", fails if where == "create" else lambda: Tracker(where), told.append)
    tracker.rewind(0)
    for _ in range(3):
        tracker.log({"samples": 1})
        tracker.sync()
    tracker.close()
    tracker.close()
    assert len(told) == (where != "nowhere")
    assert all("wandb failed ([Errno 28] No space left on device); the run goes on without it" in line for line in told)


def test_what_a_user_can_mend_is_refused_before_the_run():
    def refuse():
        raise UserError("log.wandb_mode: run `wandb login`")

    with pytest.raises(UserError, match="wandb login"):
        Lenient("wandb", refuse, pytest.fail)


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_run_whose_tracker_cannot_write_finishes(tracker, tmp_path, monkeypatch, capsys):
    pytest.importorskip(tracker)
    kind = {"tensorboard": "TensorBoard", "wandb": "WandB"}[tracker]
    monkeypatch.setattr(f"largebatch.reporting.loggers.{kind}", fails)
    (tmp_path / "run.yaml").write_text(digits(**SHORT).to_yaml())
    words = ["--log.trackers", f"[{tracker}]", "--log.every_updates", "1"]
    assert main(["train", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "out"), *words]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert told.count(f"warning: log.trackers: {tracker} failed ([Errno 28] No space left on device)") == 1
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) > 1


def test_tensorboards_own_thread_is_silent(tmp_path, capsys, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    told = []
    tracker = Lenient("tensorboard", lambda: TensorBoard(tmp_path), told.append)
    inner = tracker.tracker.writer.file_writer.event_writer._async_writer._worker
    inner._record_writer = types.SimpleNamespace(write=fails, flush=fails)
    for samples in range(50):
        tracker.log({"samples": samples, "loss": 1.0})
        tracker.sync()
    tracker.close()
    assert len(told) == 1 and "Traceback" not in capsys.readouterr().err


def test_a_picture_that_cannot_be_drawn_fails_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("largebatch.reporting.plots.plot_run", fails)
    (tmp_path / "run.yaml").write_text(digits(**SHORT).to_yaml())
    assert main(["train", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "out")]) == 0
    assert "curve.png was not drawn: No space left on device" in " ".join(capsys.readouterr().out.split())
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("error", [FULL, SafetensorError("I/O error: Os { code: 28, kind: StorageFull }")])
def test_weights_that_cannot_be_written_are_one_line_and_can_be_had_later(error, tmp_path, monkeypatch):
    import safetensors.torch

    def half(_, path, __):
        path.write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", half)
        with pytest.raises(UserError, match=r"is finished, .* \(No space left on device\); .* --resume auto --out"):
            train(digits(**SHORT), tmp_path / "out", ranks=Ranks())
    assert not any(path.name.endswith(".part") or path.name == "summary.json" for path in (tmp_path / "out").iterdir())
    train(digits(**SHORT), tmp_path / "out", ranks=Ranks(), resume="auto")
    assert (tmp_path / "out" / "model.safetensors").exists() and (tmp_path / "out" / "summary.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_results_are_written_waits_for_them(number, tmp_path, monkeypatch):
    import safetensors.torch

    write, handler = safetensors.torch.save_file, signal.getsignal(number)

    def write_signalled(*arguments):
        assert signal.getsignal(number) != handler  # else this very process would end
        os.kill(os.getpid(), number)
        write(*arguments)

    monkeypatch.setattr(safetensors.torch, "save_file", write_signalled)
    assert train(digits(**SHORT), tmp_path / "out", ranks=Ranks()).summary.status == "finished"
    assert all((tmp_path / "out" / name).exists() for name in ("model.safetensors", "summary.json", "curve.png"))
    assert signal.getsignal(number) == handler


def test_a_lock_on_a_full_disk_still_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.platform, "node", fails)
    with (
        checkpoint.locked(tmp_path),
        pytest.raises(UserError, match="is being written by another process; stop it first"),
        checkpoint.locked(tmp_path, wait_seconds=0.3),
    ):
        pass


def test_metrics_that_cannot_be_opened_are_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written \(Is a directory\)"):
        JsonLines(tmp_path / "metrics.jsonl")


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """An environment without a user, a home and a place for temporary files."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME", "HOME", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "missing")])
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])


def test_libraries_find_a_user_a_home_and_a_place_for_temporary_files(bare, tmp_path):
    settle(tmp_path / "not" / "yet")
    assert getpass.getuser() == f"uid{os.getuid()}" and os.environ["HOME"] == "/"
    assert tempfile.gettempdir() == os.environ["TMPDIR"] == str(tmp_path)


def test_where_nothing_can_be_written_libraries_are_imported_all_the_same(bare):
    settle(None)
    assert tempfile.gettempdir() == "/tmp"


NAMES = {
    "dollars": "$NAME_$SEED",
    "a formula": "$\\frac{$",
    "brackets": "[bold]a[/b]",
    "a closing bracket": "[/]",
    "a number sign": "run #1",
    "percent": "100% %s {x} \\n",
    "an emoji code": ":heart:",
    "quotes": 'it\'s "so"',
    "spaces": "  a  b ",
    "an underscore": "_hidden",
    "a star": "*?[a-z]",
    "not Latin": "実験-試験",
    "bytes that are not UTF-8": os.fsdecode(b"\xff\xfe"),
    "a new line": "a\nb",
    "an escape": "a\x1b[31mb",
}


QUICK = ("dollars", "a closing bracket", "bytes that are not UTF-8", "a new line")


@pytest.mark.parametrize("kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in NAMES])
def test_a_run_folder_of_any_name(kind, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(digits(**SHORT).to_yaml())
    out = tmp_path / NAMES[kind]
    sys.stdout.reconfigure(errors="backslashreplace")
    assert main(["train", str(tmp_path / "run.yaml"), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert (out / "curve.png").stat().st_size > 10_000 and (out / "model.safetensors").exists()
    assert main(["inspect", str(out)]) == 0
    assert main(["train", str(tmp_path / "run.yaml"), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "already holds a run" in said
    if NAMES[kind].isprintable():
        assert NAMES[kind] in said
    else:
        assert "\x1b" not in said and ("\\x" in said or "\\u" in said or "\\n" in said)


def test_the_console_prints_text_as_it_is(capsys):
    console = create_console()
    for name in NAMES.values():
        if name.isprintable():
            console.print(f"run folder: {name}", highlight=False)
            assert f"run folder: {name}".rstrip() in capsys.readouterr().out


def test_a_name_that_is_not_utf_8_goes_through_a_config(tmp_path):
    name = os.fsdecode(b"photos-\xff")
    run = digits(data={"name": "text", "path": name}, model={"name": "gpt"})
    checkpoint.replace_text(tmp_path / "config.yaml", run.to_yaml())
    again, _ = load_config(tmp_path / "config.yaml")
    assert again.data.path == name and yaml.safe_load(run.to_yaml())["data"]["path"] == name


def test_a_study_with_names_of_any_kind_is_drawn(tmp_path):
    import numpy as np

    from largebatch.reporting.plots import plot_study
    from largebatch.studies.study import Cell

    class Line:
        epochs, val_loss = np.arange(1, 4), np.ones((2, 3))

        def __init__(self, number, name):
            self.cell = Cell("", name, "", number == 0)

    path = plot_study([Line(*pair) for pair in enumerate(NAMES.values())], tmp_path, "$x_{")
    assert path.stat().st_size > 10_000

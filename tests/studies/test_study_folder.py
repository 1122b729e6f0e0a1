"""The folder of a study: what is damaged in it, cannot be written to it, or dies on the way is one line."""

import json
import os
import signal
import sys

import pytest
from runs import digits

from largebatch.cli import main
from largebatch.errors import UserError
from largebatch.studies import study as study_module
from largebatch.studies.folder import check_study_folder, is_finished, read_summary, results_told
from largebatch.studies.study import read_variant

SUMMARY = {"status": "finished", "updates": 3, "samples": 96, "val_loss": 0.5, "val_accuracy": 0.9}
ROWS = [
    {"samples": 96, "step": 3, "epoch": 0.1, "loss": 0.7},
    {"samples": 96, "step": 3, "epoch": 0.1, "val_loss": 0.5},
]


@pytest.fixture
def seed(tmp_path):
    """The folder of the only run of a study."""
    folder = tmp_path / "study" / "small" / "seed-0"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    (folder / "config.yaml").write_text(digits().to_yaml())
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def replace(path, what):
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what is not None:
        path.write_bytes(what)


DAMAGE = {
    "summary.json": {
        b"x": "is no summary",
        b"[]": "is no summary",
        b"{}": "has no 'status'",
        "folder": "cannot be read",
        "pipe": "is no",
    },
    "config.yaml": {
        b"\xff": "it is no text",
        None: "No such file",
        "folder": "Is a directory",
        "pipe": "holds a run of another",
    },
    "metrics.jsonl": {
        b"": "metrics.jsonl has no evaluation",
        b"[[\n": "is no row of metrics",
        b'{"val_loss": 1}\n': "KeyError",
        None: "No such file",
        "folder": "Is a dir",
    },
}


@pytest.mark.parametrize(("name", "what"), [(name, what) for name, kinds in DAMAGE.items() for what in kinds])
def test_a_damaged_run_of_a_study_is_one_line(name, what, seed, tmp_path):
    config, out = digits(), tmp_path / "study"
    assert is_finished(config, seed) and read_summary(seed) == SUMMARY
    replace(seed / name, what)
    with pytest.raises(UserError) as raised, results_told(out):
        is_finished(config, seed)
        read_variant(study_module.Cell("", "small", "", True), [config], [0], out)
    assert DAMAGE[name][what] in str(raised.value)


def test_a_pipe_in_place_of_a_table_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "table.json")
    with pytest.raises(UserError, match=r"holds table.json, which no study wrote"):
        check_study_folder(tmp_path)


def test_a_table_that_cannot_be_written_is_one_line(tmp_path):
    with (
        pytest.raises(UserError, match=r"the results cannot be written \(Is a directory\); the runs are kept"),
        results_told(tmp_path),
    ):
        study_module.replace_text(tmp_path, "table")
    assert not list(tmp_path.parent.glob("*.part"))


def dies():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_run_of_a_study_that_is_killed_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "base.yaml").write_text(digits().to_yaml())
    (tmp_path / "study.yaml").write_text(
        "base: base.yaml\nseeds: [0]\nvariants: {small: {data.name: 'test_study_folder:dies'}}\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    assert main(["study", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out")]) == 6
    assert "a process that trained a run of the study died" in capsys.readouterr().err

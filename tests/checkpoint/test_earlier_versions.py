"""A run that an earlier version of the package began is inspected and continued by this one."""

import json
import shutil
from pathlib import Path

import pytest

from largebatch.cli import main

RUN = Path(__file__).parent / "runs_of_earlier_versions" / "0.1"  # AdamW on digits, stopped after 13 of 23 updates
VAL_LOSS, LOSS = 2.1737508634338805, 2.0961970679367643  # where that version ended it


def test_a_run_is_inspected(capsys):
    assert main(["inspect", str(RUN)]) == 0
    assert "13" in capsys.readouterr().out


def test_a_run_is_continued(tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(RUN, folder)
    assert main(["train", str(folder / "config.yaml"), "--out", str(folder), "--resume", "auto"]) == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["updates"]) == ("finished", 23)
    assert summary["val_loss"] == pytest.approx(VAL_LOSS, rel=1e-5)
    assert summary["loss"] == pytest.approx(LOSS, rel=1e-5)

"""Runs that start together: one folder each, or one run and a line for every other."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
from jobs import ROOT, environment

CONFIG = ROOT / "configs" / "digits.yaml"
SHORT = {"--schedule.epochs": "0.5", "--evaluate.every_epochs": "0.5", "--schedule.name": "constant"}


def start(folder, *words, ranks=1):
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    short = [word for pair in SHORT.items() if pair[0] not in words for word in pair]
    command = [*launcher, "largebatch", "train", str(CONFIG), *short, *map(str, words)]
    variables = environment(OMP_NUM_THREADS="1")
    return subprocess.Popen(
        command, cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def outcomes(processes):
    return [(process.communicate(timeout=240), process.returncode) for process in processes]


def test_runs_without_a_name_have_a_folder_each(tmp_path):
    found = outcomes([start(tmp_path, "--seed", seed) for seed in range(2)])
    assert [code for _, code in found] == [0] * 2, found
    folders = sorted((tmp_path / "runs").iterdir())
    assert len(folders) == 2
    seeds = {(folder / "config.yaml").read_text().split("seed: ")[1].split()[0] for folder in folders}
    assert seeds == {"0", "1"}
    assert all(json.loads((folder / "summary.json").read_text())["status"] == "finished" for folder in folders)


@pytest.mark.parametrize("resume", [[], pytest.param(["--resume", "auto"], marks=pytest.mark.slow)])
def test_of_runs_with_one_name_one_trains(resume, tmp_path):
    found = outcomes([start(tmp_path, "--seed", seed, "--out", tmp_path / "x", *resume) for seed in range(3)])
    codes = sorted(code for _, code in found)
    assert codes == [0, 2, 2], found
    for (_, error), code in found:
        if code == 2:
            assert error.count("\n") == 1 and "largebatch: error: --" in error, error
    assert json.loads((tmp_path / "x" / "summary.json").read_text())["status"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_eight_starts(ranks, tmp_path):
    """New, then resumed, in one folder: one run each time."""
    out = ["--out", tmp_path / "x", "--checkpoint.every_epochs", "0.1"]
    found = outcomes([start(tmp_path, *out, ranks=ranks) for _ in range(8)])
    assert sum(code == 0 for _, code in found) == 1, [code for _, code in found]
    (tmp_path / "x" / "summary.json").unlink()
    out += ["--resume", "auto"]
    found = outcomes([start(tmp_path, *out, ranks=ranks) for _ in range(8)])
    assert sum(code == 0 for _, code in found) >= 1, [code for _, code in found]
    rows = [json.loads(line) for line in (tmp_path / "x" / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == sorted(set(steps))


def test_a_mistake_leaves_no_folder(tmp_path):
    ((_, error), code), *_ = outcomes(
        [start(tmp_path, "--out", tmp_path / "x", "--backend.name", "ddp", "--model.fallback", "[nothing]")]
    )
    assert code == 2 and error.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_a_folder_that_is_moved_in_mid_run_is_told_of(tmp_path):
    process = start(tmp_path, "--out", tmp_path / "x", "--schedule.epochs", "400", "--log.every_updates", "1")
    metrics = tmp_path / "x" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    (tmp_path / "x").rename(tmp_path / "y")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "metrics.jsonl: was moved or removed while the run was writing it" in error and error.count("\n") == 1, error

"""The command line as a person uses it: real processes, torchrun among them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from largebatch.cli import main
from largebatch.reporting.loggers import read_metrics
from largebatch.studies.study import last_training_loss

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def run(*words, expect=0, **environment):
    """Run a process to its end; return what it printed."""
    done = subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**ENVIRONMENT, **environment},
        timeout=240,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout


def test_the_readmes_first_run(tmp_path):
    out = tmp_path / "run"
    printed = run(sys.executable, "-m", "largebatch", "train", "configs/digits.yaml", "--out", out)
    assert (
        "Reference to this run (rule: linear)" in printed and "Plan: 30 epochs" in printed and "Run finished" in printed
    )
    assert "left" in printed  # time left
    assert sorted(p.name for p in out.iterdir() if not p.name.startswith(".")) == [
        "checkpoints",
        "config.yaml",
        "curve.png",
        "metrics.jsonl",
        "model.safetensors",
        "summary.json",
    ]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["val_accuracy"] >= 0.96
    updates, evaluations = read_metrics(out / "metrics.jsonl")
    assert {
        "step",
        "samples",
        "epoch",
        "loss",
        "lr",
        "momentum",
        "batch_size",
        "temperature",
        "samples_per_second",
    } <= set(updates[0])
    assert {"step", "samples", "epoch", "val_loss", "val_accuracy"} <= set(evaluations[0])
    assert updates[0]["lr"] == pytest.approx(0.02) and max(row["lr"] for row in updates) == pytest.approx(
        0.16, rel=0.05
    )
    assert len(updates) == summary["updates"] == 169
    # The resolved config trains the same run again.
    resolved = yaml.safe_load((out / "config.yaml").read_text())
    assert resolved["optimizer"]["momentum"] == 0.9 and resolved["scaling"]["rule"] == "linear"
    assert main(["plan", str(out / "config.yaml")]) == 0


def test_torchrun_gives_the_curve_of_one_process(tmp_path):
    flags = ["configs/digits.yaml", "--schedule.epochs", "6", "--precision", "fp64"]
    run(sys.executable, "-m", "largebatch", "train", *flags, "--out", tmp_path / "one")
    printed = run(*TORCHRUN, "--standalone", "--nproc-per-node=2", "-m", "largebatch", "train", *flags,
                  "--batch.micro_size", "32", "--out", tmp_path / "two")  # fmt: skip
    assert printed.count("Run finished") == 1, "only rank 0 prints"
    assert "DistributedDataParallel" in printed
    (ones, evals), (twos, evals2) = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in twos] == pytest.approx([row[name] for row in ones], rel=1e-10)
    for name in ("val_loss", "val_accuracy"):
        assert [row[name] for row in evals2] == pytest.approx([row[name] for row in evals], rel=1e-10)


@pytest.mark.slow  # the next one does the same on two nodes
def test_launch_script(tmp_path):
    out = tmp_path / "run"
    flags = ["--schedule.epochs", "4", "--out", out]
    run("launch/torchrun.sh", "configs/digits.yaml", *flags, TORCHRUN=_torchrun(tmp_path), NPROC_PER_NODE="2")
    assert json.loads((out / "summary.json").read_text())["world_size"] == 2
    assert "NNODES" in run("launch/torchrun.sh", expect=2)


@pytest.mark.slow  # tests/launch/test_torchrun_sh.py has what it hands to torchrun
def test_launch_script_on_two_nodes(tmp_path):
    """Two agents that meet at an address, as on two hosts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    nodes = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NPROC_PER_NODE": "1"}
    words = ["launch/torchrun.sh", "configs/digits.yaml", "--schedule.epochs", "4", "--out", str(tmp_path / "run")]
    environment = {**ENVIRONMENT, **nodes, "TORCHRUN": _torchrun(tmp_path)}
    started = [
        subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    printed = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], printed
    assert sorted("Run finished" in text for text in printed) == [False, True], "only rank 0 prints"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["world_size"] == 2


def _torchrun(folder):
    """Return an executable that starts this environment's torchrun."""
    script = folder / "torchrun"
    script.write_text(f'#!/bin/sh\nexec {" ".join(TORCHRUN)} "$@"\n')
    script.chmod(0o755)
    return str(script)


def test_a_mistake_under_torchrun_is_one_line_a_node(tmp_path):
    done = subprocess.run(
        [*TORCHRUN, "--standalone", "--nproc-per-node=2", "-m", "largebatch", "train", "configs/digits.yaml", "--batch.size", "1"],
        capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, timeout=240,
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count("largebatch: error: batch.size: 1 cannot be split over 2 ranks") == 1


def test_goyal_plan(capsys):
    assert main(["plan", str(ROOT / "configs" / "imagenet_goyal_8k.yaml"), "--world-size", "256"]) == 0
    out = capsys.readouterr().out
    for expected in ("25,557,032", "0.1 │", "3.2 │", "14,076 updates", "0.1 → 3.196", "256 x 32 x 1"):
        assert expected in out, out
    lines = [line for line in out.splitlines() if "–" in line]
    assert len(lines) == 5
    for line, (first, last), lr in zip(
        lines, [(0, 5), (5, 30), (30, 60), (60, 80), (80, 90)], ["→", "3.2", "0.32", "0.032", "0.0032"], strict=True
    ):
        start, end = (float(word) for word in line.split("│")[1].split("–"))
        assert (start, end) == pytest.approx(
            (first, last), abs=0.01
        )  # a stage begins with the first update past its epoch
        assert lr in line


@pytest.mark.parametrize(
    ("flags", "updates"),
    [
        ([], "29,142"),
        (["--schedule.realize", "lr", "--batch.max_size", "null"], "78,125"),
        (["--batch.size", "640"], "6,407"),
        (["--batch.size", "3200", "--scaling.momentum", "0.98"], "2,305"),
    ],
)
def test_smith_plans(flags, updates, capsys):
    """29.1k, 78.1k, 6.4k and 2.3k updates, without the data at hand."""
    assert main(["plan", str(ROOT / "configs" / "cifar10_smith.yaml"), *flags]) == 0
    assert f"{updates} updates" in capsys.readouterr().out


def test_help_shows_this_runs_values(capsys):
    assert main(["train", str(ROOT / "configs" / "digits.yaml"), "--help", "--batch.size", "512"]) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if "--batch.size" in line)
    assert "512" in line and "int" in line
    assert "--optimizer.nesterov" in out and "--optimizer.betas" not in out
    assert main(["train", "--help"]) == 0


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_reads(path):
    from largebatch.config.file import load_config
    from largebatch.planner.derive import reference

    config, warnings = load_config(path)
    assert not warnings
    reference(config)
    head = path.read_text().splitlines()
    comments = [line for line in head if line.startswith("#")]
    for word in ("Data:", "Hardware:", "Command:"):
        assert any(word in line for line in comments), f"{path.name} says nothing of {word}"


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "studies").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_study_reads(path):
    from largebatch.studies.study import load_study

    study, runs = load_study(path, {})
    crossed = 1 + (len(study.variants) - 1) * max(1, len(study.methods))
    assert len(runs) == max(1, len(study.groups)) * crossed
    assert all(len(by_seed) == len(study.seeds) for by_seed in runs.values())


def test_trackers(tmp_path, monkeypatch):
    """Weights & Biases offline and TensorBoard, read back where that is possible."""
    pytest.importorskip("wandb")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    flags = ["--schedule.epochs", "2", "--log.trackers", "[wandb, tensorboard]", "--out", str(out)]
    assert main(["train", str(ROOT / "configs" / "digits.yaml"), *flags]) == 0
    assert list((out / "wandb").glob("offline-run-*/run-*.wandb"))
    events = accumulator.EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    updates, evaluations = read_metrics(out / "metrics.jsonl")
    for name, rows in (("loss", updates), ("lr", updates), ("val_loss", evaluations)):
        logged = events.Scalars(name)
        assert [event.step for event in logged] == [row["samples"] for row in rows]
        assert [event.value for event in logged] == pytest.approx([row[name] for row in rows], rel=1e-6)


def test_a_study_stops_at_its_first_mistake(tmp_path, capsys):
    """What waits is not begun: the fourth run asks for a batch beyond the data, a hundred wait behind it."""
    (tmp_path / "base.yaml").write_text((ROOT / "configs" / "digits.yaml").read_text())
    variants = {f"v {k}": {"batch.size": 64, "optimizer.lr": 0.001 * (k + 1)} for k in range(100)}
    variants["v 3"]["batch.size"] = 1_000_000
    study, flags = tmp_path / "study.yaml", ["--schedule.epochs", "0.1"]
    study.write_text(yaml.safe_dump({"base": "base.yaml", "seeds": [0], "variants": variants}, sort_keys=False))
    assert main(["study", str(study), "--out", str(tmp_path / "out"), *flags]) == 2
    said = capsys.readouterr()
    assert "batch.size: 1000000 is more than" in said.err and "stopping once the runs under way are done" in said.out
    assert 3 <= len(list((tmp_path / "out").glob("*/seed-0/summary.json"))) < 20


def test_study_help_trains_nothing(tmp_path, capsys):
    path = ROOT / "configs" / "studies" / "smith_small.yaml"
    assert main(["study", str(path), "--help", "--out", str(tmp_path / "out")]) == 0
    assert "usage: largebatch study" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_variants_that_would_share_a_folder(tmp_path, capsys):
    (tmp_path / "base.yaml").write_text((ROOT / "configs" / "digits.yaml").read_text())
    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump({"base": "base.yaml", "seeds": [0], "variants": {"a b": {}, "a-b": {}}}))
    assert main(["study", str(study), "--out", str(tmp_path / "out")]) == 2
    assert "names that give one folder: a-b" in capsys.readouterr().err


@pytest.mark.parametrize("warmup", [[], ["--warmup", "{name: gradual, epochs: 1, realize: batch}"]])
def test_the_reference_column_is_what_was_tuned(warmup, capsys):
    flags = ["--batch.size", "3200", "--scaling.momentum", "0.98", *warmup]
    assert main(["plan", str(ROOT / "configs" / "cifar10_smith.yaml"), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, expected in (("batch size", ["128", "3,200"]), ("learning rate", ["0.1", "0.5"])):
        line = next(line for line in lines if line.startswith(f"│ {name} "))
        assert [word.strip() for word in line.split("│")[2:4]] == expected


def test_study(tmp_path, capsys):
    """Two variants, two seeds; a second call finds everything done; a third, after a run is gone, trains that one alone."""
    (tmp_path / "base.yaml").write_text((ROOT / "configs" / "digits.yaml").read_text())
    study = tmp_path / "small.yaml"
    study.write_text(
        yaml.safe_dump(
            {
                "base": "base.yaml",
                "seeds": [0, 1],
                "set": {"schedule.epochs": 4, "warmup.epochs": 1, "evaluate.every_epochs": 1},
                "variants": {"B 32": {"batch.size": 32}, "B 128": {"batch.size": 128}},
                "methods": {"linear": {}, "unscaled": {"scaling.rule": "none"}},
            },
            sort_keys=False,
        )
    )
    out = tmp_path / "study"
    assert main(["study", str(study), "--out", str(out)]) == 0
    first = capsys.readouterr().out
    assert "6 runs, 0 of them finished before" in first
    rows = json.loads((out / "table.json").read_text())
    assert [row["variant"] for row in rows] == ["B 32", "B 128, linear", "B 128, unscaled"]
    linear, unscaled = (float(row["distance of the curve"]) for row in rows[1:])
    assert linear < unscaled and rows[0]["diverged"] == "0 of 2"
    table = (out / "table.md").read_text()
    assert table.startswith("| variant | batch size | updates |")
    assert "| group | variant | seed sd | linear | unscaled |" in table
    assert (out / "curves.png").stat().st_size > 10_000
    summary = out / "b-128-linear" / "seed-1" / "summary.json"
    summary.write_text(summary.read_text().replace('"finished"', '"interrupted"'))
    assert main(["study", str(study), "--out", str(out)]) == 0
    assert "6 runs, 5 of them finished before" in capsys.readouterr().out
    assert json.loads((out / "table.json").read_text()) == rows
    assert main(["study", str(study), "--out", str(tmp_path / "bad"), "--batch.size", "4096"]) == 2
    assert "batch.size: 4096 is more than the 1438 training samples" in capsys.readouterr().err
    assert main(["study", str(study), "--out", str(out), "--optimizer.lr", "0.01"]) == 2
    assert "holds a run of another config" in capsys.readouterr().err


def test_the_training_loss_at_the_end_is_a_mean_over_samples():
    updates = [{"samples": samples, "loss": loss} for samples, loss in ((10, 5.0), (20, 4.0), (40, 2.0), (50, 1.0))]
    assert last_training_loss(updates, [{"samples": 20}, {"samples": 50}]) == pytest.approx((20 * 2.0 + 10 * 1.0) / 30)
    assert last_training_loss(updates, [{"samples": 50}]) == pytest.approx((50 + 40 + 40 + 10) / 50)


@pytest.mark.slow  # tests/training/test_metering.py has the clock itself
def test_a_study_reads_adascale_on_its_clock(tmp_path):
    """The reference's 4 epochs are the other's too on its clock, of which it makes more in samples."""
    (tmp_path / "base.yaml").write_text((ROOT / "configs" / "digits.yaml").read_text())
    study = tmp_path / "clock.yaml"
    study.write_text(
        yaml.safe_dump(
            {
                "base": "base.yaml",
                "seeds": [0, 1],
                "set": {"schedule.epochs": 4, "warmup.name": "none", "warmup.epochs": 0, "evaluate.every_epochs": 0.5},
                "variants": {"B 32": {"batch.size": 32}, "B 128": {"batch.size": 128, "scaling.rule": "adascale"}},
            },
            sort_keys=False,
        )
    )
    out = tmp_path / "study"
    assert main(["study", str(study), "--out", str(out)]) == 0
    reference, ours = json.loads((out / "table.json").read_text())
    assert reference["samples"] == "5,752" and float(ours["samples"].split()[0].replace(",", "")) > 5752
    assert float(ours["distance of the curve"]) < 0.1
    evaluations = read_metrics(out / "b-128" / "seed-0" / "metrics.jsonl")[1]
    assert evaluations[-1]["clock_samples"] < evaluations[-1]["samples"]

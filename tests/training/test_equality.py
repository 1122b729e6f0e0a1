"""Whole runs of the committed configs under real torchrun: one curve whatever the ranks and micro-batches. Slow."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from largebatch.reporting.loggers import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[2]
SPLITS = [(2, None), (3, None), (4, None), (1, 8), (1, 32), (1, 64), (2, 32), (4, 8)]


def curve(world_size, micro, folder, config, flags):
    words = [sys.executable, "-m"]
    if world_size > 1:
        words += ["torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}", "-m"]
    words += [
        "largebatch",
        "train",
        str(ROOT / "configs" / config),
        "--out",
        str(folder),
        "--log.every_updates",
        "1",
        *flags,
    ]
    words += ["--batch.micro_size", str(micro)] if micro else []
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return read_metrics(folder / "metrics.jsonl")


def farthest(ours, theirs, name):
    """Return the largest relative distance of a value over the rows of two runs, and the one at the end."""
    gaps = [abs(a[name] - b[name]) / max(abs(b[name]), 1e-12) for a, b in zip(ours, theirs, strict=True)]
    return max(gaps), gaps[-1]


def compare(config, flags, precision, tmp_path, splits):
    expected = curve(1, None, tmp_path / "one", config, [*flags, "--precision", precision])
    print(
        f"\n{config}, {precision}, {len(expected[0])} updates: largest relative distance from one process, and at the end"
    )
    results = []
    for world_size, micro in splits:
        ours = curve(world_size, micro, tmp_path / f"{world_size}-{micro}", config, [*flags, "--precision", precision])
        gaps = {name: farthest(ours[name != "loss"], expected[name != "loss"], name) for name in ("loss", "val_loss")}
        print(
            f"  {world_size} ranks, micro-batch {micro}: "
            + ", ".join(f"{n} {a:.1e} {b:.1e}" for n, (a, b) in gaps.items())
        )
        results.append(gaps)
    return results


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_digits(precision, tmp_path):
    for gaps in compare("digits.yaml", [], precision, tmp_path, SPLITS):
        for largest, last in gaps.values():
            # float64: only the order of sums differs. float32: 1e-7 an operation, grown over 169 updates.
            assert largest < 1e-10 if precision == "fp64" else last < 1e-4


@pytest.mark.parametrize(
    ("precision", "rate"),
    [
        ("fp64", None),
        pytest.param(
            "fp32",
            None,
            marks=pytest.mark.xfail(
                reason="float32 rounding grows past 1e-4 at this rate: measured in docs/results.md"
            ),
        ),
        ("fp32", "0.0015"),
    ],
)
def test_fashion_mnist(precision, rate, tmp_path, data_folder):
    """At the config's own rate, and in float32 at a quarter of it too, where rounding does not grow as far."""
    flags = ["--data.path", str(data_folder / "fashion_mnist"), "--schedule.epochs", "1", "--warmup.epochs", "0.25"]
    flags += ["--data.num_train", "20000"] if precision == "fp64" else []
    flags += ["--optimizer.lr", rate] if rate else []
    for gaps in compare("fashion_mnist_cnn.yaml", flags, precision, tmp_path, SPLITS):
        for largest, last in gaps.values():
            assert largest < 1e-10 if precision == "fp64" else last < 1e-4

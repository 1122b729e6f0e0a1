"""Predicted and measured limits of the batch size: branches at 2 to 64 times the reference batch from checkpoints of runs.

    LARGEBATCH_DATA=FOLDER python benchmarks/branches.py --out DIR [--jobs 2] [--models mlp cnn gpt] [--optimizers adamw sgd]
        [--rates 0 1] [--seeds 0 1] [--moments 2048 8192 24576] [--kappas 2 4 8 16 32 64] [--ramp]

A reference run at a batch of 16, at a constant rate, is continued from each moment for 4,096 samples at 16 and at kappa times
16 by the linear rule, AdamW with second moments of the reference batch. With ``--ramp`` the batch doubles every 1,024 samples
before that, until it has come to kappa times 16: a momentum of small batches' gradients, multiplied by kappa at once, is a kick
that no run at a constant batch has. The gap is that of the validation loss at the end to
the reference continued. It counts where it passes the standard deviation of the reference's over three seeds, at 20,480
samples and later; kappa there is interpolated. Beside it stand the predictions: of `largebatch limit` (curvature, noise) and
of successive gradients, as the reference run logs it. Ends with DIR/branches.md and DIR/branches.png; what is there already is
not run again. FOLDER holds fashion_mnist/ and tinyshakespeare/input.txt. All of it takes about two hours on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from dataclasses import replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console

from largebatch.config.file import parse_config
from largebatch.config.schema import Config
from largebatch.data import DataSection, FashionMnist, Source, Text
from largebatch.data.sampler import SampleKeys
from largebatch.distributed import Ranks
from largebatch.reporting.loggers import read_metrics
from largebatch.studies.limit import measure_limit
from largebatch.training.run import train

REFERENCE, CONTINUED, STAGE, END, VALIDATION, SPREAD_SEEDS = 16, 4_096, 1_024, 28_672, 2_048, (0, 1, 2)
MODELS = {
    "mlp": {"name": "mlp", "hidden": [64, 32]},
    "cnn": {"name": "cnn", "channels": [16, 32, 32]},
    "gpt": {"name": "gpt", "n_layer": 2, "n_head": 2, "d_model": 32},
}
RATES = {
    ("mlp", "adamw"): (1e-3, 3e-4), ("cnn", "adamw"): (1e-3, 3e-4), ("gpt", "adamw"): (1e-3, 3e-3),
    ("mlp", "sgd"): (0.01, 0.003), ("cnn", "sgd"): (0.01, 0.003), ("gpt", "sgd"): (0.1, 0.03),
}  # fmt: skip


class First:
    """The first samples of a set."""

    def __init__(self, samples: Any, count: int) -> None:
        self.samples, self.count = samples, min(count, len(samples))

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, keys: SampleKeys) -> Any:
        return self.samples.__getitems__(keys)


def settings(cell: dict[str, Any], kappa: int, samples: float, every: int | None = None) -> Config:
    """Return the config of a run of so many samples, with a checkpoint after every so many."""
    num_train = len(source_of(cell["model"]).train)
    optimizer = {"name": cell["optimizer"], "lr": cell["lr"]}
    optimizer |= {"second_moment": "micro_batch"} if cell["optimizer"] == "adamw" else {"momentum": 0.9}
    checkpoint: dict[str, Any] = {"every_minutes": None}
    if every is not None:
        checkpoint |= {"every_epochs": every / num_train, "keep_last": END // every + 1}
    return parse_config({
        "seed": cell["seed"], "data": data_of(cell["model"]).model_dump(), "model": MODELS[cell["model"]],
        "optimizer": optimizer,
        "batch": {"reference_size": REFERENCE, "size": kappa * REFERENCE, "micro_size": 64 if kappa > 8 else None},
        "schedule": {"name": "constant", "epochs": samples / num_train}, "noise": {"measure": kappa == 1},
        "evaluate": {"every_epochs": CONTINUED / num_train if every else 1000.0}, "checkpoint": checkpoint,
    })  # fmt: skip


def data_of(model: str) -> DataSection:
    folder = Path(os.environ["LARGEBATCH_DATA"])
    if model == "gpt":
        return Text(path=str(folder / "tinyshakespeare/input.txt"), context=32)
    return FashionMnist(path=str(folder / "fashion_mnist"))


@cache
def source_of(model: str) -> Source:
    """Return a data set, with fewer validation samples."""
    source = data_of(model).load(0)
    return replace(source, val=First(source.val, VALIDATION))


def finished(
    cell: dict[str, Any], kappa: int, samples: int, folder: Path, resume: str = "never", every: int | None = None
) -> float:
    """Train a run unless it is there; return its validation loss, infinite where it diverged."""
    path = folder / "summary.json"
    if not path.exists():
        source = source_of(cell["model"])
        train(settings(cell, kappa, samples, every), folder, ranks=Ranks(), source=source, resume=resume)
    summary = json.loads(path.read_text())
    loss = summary["val_loss"]
    return math.inf if summary["status"] != "finished" or loss is None or not math.isfinite(loss) else loss


def name_of(cell: dict[str, Any]) -> str:
    return f"{cell['model']}-{cell['optimizer']}-{cell['lr']:g}-{cell['seed']}"


def measure(cell: dict[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of one model, optimizer, rate and seed."""
    torch.set_num_threads(1)
    folder = options.out / name_of(cell)
    kept = folder / "rows.json"
    if kept.exists():
        return json.loads(kept.read_text())
    every = math.gcd(*options.moments)
    finished(cell, 1, END, folder / "reference", every=every)
    if cell["seed"] not in options.seeds:
        return []
    updates = read_metrics(folder / "reference/metrics.jsonl")[0]
    rows = []
    for moment in options.moments:
        checkpoint = folder / f"reference/checkpoints/samples-{moment:012d}"
        (place,) = measure_limit(settings(cell, 1, END, every), checkpoint, 1_024, Console(quiet=True), Ranks())
        live = [row["stable_batch_size"] for row in updates if row["samples"] <= moment and "stable_batch_size" in row]
        losses, begun, end = {}, checkpoint, moment + CONTINUED
        if options.ramp:  # the last stage is of half of the largest
            end += STAGE * (int(math.log2(max(options.kappas))) - 1)
        for kappa in (1, *options.kappas):
            there = begun.exists()  # or the stage before has diverged
            losses[kappa] = finished(cell, kappa, end, folder / f"{moment}-{kappa}", str(begun)) if there else math.inf
            if options.ramp and there and 1 < kappa < max(options.kappas):
                stage, samples = folder / f"{moment}-{kappa}-stage", int(begun.name.partition("-")[2]) + STAGE
                finished(cell, kappa, samples, stage, str(begun))
                begun = stage / f"checkpoints/samples-{samples:012d}"
        rows.append({
            **cell, "samples": moment, "gaps": {kappa: losses[kappa] - losses[1] for kappa in options.kappas},
            "curvature": [size / REFERENCE for size in place.stable], "live": (live[-1] or math.inf) / REFERENCE,
            "noise": [size / REFERENCE for size in (place.noise.low, place.noise.noise_scale, place.noise.high)],
        })  # fmt: skip
        print(name_of(cell), moment, rows[-1]["curvature"][1], rows[-1]["gaps"], flush=True)
    kept.write_text(json.dumps(rows))
    return json.loads(kept.read_text())


def spread(cell: dict[str, Any], out: Path) -> float:
    """Return the standard deviation of the reference's validation loss over seeds, at 20,480 samples and later."""
    curves = []
    for seed in SPREAD_SEEDS:
        rows = read_metrics(out / name_of({**cell, "seed": seed}) / "reference/metrics.jsonl")[1]
        curves.append([row["val_loss"] for row in rows if row["samples"] >= 20_480])
    return float(np.sqrt(np.var(np.array(curves), axis=0, ddof=1).mean()))


def passes(gaps: dict[str, float], deviation: float) -> float:
    """Return the kappa at which the gap passes a deviation, between two by its logarithm; infinite where it never does."""
    before, gap_before = 1.0, 0.0
    for kappa, gap in ((float(k), g) for k, g in gaps.items()):
        if gap > deviation:
            share = (deviation - gap_before) / (min(gap, 1e3) - gap_before)
            return before * (kappa / before) ** share
        before, gap_before = kappa, max(gap, 0.0)
    return math.inf


def report(rows: list[dict[str, Any]], out: Path) -> None:
    """Write the table and the scatter."""
    kappas = list(rows[0]["gaps"])
    head = ["model", "optimizer, lr", "seed", "samples", "curvature", "live", "noise", "measured (sd)", *kappas]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    factors: dict[bool, list[list[float]]] = {True: [], False: []}
    points = []
    for row in rows:
        deviation = spread(row, out)
        found = passes(row["gaps"], deviation)
        shown = f"{found:.2g}" if math.isfinite(found) else f"> {kappas[-1]}"
        lines.append("| " + " | ".join([
            row["model"], f"{row['optimizer']}, {row['lr']:g}", str(row["seed"]), f"{row['samples']:,}",
            "{1:.2g} ({0:.2g} to {2:.2g})".format(*row["curvature"]), f"{row['live']:.2g}",
            "{1:.2g} ({0:.2g} to {2:.2g})".format(*row["noise"]), f"{shown} ({deviation:.3f})",
            *(f"{gap:+.3f}" for gap in row["gaps"].values()),
        ]) + " |")  # fmt: skip
        if math.isfinite(found):
            predictions = [row["curvature"][1], row["noise"][1], row["live"]]
            points.append((row, found, predictions))
            factors[row["samples"] >= END // 10].append([max(p / found, found / p) for p in predictions])
    for late, found in factors.items():
        if found:
            middle = [median(column) for column in zip(*found, strict=True)]
            better = median(min(row[:2]) for row in found)
            when = "After" if late else "In"
            lines += ["", f"{when} the first tenth of {END:,} samples, {len(found)} rows, median factor between prediction and "
                      f"measurement: curvature {middle[0]:.2f}, noise {middle[1]:.2f}, live {middle[2]:.2f}, the better of "
                      f"curvature and noise {better:.2f}."]  # fmt: skip
    (out / "branches.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    figure = Figure(figsize=(6, 5.5), layout="constrained")
    axis = figure.subplots()
    for index, (label, color) in enumerate((("curvature", "#2563a8"), ("noise", "#d9702b"), ("live", "#8a8f98"))):
        late = [row["samples"] >= END // 10 for row, *_ in points]
        x, y = np.array([p[index] for *_, p in points]), np.array([found for _, found, _ in points])
        for is_late, marker in ((True, "o"), (False, "x")):
            chosen = np.array(late) == is_late
            name = label if is_late else f"{label}, first tenth"
            axis.scatter(x[chosen], y[chosen], color=color, marker=marker, s=25, label=name)
    axis.plot([0.5, 100], [0.5, 100], color="#30343a", linewidth=0.8)
    axis.set(xscale="log", yscale="log", xlabel="predicted kappa", ylabel="kappa at which the gap passes a deviation")
    axis.legend(fontsize=8, frameon=False)
    figure.savefig(out / "branches.png", dpi=130)


def main() -> None:
    """Run what is missing and report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "sgd"], choices=["adamw", "sgd"])
    parser.add_argument("--rates", type=int, nargs="+", default=[0, 1], choices=[0, 1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], choices=SPREAD_SEEDS)
    parser.add_argument("--moments", type=int, nargs="+", default=[2_048, 8_192, 24_576])
    parser.add_argument("--kappas", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--ramp", action="store_true")
    options = parser.parse_args()
    if options.ramp and options.kappas != [2**i for i in range(1, len(options.kappas) + 1)]:
        parser.error("--ramp: expected --kappas 2 4 8 and so on")
    cells = [
        {"model": model, "optimizer": optimizer, "lr": RATES[model, optimizer][rate], "seed": seed}
        for model in options.models for optimizer in options.optimizers for rate in options.rates for seed in SPREAD_SEEDS
    ]  # fmt: skip
    with get_context("spawn").Pool(options.jobs) as pool:
        rows = [row for found in pool.starmap(measure, [(cell, options) for cell in cells], 1) for row in found]
    report(rows, options.out)


if __name__ == "__main__":
    main()

"""How long the second moment's average has to be: beta2 at 8 to 64 times the batch, in an own loop with `batch_size_invariant`.

    python benchmarks/beta2.py TEXT --out FILE.jsonl [--models bytes words gpt] [--lr 3e-4] [--ramp] [--seeds 0 1]
    python benchmarks/beta2.py TEXT --out FILE.jsonl --table

AdamW, tuned at a batch of 16, betas (0.9, beta2), constant learning rate. ``bytes`` and ``words`` are MLPs that predict the
next byte, or the next of the 5,000 commonest words, from those before; ``gpt`` is a small GPT. With ``--ramp`` the batch
doubles from 16 to its size over the first half of the run. A cell is the mean distance of the validation curve from the
reference's of the same seed, at 16 marks. *n units* trains with n backward passes an update. Each run is a line of the
file; what is there already is not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from words import MLP, numbered

import largebatch
from largebatch.models.gpt import GPT
from largebatch.scaling.schedules import Warmup

REFERENCE, VALIDATION, MARKS = 16, 1_024, 16
SAMPLES = {"bytes": 196_608, "words": 98_304, "gpt": 49_152}
BETAS, KAPPAS = (0.95, 0.98, 0.99, 0.999), (8, 16, 32, 64)
METHODS = ("1 unit", "2 units", "8 units", "square root", "square root, betas kept")


def problem(name: str, text: bytes) -> tuple[nn.Module, Tensor, int, bool]:
    """Return the model, all tokens, the tokens that it sees, and whether it predicts each of them."""
    if name == "words":
        return MLP(5_000, 4, 32, 64), numbered(text.decode(), 5_000), 4, False
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    if name == "bytes":
        return MLP(128, 16, 16, 256), tokens, 16, False
    return GPT(vocab_size=128, context=32, n_layer=2, n_head=2, d_model=32), tokens, 32, True


def run(setting: dict[str, Any], text: bytes) -> dict[str, Any]:
    """Train once; return the setting with the validation loss at every mark."""
    torch.set_num_threads(1)
    torch.manual_seed(setting["seed"])
    model, tokens, context, everywhere = problem(setting["model"], text)
    samples = SAMPLES[setting["model"]]
    mark = samples // MARKS
    split = len(tokens) * 9 // 10
    generator = torch.Generator().manual_seed(1000 + setting["seed"])
    starts = torch.randint(split - context - 1, (samples,), generator=generator)
    held_out = split + torch.randint(
        len(tokens) - split - context - 1, (VALIDATION,), generator=torch.Generator().manual_seed(1)
    )

    def loss(first: Tensor) -> Tensor:
        window = tokens[first[:, None] + torch.arange(context + 1)]
        logits = model(window[:, :-1])
        return F.cross_entropy(logits.flatten(0, -2), window[:, 1:].flatten() if everywhere else window[:, -1])

    kappa, method, beta2 = setting["kappa"], setting["method"], setting["beta2"]
    plain = torch.optim.AdamW(model.parameters(), setting["lr"], betas=(0.9, beta2))
    units = int(method.split()[0]) if "unit" in method else 0
    optimizer: Any = plain
    if units:
        optimizer = largebatch.batch_size_invariant(plain, reference_batch_size=REFERENCE, micro_batch_size=REFERENCE)
    warmup = Warmup("gradual", samples // 2, 1.0 / kappa, "batch") if setting["ramp"] else Warmup()
    seen, curve = 0, []
    while seen < samples:
        size = max(REFERENCE, round(kappa * REFERENCE * warmup.of_batch(seen)))
        if method.startswith("square root"):
            rule = {} if method == "square root" else {"beta1_rule": "keep", "beta2_rule": "keep"}
            reference = largebatch.Reference(
                REFERENCE, setting["lr"], betas=(0.9, beta2), eps=1e-8, rule="sqrt", **rule
            )
            plain.param_groups[0].update(reference.at(size))
        batch = starts[seen : seen + size]
        parts = batch.chunk(units or 1)
        for part in parts:
            (loss(part) / len(parts)).backward()
        if units:
            optimizer.set_batch(size)
        optimizer.step()
        optimizer.zero_grad()
        seen += size
        if seen // mark > len(curve):
            with torch.no_grad():
                curve.append(float(loss(held_out)))
            if not math.isfinite(curve[-1]):
                break
    return {**setting, "curve": curve}


def settings(models: list[str], seeds: list[int], lr: float, ramp: bool, methods: list[str]) -> list[dict[str, Any]]:
    """Return all runs, the references first."""
    rows = []
    for model in models:
        for beta2 in BETAS:
            for seed in seeds:
                common = {"model": model, "lr": lr, "beta2": beta2, "seed": seed}
                rows.append({**common, "kappa": 1, "method": "reference", "ramp": False})
                rows += [
                    {**common, "kappa": kappa, "method": method, "ramp": ramp} for kappa in KAPPAS for method in methods
                ]
    return rows


def table(rows: list[dict[str, Any]]) -> None:
    """Print a table for each model, learning rate, and way to the batch size."""

    def curves(**wanted: Any) -> dict[int, list[float]]:
        return {row["seed"]: row["curve"] for row in rows if all(row[key] == value for key, value in wanted.items())}

    for model, lr, ramp in dict.fromkeys((r["model"], r["lr"], r["ramp"]) for r in rows if r["kappa"] > 1):
        start = "the batch doubles from the reference's" if ramp else "large from the first update"
        print(f"\n{model}, lr {lr:g}, {start}\n")
        print(f"| beta2, kappa (sd of a seed) | {' | '.join(METHODS)} |\n|---|{'---|' * len(METHODS)}")
        for beta2, kappa in itertools.product(BETAS, KAPPAS):
            cell = {"model": model, "lr": lr, "beta2": beta2}
            references = curves(**cell, kappa=1)
            points = list(zip(*references.values(), strict=True))
            spread = fmean(stdev(values) for values in points) if len(references) > 1 else math.nan
            found = []
            for method in METHODS:
                distances = []
                for seed, curve in curves(**cell, kappa=kappa, method=method, ramp=ramp).items():
                    gaps = [abs(a - b) for a, b in zip(curve, references.get(seed, []), strict=False)]
                    distances.append(fmean(gaps) if len(gaps) == MARKS else math.inf)
                found.append(f"{fmean(distances):.4f}" if distances else "-")
            print(f"| {beta2:g}, {kappa} ({spread:.3f}) | {' | '.join(found)} |")


def _run(job: tuple[dict[str, Any], bytes]) -> dict[str, Any]:
    return run(*job)


def main() -> None:
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("text", type=Path, help="a text file")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["bytes", "words", "gpt"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--ramp", action="store_true", help="the batch doubles from the reference's over half of the run"
    )
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="only print the tables")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    done = [{key: value for key, value in row.items() if key != "curve"} for row in rows]
    missing = [
        s
        for s in settings(arguments.models, arguments.seeds, arguments.lr, arguments.ramp, arguments.methods)
        if s not in done
    ]
    if missing and not arguments.table:
        text = arguments.text.read_bytes()
        with get_context("spawn").Pool(arguments.processes) as pool, arguments.out.open("a") as file:
            for row in pool.imap(_run, [(setting, text) for setting in missing]):
                rows.append(row)
                file.write(json.dumps(row) + "\n")
                file.flush()
    table(rows)


if __name__ == "__main__":
    main()

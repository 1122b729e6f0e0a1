"""How long the second moment's average has to be: beta2 at 8 to 64 times the batch, in an own loop with `batch_size_invariant`.

    python benchmarks/beta2.py TEXT --out FILE.jsonl [--models bytes words gpt] [--seeds 0 1] [--processes 2]
    python benchmarks/beta2.py TEXT --out FILE.jsonl --table

AdamW, tuned at a batch of 16, betas (0.9, beta2). ``bytes`` and ``words`` are MLPs that predict the next byte, or the next of
the 5,000 commonest words, from those before; ``gpt`` is a small GPT whose batch doubles from 16 to its size over the first half
of the run. A cell is the mean distance of the validation curve from that of the reference, averaged over the seeds. Each run is
a line of the file; what is there already is not run again. All of it takes some 50 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import largebatch
from largebatch.models.gpt import GPT
from largebatch.schedules import Warmup

REFERENCE, VALIDATION, MARKS = 16, 1_024, 16
SAMPLES = {"bytes": 196_608, "words": 196_608, "gpt": 49_152}
BETAS, KAPPAS = (0.95, 0.98, 0.99, 0.999), (8, 16, 32, 64)
METHODS = ("2 units", "8 units", "square root", "square root, betas kept")


class MLP(nn.Module):
    """The next token from `context` tokens; logits [n, vocabulary]."""

    def __init__(self, vocabulary: int, context: int, width: int, hidden: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.Sequential(
            nn.Linear(context * width, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, vocabulary),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Run the module."""
        return self.layers(self.embedding(tokens).flatten(1))


def problem(name: str, text: bytes) -> tuple[nn.Module, Tensor, int, bool]:
    """Return the model, all tokens, the tokens that it sees, and whether it predicts each of them."""
    if name == "words":
        words = text.decode().split()
        kept = {word: index + 1 for index, (word, _) in enumerate(Counter(words).most_common(4_999))}
        return MLP(5_000, 4, 32, 64), torch.tensor([kept.get(word, 0) for word in words]), 4, False
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
    invariant = largebatch.batch_size_invariant(plain, reference_batch_size=REFERENCE, micro_batch_size=REFERENCE)
    units = int(method.split()[0]) if method.endswith("units") else 1
    if not method.endswith("units"):
        plain = invariant.to_torch()
    warmup = Warmup("gradual", samples // 2, 1.0 / kappa, "batch") if setting["model"] == "gpt" else Warmup()
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
        for part in batch.chunk(units):
            (loss(part) / units).backward()
        if method.endswith("units"):
            invariant.set_batch(size)
            invariant.step()
        else:
            plain.step()
        plain.zero_grad()
        seen += size
        if seen // mark > len(curve):
            with torch.no_grad():
                curve.append(float(loss(held_out)))
            if not math.isfinite(curve[-1]):
                break
    return {**setting, "curve": curve}


def settings(models: list[str], seeds: list[int], lr: float) -> list[dict[str, Any]]:
    """Return all runs, the references first."""
    rows = []
    for model in models:
        for beta2 in BETAS:
            for seed in seeds:
                common = {"model": model, "lr": lr, "beta2": beta2, "seed": seed}
                rows.append({**common, "kappa": 1, "method": "reference"})
                rows += [{**common, "kappa": kappa, "method": method} for kappa in KAPPAS for method in METHODS]
    return rows


def table(rows: list[dict[str, Any]]) -> None:
    """Print a table for each model."""

    def curves(**wanted: Any) -> list[list[float]]:
        return [row["curve"] for row in rows if all(row[key] == value for key, value in wanted.items())]

    for model in dict.fromkeys(row["model"] for row in rows):
        for lr in dict.fromkeys(row["lr"] for row in rows):
            print(
                f"\n{model}, lr {lr:g}\n\n| beta2, kappa (sd of a seed) | {' | '.join(METHODS)} |\n|---|{'---|' * len(METHODS)}"
            )
            for beta2 in BETAS:
                cell = {"model": model, "lr": lr, "beta2": beta2}
                references = curves(**cell, kappa=1)
                if not references:
                    continue
                mean = [fmean(values) for values in zip(*references, strict=True)]
                spread = (
                    fmean(stdev(values) for values in zip(*references, strict=True))
                    if len(references) > 1
                    else math.nan
                )
                for kappa in KAPPAS:
                    found = []
                    for method in METHODS:
                        distances = []
                        by_seed = zip(curves(**cell, kappa=kappa, method=method), references, strict=False)
                        for curve, reference in by_seed:
                            gaps = [abs(a - b) for a, b in zip(curve, reference, strict=False)]
                            distances.append(fmean(gaps) if len(curve) == len(mean) else math.inf)
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
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="only print the tables")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    done = [{key: value for key, value in row.items() if key != "curve"} for row in rows]
    missing = [s for s in settings(arguments.models, arguments.seeds, arguments.lr) if s not in done]
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

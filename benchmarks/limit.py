"""What measuring the share of the largest stable step costs beside the updates themselves, on the CPU.

    python benchmarks/limit.py --rounds 15 [--models mlp conv gpt] [--damping]

An optimizer that measures in every update and one that never does run in one process, interleaved, on one thread; the
difference of their medians, in two of 32 updates that are measured, is the cost in a run. With ``--damping``: of
damped steps beside plain ones, in every update. Times are the processor's.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from invariant import MODELS, TITLES, Step

import largebatch
from largebatch.optim.limit import EARLY_UPDATES, MEASURED_EVERY


def updater(name: str, every: int, damping: bool) -> Step:
    """Return a function that does one update of two micro-batches at four times the reference batch."""
    torch.manual_seed(0)
    build, make_inputs, make_targets = MODELS[name]
    model = build()
    inputs, targets = make_inputs().chunk(2), make_targets().chunk(2)
    optimizer = largebatch.batch_size_invariant(
        torch.optim.AdamW(model.parameters(), 1e-5),
        reference_batch_size=max(1, len(inputs[0]) // 2),
        micro_batch_size=len(inputs[0]),
        damping=damping,
    )
    optimizer._watch.every = every
    optimizer._progress.updates = EARLY_UPDATES

    def step() -> None:
        for x, y in zip(inputs, targets, strict=True):
            (F.cross_entropy(model(x), y) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    """Print a row for each model."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--models", nargs="+", default=["mlp", "conv", "gpt"])
    parser.add_argument("--damping", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.models:
        never = 10**9
        steps = [updater(name, never, False), updater(name, never if arguments.damping else 2, arguments.damping)]
        times: list[list[float]] = [[], []]
        for round_ in range(arguments.rounds + 2):
            for index, step in enumerate(steps):
                start = time.process_time()
                for _ in range(2):
                    step()
                if round_ >= 2:
                    times[index].append((time.process_time() - start) / 2)
        plain, other = (statistics.median(found) for found in times)
        share = (other / plain - 1.0) * (1.0 if arguments.damping else 2.0 / MEASURED_EVERY)
        print(f"{TITLES[name]:40} update {1e3 * plain:8.2f} ms, {1e3 * other:8.2f} ms: {100 * share:+.2f} % of a run")


if __name__ == "__main__":
    main()

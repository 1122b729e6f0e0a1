"""What a checkpoint costs: how long training stands still, how long the disk is busy, what updates take meanwhile.

    python benchmarks/checkpoint.py --threads 2 --rounds 3 --models resnet50 gpt

AdamW in one process, by the library's writer. A round is some updates alone, a synchronous save, an asynchronous one, and
updates until that is written; medians over rounds, so that what else the machine does falls on all alike. The share of
training time is what a save costs over `checkpoint.every_minutes` (10 by default): the stall, and what updates beside the
write take longer.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from largebatch.checkpoint.folder import CheckpointConfig, CheckpointFolder
from largebatch.checkpoint.writer import CheckpointWriter
from largebatch.distributed.state import named_state
from largebatch.models import GPT
from largebatch.models.resnet import ResNet50Config
from largebatch.optim import AdamW, param_groups
from largebatch.task import Task


def build(name: str, batch_size: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a model with a batch of its inputs and targets: ResNet-50 on 32 x 32 images, or GPT-2's smallest."""
    torch.manual_seed(0)
    if name == "resnet50":
        model = ResNet50Config().build(Task("classification", (3, 32, 32), 1000))
        return model, torch.randn(batch_size, 3, 32, 32), torch.randint(1000, (batch_size,))
    tokens = torch.randint(50257, (batch_size, 33))
    return GPT(50257, 1024, n_layer=12, n_head=12, d_model=768), tokens[:, :-1], tokens[:, 1:]


class Bench:
    """A model in training, and the writers that save it."""

    def __init__(self, name: str, batch_size: int, folder: Path) -> None:
        self.model, self.inputs, self.targets = build(name, batch_size)
        self.optimizer = AdamW(param_groups(self.model, 0.01), 1e-4)
        self.folder = CheckpointFolder(folder)
        self.writers = {
            mode: CheckpointWriter(self.folder, 0, 1, asynchronous=mode == "asynchronous") for mode in MODES
        }
        self.saves = 0

    def update(self) -> float:
        """Do an update; return its seconds."""
        began = time.perf_counter()
        outputs = self.model(self.inputs)
        F.cross_entropy(outputs.flatten(0, -2), self.targets.flatten()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - began

    def save(self, mode: str) -> tuple[float, float, list[float]]:
        """Save; return seconds of stall and of writing, and those of the updates that fell beside the writing."""
        writer, beside = self.writers[mode], []
        stalled, busy = writer.stalled_seconds, writer.busy_seconds
        self.saves += 1
        writer.save(self.saves, named_state(self.model, self.optimizer), {})
        while writer.thread is not None and writer.thread.is_alive():
            seconds = self.update()
            if writer.thread.is_alive():
                beside.append(seconds)
        writer.wait()
        if (failure := writer.failure()) is not None:
            raise SystemExit(failure)
        return writer.stalled_seconds - stalled, writer.busy_seconds - busy, beside

    def size(self) -> int:
        """Return the bytes of a checkpoint."""
        return sum(path.stat().st_size for path in self.folder.saved()[-1].iterdir())


MODES = ("synchronous", "asynchronous")


def measure(name: str, batch_size: int, rounds: int, folder: Path) -> list[str]:
    """Return the rows of the table for a model."""
    bench = Bench(name, batch_size, folder)
    bench.update()
    for mode in MODES:  # the first copy allocates its memory
        first_stall = bench.save(mode)[0]
    alone, beside = [], []
    stalls: dict[str, list[float]] = {mode: [] for mode in MODES}
    writing: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(rounds):
        alone += [bench.update() for _ in range(3)]
        for mode in MODES:
            stall, busy, updates = bench.save(mode)
            stalls[mode].append(stall)
            writing[mode].append(busy)
            beside += updates
    for writer in bench.writers.values():
        writer.close()
    parameters = sum(p.numel() for p in bench.model.parameters())
    update, update_beside = statistics.median(alone), statistics.median(beside) if beside else float("nan")
    interval = 60.0 * (CheckpointConfig().every_minutes or 10.0)
    rows = []
    for mode in MODES:
        stall, busy = statistics.median(stalls[mode]), statistics.median(writing[mode])
        slowed = busy * max(0.0, 1.0 - update / update_beside) if mode == "asynchronous" and beside else 0.0
        rows.append(
            f"| {name}, {parameters / 1e6:.1f} M | {bench.size() / 2**20:,.0f} MiB | {mode} | {stall:.2f} s "
            f"({stall / update:.2f} updates) | {busy:.2f} s | {update:.2f} s | "
            f"{f'{update_beside:.2f} s' if mode == 'asynchronous' else '-'} | {(stall + slowed) / interval:.2%} |"
        )
    rows.append(f"first asynchronous save of {name}, which allocates the copy: {first_stall:.2f} s")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["resnet50", "gpt"], choices=["resnet50", "gpt"])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary folder's disk)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| model | checkpoint | save | training stands still | writing | update | update beside it | of 10 minutes |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for name in options.models:
        folder = Path(tempfile.mkdtemp(dir=options.folder))
        try:
            print("\n".join(measure(name, options.batch_size, options.rounds, folder)), flush=True)
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()

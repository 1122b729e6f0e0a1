"""Throughput of the trainer against a training loop written by hand, on the same model and data.

    python benchmarks/throughput.py                                                one process
    torchrun --standalone --nproc-per-node=2 benchmarks/throughput.py              two ranks

Blocks of updates of the two alternate in one process; the table has the medians over blocks, and their ratio:
time by hand / time of the trainer, 1.0 where the trainer costs nothing. The loop by hand indexes tensors in memory, calls
torch.optim.SGD and reads its loss every 10 updates; the trainer does all it does in a run: plan, data loader, gradient norm and
the check for NaN, a row of metrics every 10 updates.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from largebatch.config.file import parse_config
from largebatch.config.schema import Config
from largebatch.data import Source, TensorSamples
from largebatch.distributed import Backend, create_backend, launched_ranks
from largebatch.planner.resolve import resolve
from largebatch.reporting.loggers import JsonLines
from largebatch.task import Task
from largebatch.training.run import build_model
from largebatch.training.trainer import Trainer

SAMPLES = 8192


@dataclass(frozen=True)
class Case:
    """A model, its data and its batch (global)."""

    model: dict[str, object]
    task: Task
    batch_size: int


def _mlp(batch_size: int) -> Case:
    return Case({"name": "mlp", "hidden": [1024, 1024]}, Task("classification", (1, 28, 28), 10), batch_size)


def _cnn(batch_size: int) -> Case:
    return Case({"name": "cnn"}, Task("classification", (1, 28, 28), 10), batch_size)


CASES = {
    "mlp 784-1024-1024-10, B 256": _mlp(256),
    "mlp 784-1024-1024-10, B 512": _mlp(512),
    "cnn 32-64-64 on 28x28, B 128": _cnn(128),
    "cnn 32-64-64 on 28x28, B 512": _cnn(512),
    "gpt 4 x 128, 64 tokens, B 16": Case({"name": "gpt"}, Task("language_modeling", (64,), 256), 16),
}


def random_source(task: Task, count: int) -> Source:
    """Return random samples of a task, kept in memory."""
    generator = torch.Generator().manual_seed(0)
    if task.kind == "language_modeling":
        tokens = torch.randint(task.num_outputs, (count, task.sample_shape[0] + 1), generator=generator)
        samples = TensorSamples(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    else:
        samples = TensorSamples(
            torch.randn(count, *task.sample_shape, generator=generator),
            torch.randint(task.num_outputs, (count,), generator=generator),
        )
    few = TensorSamples(samples.inputs[:2], samples.targets[:2])
    return Source(samples, few, task)


def config(case: Case, updates: int, count: int) -> Config:
    """Return a run of so many updates."""
    return parse_config(
        {
            "data": {"name": "digits"},  # stands in; the source is handed over
            "model": case.model,
            "batch": {"reference_size": case.batch_size, "size": case.batch_size},
            "optimizer": {"name": "sgd", "lr": 1e-3, "momentum": 0.9},
            "schedule": {"name": "constant", "epochs": updates * case.batch_size / count},
            "evaluate": {"every_epochs": 1e9},
        }
    )


def by_hand(model: torch.nn.Module, source: Source, batch_size: int, updates: int, rank: int, world_size: int) -> float:
    """Train a model with a plain loop; return the seconds it took."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    share = batch_size // world_size
    inputs, targets = source.train.inputs, source.train.targets
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    started = time.perf_counter()
    for update in range(updates):
        first = update * batch_size % (len(order) - batch_size) + rank * share
        chosen = order[first : first + share]
        outputs = model(inputs[chosen])
        loss = torch.nn.functional.cross_entropy(outputs.flatten(0, -2), targets[chosen].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if update % 10 == 9:
            loss.item()
    return time.perf_counter() - started


def by_trainer(case: Case, source: Source, backend: Backend, updates: int, folder: Path) -> float:
    """Train with the trainer; return the seconds its loop took."""
    run = resolve(config(case, updates, len(source.train)), len(source.train), backend.world_size)
    logger = JsonLines(folder / f"metrics-{backend.rank}.jsonl")
    trainer = Trainer(run, source, build_model(run.config, source.task), backend, logger=logger)
    started = time.perf_counter()
    summary = trainer.train()
    seconds = time.perf_counter() - started
    logger.close()
    assert summary.updates == updates, summary
    return seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=30, help="updates of one block")
    parser.add_argument("--blocks", type=int, default=15, help="blocks of each of the two")
    parser.add_argument("--json", type=Path, help="write the results there too")
    options = parser.parse_args()
    ranks = launched_ranks()
    torch.set_num_threads(max(1, torch.get_num_threads() // ranks.world_size))
    backend = create_backend(config(next(iter(CASES.values())), 1, 1024).backend, "fp32", ranks)
    rows = {}
    for name, case in CASES.items():
        source = random_source(case.task, SAMPLES)
        hand, ours = [], []
        with tempfile.TemporaryDirectory() as folder:
            for block in range(options.blocks + 1):
                model = build_model(config(case, 1, SAMPLES), case.task)
                wrapped = (
                    DistributedDataParallel(model, gradient_as_bucket_view=True) if ranks.world_size > 1 else model
                )
                pair = [
                    lambda w=wrapped, s=source, c=case: by_hand(
                        w, s, c.batch_size, options.updates, ranks.rank, ranks.world_size
                    ),
                    lambda s=source, c=case, f=folder: by_trainer(c, s, backend, options.updates, Path(f)),
                ]
                times = [0.0, 0.0]
                for which in (0, 1) if block % 2 else (1, 0):
                    backend.barrier()
                    times[which] = pair[which]()
                if block:  # the first pair warms up
                    hand.append(times[0])
                    ours.append(times[1])
        rows[name] = (statistics.median(hand), statistics.median(ours))
        del wrapped, model
    if ranks.rank == 0:
        print(f"torch {torch.__version__}, {ranks.world_size} rank(s), {torch.get_num_threads()} thread(s) each")
        print("| model | by hand, ms per update | trainer, ms per update | ratio |\n|---|---|---|---|")
        for name, (hand_s, ours_s) in rows.items():
            per = 1000 / options.updates
            print(f"| {name} | {hand_s * per:.2f} | {ours_s * per:.2f} | {hand_s / ours_s:.3f} |")
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1))
    backend.close()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

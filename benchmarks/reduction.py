"""What squares of micro-batches cost under DistributedDataParallel, by how they travel.

    torchrun --nproc-per-node 2 benchmarks/reduction.py [--models mlp conv gpt] [--passes 1] [--rounds 21]

or with torchrun's rendezvous options on several hosts. Times are of forward and backward passes and all reductions of
an update, one thread a process; plain is the same without squares, and "plain again" a second such model: how far ratios can be
trusted. All ways run in one process, interleaved; ratios are of medians. Bytes are what one rank hands to its all-reduces.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from second_moments import GPT, MODELS, TITLES

from largebatch.distributed import launched_ranks
from largebatch.distributed.ddp import DataParallel

# Ways of the squares: title -> (type in which they travel, updates between two measurements of the variance).
WAYS = {
    "float32": (torch.float32, 1),
    "bfloat16": (torch.bfloat16, 1),
    "float32, every 4": (torch.float32, 4),
    "bfloat16, every 8": (torch.bfloat16, 8),
    "plain again": (torch.float32, 1),
}
UPDATES = 8  # in one timed run: one of them measures the variance where that is done every 8

MODELS["gpt10"] = (
    lambda: GPT(512, 256, 12),
    lambda: torch.randint(0, 512, (8, 128)),
    lambda: torch.randint(0, 512, (8, 128)),
)
TITLES["gpt10"] = "GPT, 12 blocks d=256, 10 M, 8 x 128"


class Replica:
    """A model under DistributedDataParallel, with squares in one of the ways or without."""

    def __init__(self, name: str, way: str | None, passes: int):
        torch.manual_seed(0)
        build, make_inputs, make_targets = MODELS[name]
        self.inputs, self.targets, self.passes = make_inputs(), make_targets(), passes
        dtype, every = (torch.float32, 1) if way is None else WAYS[way]
        self.engine = DataParallel(launched_ranks(), torch.device("cpu"), "fp32", False, dtype, every)
        model = build()
        if way not in (None, "plain again"):
            self.engine.track(model, "micro_batch")
        self.model, self.optimizer = self.engine.prepare(model, lambda m: torch.optim.SGD(m.parameters(), 0.1))
        self.update = 0

    def run(self) -> None:
        """Do the passes and reductions of a few updates."""
        for _ in range(UPDATES):
            self.optimizer.zero_grad()
            self.engine.begin_update(64, 2.0 * self.passes, self.update)
            for index in range(self.passes):
                with self.engine.accumulate(sync=index == self.passes - 1):
                    self.engine.backward(F.cross_entropy(self.model(self.inputs), self.targets) / self.passes)
            self.update += 1

    def count_bytes(self) -> float:
        """Return the bytes that one update hands to the all-reduce."""
        counted = [4 * UPDATES * sum(p.numel() for p in self.model.parameters())]  # DDP's do not come by here
        all_reduce = dist.all_reduce

        def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            counted.append(tensor.numel() * tensor.element_size())
            return all_reduce(tensor, *args, **kwargs)

        dist.all_reduce = counting
        self.run()
        dist.all_reduce = all_reduce
        return sum(counted) / UPDATES


def compare(name: str, rounds: int, passes: int) -> None:
    """Time the replicas in turn; rank 0 prints."""
    replicas = {way: Replica(name, way or None, passes) for way in ("", *WAYS)}
    sizes = {way: replica.count_bytes() for way, replica in replicas.items()}
    times: dict[str, list[float]] = {way: [] for way in replicas}
    for _ in range(rounds):
        for way, replica in replicas.items():
            dist.barrier()
            start = time.perf_counter()
            replica.run()
            times[way].append((time.perf_counter() - start) / UPDATES)
    if dist.get_rank() == 0:
        medians = {way: statistics.median(values) for way, values in times.items()}
        cells = [f"{medians[way] / medians['']:.2f} ({sizes[way] / 1e6:.1f} MB)" for way in WAYS]
        plain = f"{1e3 * medians['']:.1f} ({sizes[''] / 1e6:.1f} MB)"
        print(f"| {TITLES[name]} | {plain} | " + " | ".join(cells) + " |", flush=True)
    for replica in replicas.values():
        replica.engine.wrapper = None
    gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["mlp", "conv", "gpt"])
    parser.add_argument("--passes", type=int, default=1, help="micro-batches of an update on each rank")
    parser.add_argument("--rounds", type=int, default=21, help="interleaved runs of every way")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        print(
            f"torch {torch.__version__}, {dist.get_world_size()} gloo ranks of one thread, {options.passes} passes a rank"
        )
        print("| model (batch per pass) | plain, ms | " + " | ".join(WAYS) + " |")
        print("|" + "---|" * (len(WAYS) + 2), flush=True)
    for name in options.models:
        compare(name, options.rounds, options.passes)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

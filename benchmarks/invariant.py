"""What `largebatch.batch_size_invariant` costs beside the optimizer that it is given, on the CPU.

    python benchmarks/invariant.py --threads 2 --rounds 21 [--models mlp conv resnet18 vit gpt] [--passes 2]
    python benchmarks/invariant.py --update           the step alone, with 25 million parameters
    python benchmarks/invariant.py --memory           what one update adds to a fresh process
    torchrun --nproc-per-node 2 benchmarks/invariant.py --threads 1        DistributedDataParallel over gloo

Times are of an update: ``--passes`` forward and backward passes, each of a micro-batch, and a step. Plain is
torch.optim.AdamW(foreach=True); the line is given torch.optim.AdamW, for which it runs torch's fused update on a CPU, or with
``--foreach`` the same as plain. Both run in one process, interleaved; a ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import resource
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from second_moments import MODELS, TITLES
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import largebatch
from largebatch.optim.invariant import NOISE_FIRST

Step = Callable[[], None]


class ViT(nn.Module):
    """A vision transformer on 32 x 32 images, with nn.MultiheadAttention."""

    def __init__(self, width: int = 192, depth: int = 6):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.positions = nn.Parameter(0.02 * torch.randn(64, width))
        block = nn.TransformerEncoderLayer(width, 3, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        return self.head(self.blocks(self.patches(images).flatten(2).mT + self.positions).mean(1))


MODELS["vit"] = (ViT, lambda: torch.randn(32, 3, 32, 32), lambda: torch.randint(0, 10, (32,)))
TITLES["vit"] = "ViT, 6 blocks d=192, 32 x 3x32x32"


def updater(name: str, invariant: bool, passes: int, beta2: float, foreach: bool = True) -> Step:
    """Return a function that does one update; its batch is that of the model's title, in micro-batches."""
    torch.manual_seed(0)
    build, make_inputs, make_targets = MODELS[name]
    model = build()
    inputs, targets = make_inputs().chunk(passes), make_targets().chunk(passes)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(
        model.parameters(), 1e-4, betas=(0.9, beta2), foreach=foreach or not invariant or None
    )
    if invariant:
        micro = len(inputs[0])
        optimizer = largebatch.batch_size_invariant(optimizer, reference_batch_size=micro, micro_batch_size=micro)
    wrapped = DistributedDataParallel(model) if dist.is_initialized() else model

    def step() -> None:
        for index, (x, y) in enumerate(zip(inputs, targets, strict=True)):
            last = index == passes - 1 or not dist.is_initialized()
            with nullcontext() if last else wrapped.no_sync():
                (F.cross_entropy(wrapped(x), y) / passes).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def update_alone(invariant: bool, passes: int, beta2: float, foreach: bool = True) -> Step:
    """Return a function that does the step with 25 million parameters, after hooks that are not timed."""
    params = [nn.Parameter(torch.randn(1000, 1000)) for _ in range(25)]
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(
        params, 1e-4, betas=(0.9, beta2), foreach=foreach or not invariant or None
    )
    if invariant:
        optimizer = largebatch.batch_size_invariant(optimizer, reference_batch_size=1, micro_batch_size=1)
    return Timed(params, optimizer, passes)


class Timed:
    """Leaves gradients by backward passes, and times the step."""

    def __init__(self, params: list[nn.Parameter], optimizer: torch.optim.Optimizer, passes: int):
        self.params, self.optimizer, self.passes = params, optimizer, passes

    def __call__(self) -> float:
        """Return the seconds of one step."""
        for _ in range(self.passes):
            sum((p * p).sum() for p in self.params).backward()  # type: ignore[union-attr]
        start = time.perf_counter()
        self.optimizer.step()
        seconds = time.perf_counter() - start
        self.optimizer.zero_grad()
        return seconds


def interleaved(steps: list[Callable[[], float | None]], rounds: int) -> list[list[float]]:
    """Return each function's times, in seconds: its own where it returns them; the last one is that with the line."""
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(NOISE_FIRST):  # in which the noise scale is measured every time
        steps[-1]()
    for round_ in range(rounds + 2):
        order = range(len(steps)) if round_ % 2 else reversed(range(len(steps)))
        for index in order:
            start = time.perf_counter()
            own = steps[index]()
            seconds = time.perf_counter() - start if own is None else own
            if round_ >= 2:
                times[index].append(seconds)
    return times


def peak(name: str, invariant: bool, passes: int) -> float:
    """Return the MiB that updates add to a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (name, invariant, passes))


def _peak(name: str, invariant: bool, passes: int) -> float:
    torch.set_num_threads(1)
    step = updater(name, invariant, passes, 0.999)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    """Print a row for each model."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--passes", type=int, nargs="+", default=[2])
    parser.add_argument("--models", nargs="+", default=["mlp", "conv", "resnet18", "vit", "gpt"])
    parser.add_argument("--update", action="store_true")
    parser.add_argument(
        "--beta2", type=float, default=0.999, help="below 0.99 averages are carried, of two passes or more"
    )
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--foreach", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", "the batch of")
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    rank = dist.get_rank() if dist.is_initialized() else 0
    for name in ["update alone, 25 M parameters"] if arguments.update else arguments.models:
        for passes in arguments.passes:
            title = f"{TITLES.get(name, name)}, {passes} pass{'es' * (passes > 1)}"
            if arguments.memory:
                megabytes = sum(p.numel() for p in MODELS[name][0]().parameters()) * 4 / 2**20
                plain, ours = (peak(name, invariant, passes) for invariant in (False, True))
                print(f"{title}: parameters {megabytes:.1f} MiB, plain {plain:.1f}, with the line {ours:.1f}")
                continue
            beta2, foreach = arguments.beta2, arguments.foreach
            steps = [
                update_alone(i, passes, beta2, foreach)
                if arguments.update
                else updater(name, i, passes, beta2, foreach)
                for i in (False, True)
            ]
            plain_times, our_times = interleaved(steps, arguments.rounds)
            plain, ours = statistics.median(plain_times), statistics.median(our_times)
            if rank == 0:
                print(
                    f"{title}: {1e3 * plain:.1f} ms, with the line {1e3 * ours:.1f} ms, ratio {ours / plain:.3f}",
                    flush=True,
                )
            del steps
            gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

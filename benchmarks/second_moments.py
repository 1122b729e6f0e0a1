"""What squares of samples cost: forward and backward against the plain model, medians of interleaved runs.

    python benchmarks/second_moments.py --threads 2 --rounds 15 --models mlp conv resnet18 gpt vit --memory

*A sixteenth* squares that share of each batch's samples, as an update of 256 samples does by default (`squares_samples`).
BackPACK (SumGradSquared), Opacus (grad_sample, squared) and torch.func (vmap of grad, squared) run beside it where they
are installed and support the model. Peak memory is what two forward and backward passes add to a fresh process.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import multiprocessing
import os
import statistics
import time
import warnings
from collections.abc import Callable
from multiprocessing.queues import Queue
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from largebatch.models import resnet50
from largebatch.moments import track

Step = Callable[[], None]


class Block(nn.Module):
    """Attention and a two-layer network, each behind a layer norm."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Run the module."""
        batch, time_, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, time_, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, time_, width)
        x = x + self.out(y)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A decoder on token indices [n, t]; logits [n, vocabulary, t]."""

    def __init__(self, vocabulary: int = 65, width: int = 256, depth: int = 4, time_: int = 128):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(time_, width)
        self.blocks = nn.Sequential(*[Block(width, 4) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, indices: Tensor) -> Tensor:
        """Run the module."""
        x = self.tokens(indices) + self.positions(torch.arange(indices.shape[1], device=indices.device))
        return self.head(self.norm(self.blocks(x))).transpose(1, 2)


class Residual(nn.Module):
    """The basic block of ResNet-18."""

    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.short: nn.Module = nn.Identity()
        if stride > 1 or channels_in != channels_out:
            self.short = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Run the module."""
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.short(x))


def resnet18() -> nn.Module:
    """ResNet-18 for 32 x 32 images: no pooling at the stem."""
    widths = [64, 64, 64, 128, 128, 256, 256, 512, 512]
    blocks = [Residual(a, b, 2 if a != b else 1) for a, b in itertools.pairwise(widths)]
    stem = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def conv_stack() -> nn.Module:
    widths = [3, 64, 64, 128, 128, 256, 256]
    layers: list[nn.Module] = []
    for index, (a, b) in enumerate(itertools.pairwise(widths)):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU()]
        if index % 2:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256 * 16, 10))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))


class ViT(nn.Module):
    """A vision transformer with nn.MultiheadAttention, on 32 x 32 images in patches of 4."""

    def __init__(self, width: int = 192, depth: int = 6):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token, self.positions = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(1, 65, width))
        layer = nn.TransformerEncoderLayer(width, 3, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Run the module."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.blocks(x)[:, 0])


# name -> (model, inputs, targets)
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], Callable[[], Tensor]]] = {
    "mlp": (mlp, lambda: torch.randn(256, 784), lambda: torch.randint(0, 10, (256,))),
    "conv": (conv_stack, lambda: torch.randn(32, 3, 32, 32), lambda: torch.randint(0, 10, (32,))),
    "resnet18": (resnet18, lambda: torch.randn(32, 3, 32, 32), lambda: torch.randint(0, 10, (32,))),
    "gpt": (GPT, lambda: torch.randint(0, 65, (16, 128)), lambda: torch.randint(0, 65, (16, 128))),
    "vit": (ViT, lambda: torch.randn(32, 3, 32, 32), lambda: torch.randint(0, 10, (32,))),
    "resnet50": (lambda: resnet50(1000), lambda: torch.randn(16, 3, 224, 224), lambda: torch.randint(0, 1000, (16,))),
}
TITLES = {
    "mlp": "MLP 784-1024-1024-10, 256",
    "conv": "6 conv layers 64-256 channels, 32 x 3x32x32",
    "resnet18": "ResNet-18, 32 x 3x32x32",
    "gpt": "GPT, 4 blocks d=256, 16 x 128 tokens",
    "vit": "ViT, 6 blocks d=192, nn.MultiheadAttention, 32 x 3x32x32",
    "resnet50": "ResNet-50, 16 x 3x224x224",
}


def plain(model: nn.Module, inputs: Tensor, targets: Tensor) -> Step:
    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        F.cross_entropy(model(inputs), targets).backward()

    return step


def ours(model: nn.Module, inputs: Tensor, targets: Tensor) -> Step:
    return plain(track(model), inputs, targets)


def ours_share(model: nn.Module, inputs: Tensor, targets: Tensor) -> Step:
    return plain(track(model, samples=max(1, len(inputs) // 16)), inputs, targets)


def ours_micro_batch(model: nn.Module, inputs: Tensor, targets: Tensor) -> Step:
    return plain(track(model, per="micro_batch"), inputs, targets)


def backpack(model: nn.Module, inputs: Tensor, targets: Tensor) -> Step:
    from backpack import backpack as extensions
    from backpack import extend
    from backpack.extensions import SumGradSquared

    extend(model)
    loss = extend(nn.CrossEntropyLoss())

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        with extensions(SumGradSquared()):
            loss(model(inputs), targets).backward()

    return step


def opacus(model: nn.Module, inputs: Tensor, targets: Tensor) -> Step:
    from opacus import GradSampleModule

    wrapped = GradSampleModule(model)

    def step() -> None:
        for parameter in wrapped.parameters():
            parameter.grad = parameter.grad_sample = None
        F.cross_entropy(wrapped(inputs), targets).backward()
        for parameter in wrapped.parameters():
            parameter.grad_sample.square().sum(0)

    return step


def vmap(model: nn.Module, inputs: Tensor, targets: Tensor) -> Step:
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, values, (x.unsqueeze(0),)), y.unsqueeze(0))

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0), randomness="different")

    def step() -> None:
        for grads in per_sample(parameters, inputs, targets).values():
            grads.mean(0)
            grads.square().sum(0)

    return step


METHODS = {"plain": plain, "all samples": ours, "a sixteenth": ours_share, "micro_batch": ours_micro_batch}
METHODS |= {"BackPACK": backpack, "Opacus": opacus, "vmap": vmap}


def prepare(name: str, method: str) -> Step:
    torch.manual_seed(0)
    build, inputs, targets = MODELS[name]
    return METHODS[method](build(), inputs(), targets())


def _resident(field: str) -> float:
    """Return VmRSS (resident memory now) or VmHWM (its peak) of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def _peak(name: str, method: str, threads: int, queue: Queue[float]) -> None:
    torch.set_num_threads(threads)
    step = prepare(name, method)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the present
    before = _resident("VmRSS")
    for _ in range(2):
        step()
    queue.put(_resident("VmHWM") - before)


def peak_memory(name: str, method: str, threads: int) -> float:
    """Return the growth of peak resident memory over two steps, in MiB, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak, args=(name, method, threads, queue))
    process.start()
    process.join()
    return queue.get() if process.exitcode == 0 else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=15, help="interleaved runs of every method")
    parser.add_argument(
        "--slow_rounds", type=int, default=3, help="runs of a method over 10 times the plain model's time"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: processor time, for one thread on a busy machine"
    )
    parser.add_argument("--memory", action="store_true", help="measure peak memory as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    # The libraries' warnings are not about this table; the variable reaches the processes that are started.
    warnings.simplefilter("ignore")
    os.environ["PYTHONWARNINGS"] = "ignore"
    logging.disable(logging.WARNING)
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    methods = ["plain", *[m for m in options.methods if m != "plain"]]
    print(
        f"torch {torch.__version__}, {options.threads} threads, {options.clock} time, float32; "
        "forward + backward, plain model = 1"
    )
    print("| model (batch) | plain, ms | " + " | ".join(methods[1:]) + " |")
    print("|" + "---|" * (len(methods) + 1))
    for name in options.models:
        steps: dict[str, Step] = {}
        for method in methods:
            try:
                step = prepare(name, method)
                step()
                steps[method] = step
            except Exception:
                steps.pop(method, None)
        times: dict[str, list[float]] = {method: [] for method in steps}
        for index in range(options.rounds):
            for method, step in steps.items():
                is_slow = times[method] and times[method][0] > 10 * times["plain"][0]
                if is_slow and index >= options.slow_rounds:
                    continue
                start = clock()
                step()
                times[method].append(clock() - start)
        medians = {method: statistics.median(values) for method, values in times.items()}
        cells = [f"{medians[m] / medians['plain']:.2f}" if m in medians else "not supported" for m in methods[1:]]
        if options.memory:
            peaks = {m: peak_memory(name, m, options.threads) for m in medians}
            cells = [f"{c} ({peaks[m]:.0f} MiB)" if m in peaks else c for m, c in zip(methods[1:], cells, strict=True)]
        memory = f" ({peaks['plain']:.0f} MiB)" if options.memory else ""
        print(f"| {TITLES[name]} | {1e3 * medians['plain']:.1f}{memory} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

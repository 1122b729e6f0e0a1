"""What squares of micro-batches cost on a GPU: passes, updates and memory. benchmarks/gpu.sh starts it and says what it needs.

    python benchmarks/gpu.py --json FILE [--small]

Each row is a model of torchvision or transformers, its batch in two micro-batches, bfloat16 autocast: forward and backward
passes plain and with hooks, a whole update plain (torch.optim.AdamW(fused=True)), by the trainer's engine, by that with the
squares of a sixteenth of the samples (not compiled), and by `batch_size_invariant`, and the memory of each at its peak. Then
updates alone, of the parameters of GPT-2. Medians of runs in turn; ratios are to plain. ``--small`` runs tiny models on
whatever device there is, to see that the script works.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import largebatch
from largebatch.data.sampler import evenly_spaced
from largebatch.distributed import Ranks
from largebatch.distributed.ddp import DataParallel
from largebatch.moments import chosen_samples
from largebatch.optim import AdamW, param_groups

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PASSES = 2
Case = tuple[nn.Module, Tensor, Tensor]


def resnet(small: bool) -> Case:
    """ResNet-50, 256 images of 224 x 224, channels_last."""
    if small:
        model: nn.Module = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
        )
        batch, side = 8, 16
    else:
        from torchvision.models import resnet50

        model, batch, side = resnet50(), 256, 224
    images = torch.randn(batch, 3, side, side, device=DEVICE).contiguous(memory_format=torch.channels_last)
    model = model.to(DEVICE, memory_format=torch.channels_last)
    return model, images, torch.randint(10, (batch,), device=DEVICE)


class Logits(nn.Module):
    """A language model's logits, (n, vocabulary, t)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Run the module."""
        return self.model(tokens, use_cache=False).logits.transpose(1, 2)


def gpt2(small: bool) -> Case:
    """GPT-2 with 124 M parameters, 16 sequences of 1,024 tokens, compiled."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 100, "n_positions": 64} if small else {}
    config = GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    batch, length = (4, 32) if small else (16, 1_024)
    tokens = torch.randint(config.vocab_size, (batch, length + 1), device=DEVICE)
    model: nn.Module = Logits(GPT2LMHeadModel(config)).to(DEVICE)
    model.compile(backend="aot_eager" if small else "inductor")
    return model, tokens[:, :-1], tokens[:, 1:]


WAYS = ("plain", "engine", "share", "library")


def stepper(case: Callable[[bool], Case], way: str, small: bool) -> Callable[[], None]:
    """Return a function that does one update, or its passes alone, in one of the ways."""
    torch.manual_seed(0)
    model, inputs, targets = case(small)
    kind, _, of = way.partition(", ")
    engine = DataParallel(Ranks(), DEVICE, "bf16")
    if kind == "engine":
        engine.track(model, "micro_batch")
    elif kind == "share":
        model._compiled_call_impl = None  # squares of samples are not compiled
        engine.track(model, "sample")
    batch = len(inputs)
    micro = batch // PASSES
    chosen = evenly_spaced(micro, max(1, micro // 16), slice(0, micro))
    optimizer: Any
    if kind in ("engine", "share"):
        _, optimizer = engine.prepare(
            model, lambda m: AdamW(param_groups(m), 1e-4, reference_batch_size=batch // 16 or 1)
        )
        engine.use_squares(optimizer)
        optimizer.squares_all = kind == "engine"
        optimizer.set_batch(batch, PASSES if kind == "engine" else batch, 1)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    if kind == "library":
        optimizer = largebatch.batch_size_invariant(
            optimizer, reference_batch_size=batch // 16 or 1, micro_batch_size=micro
        )

    def step() -> None:
        engine.begin_update(batch, PASSES, 0)
        for index, (x, y) in enumerate(zip(inputs.chunk(PASSES), targets.chunk(PASSES), strict=True)):
            with engine.accumulate(sync=index == PASSES - 1):
                with engine.autocast(), chosen_samples(chosen, 16.0) if kind == "share" else nullcontext():
                    loss = F.cross_entropy(model(x), y)
                engine.backward(loss / PASSES)
        if of == "update":
            optimizer.step()
        optimizer.zero_grad()

    return step


def measure(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Return the median milliseconds of each, run in turn."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(rounds + 3):
        for name, step in steps.items():
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            if index >= 3:  # warm
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def peak(step: Callable[[], None]) -> float:
    """Return the most memory that is held during an update, in MiB; 0 without a GPU."""
    if DEVICE.type != "cuda":
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() / 2**20


def compare(case: Callable[[bool], Case], small: bool, rounds: int) -> dict[str, Any]:
    """Return times and peaks of a model by way."""
    times: dict[str, float] = {}
    peaks: dict[str, float] = {}
    for of in ("passes", "update"):
        ways = [f"{kind}, {of}" for kind in WAYS]
        steps = {way: stepper(case, way, small) for way in ways}
        times |= measure(steps, rounds)
        del steps
    for kind in WAYS:  # one at a time
        step = stepper(case, f"{kind}, update", small)
        step()
        peaks[kind] = peak(step)
        del step
    return {"milliseconds": times, "peak MiB": peaks}


def updates(small: bool, rounds: int) -> dict[str, Any]:
    """Return the times of updates alone."""
    shapes = [(64, 64)] * 4 if small else [(768, 50_257), *[(768, 3_072), (3_072, 768), (768, 2_304), (768, 768)] * 12]

    def optimizer(way: str) -> Callable[[], None]:
        params = [nn.Parameter(torch.randn(shape, device=DEVICE)) for shape in shapes]
        squares = {p: torch.rand_like(p) for p in params}
        for p in params:
            p.grad = torch.randn_like(p)
        if way in ("fused", "foreach"):
            return torch.optim.AdamW(params, 1e-4, **{way: True}).step
        ours = AdamW(params, 1e-4, reference_batch_size=16)
        ours.set_batch(256, 2, 1)
        from largebatch.optim.averages import Moment

        ours.moment_source = lambda _, live: Moment([squares[p] for p in live], 15.0, 0.5, 16.0)
        if way == "ours, compiled":
            ours.update = torch.compile(ours.update, backend="aot_eager" if small else "inductor")  # type: ignore[method-assign]
        return ours.step

    return {
        "milliseconds": measure({way: optimizer(way) for way in ("fused", "foreach", "ours", "ours, compiled")}, rounds)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file of the figures")
    parser.add_argument("--small", action="store_true", help="tiny models, to try the script")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    found: dict[str, Any] = {"device": name, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    print(f"{name}, torch {torch.__version__}, {found['date']}")
    for title, run in (
        ("ResNet-50", lambda: compare(resnet, options.small, options.rounds)),
        ("GPT-2", lambda: compare(gpt2, options.small, options.rounds)),
        ("update of 124 M", lambda: updates(options.small, options.rounds)),
    ):
        try:
            found[title] = run()
        except Exception as error:  # the others are still worth having
            found[title] = {"error": f"{type(error).__name__}: {error}"}
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
        options.json.write_text(json.dumps(found, indent=1))
        print(f"\n| {title} | ms | plain = 1 |\n|---|---|---|")
        plain = None
        for way, value in found[title].get("milliseconds", {}).items():
            plain = value if plain is None or way.startswith("plain") else plain
            print(f"| {way} | {value:.2f} | {value / plain:.3f} |")
        for way, value in found[title].get("peak MiB", {}).items():
            print(f"| {way}, peak memory | {value:,.0f} MiB | |")
        print(found[title].get("error", ""), flush=True)


if __name__ == "__main__":
    main()

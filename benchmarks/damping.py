"""The stationary variance of a noisy quadratic at kappa times the reference batch, over that at the reference (docs/limit.md).

    python benchmarks/damping.py [--optimizers sgd adamw] [--momentum 0 0.5 0.9 0.95] [--kappa 8 16 32 1024] [--plain]

Four directions at once, whose largest stable kappa are 16, 32, 64 and 256, two backward passes an update, in float64. With
``--plain`` without damping. A row takes about a minute on one core.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

import largebatch

LIMITS = torch.tensor([16.0, 32.0, 64.0, 256.0], dtype=torch.float64)


def quadratic(name: str, beta: float) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    """Return a maker of an optimizer whose rate in the form of a running average is 1."""
    if name == "adamw":
        return lambda p: torch.optim.AdamW(p, 1.0, betas=(beta, 0.999), weight_decay=0.0)
    return lambda p: torch.optim.SGD(p, 1.0 - beta, momentum=beta)


def variance(name: str, beta: float, kappa: int, updates: int, damping: bool, num: int = 500) -> Tensor:
    """Return E[w^2] of each direction, where the rate as a running average's and the noise at the reference are 1."""
    generator = torch.Generator().manual_seed(0)
    h = (2 * (1 + beta) / (1 - beta) / LIMITS)[:, None]
    w = nn.Parameter(torch.randn(len(h), num, generator=generator, dtype=torch.float64) / (2 * h).sqrt())
    reference = 2 if kappa == 1 else 1
    optimizer = largebatch.batch_size_invariant(
        quadratic(name, beta)([w]),
        reference_batch_size=reference,
        micro_batch_size=kappa * reference // 2,
        damping=damping,
    )
    total = torch.zeros(len(h), dtype=torch.float64)
    for update in range(updates):
        for _ in range(2):
            noise = torch.randn(w.shape, generator=generator, dtype=torch.float64) * (2 / kappa) ** 0.5
            ((h * w * w / 2 + noise * w).sum() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        if update >= updates // 4:
            total += w.detach().square().mean(1)
    return total / (updates - updates // 4)


def main() -> None:
    """Print a row for each optimizer, momentum and kappa."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--optimizers", nargs="+", default=["sgd", "adamw"])
    parser.add_argument("--momentum", type=float, nargs="+", default=[0.0, 0.5, 0.9, 0.95])
    parser.add_argument("--kappa", type=int, nargs="+", default=[8, 16, 32, 1024])
    parser.add_argument("--plain", action="store_true")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="the batch of")
    torch.set_num_threads(1)
    for name in arguments.optimizers:
        for beta in arguments.momentum:
            reference = variance(name, beta, 1, 3_000, damping=False)
            for kappa in arguments.kappa:
                ratios = variance(name, beta, kappa, 1_200, damping=not arguments.plain) / reference
                row = ", ".join(f"{ratio:.2f}" for ratio in ratios.tolist())
                print(f"{name:6} momentum {beta:<4g} kappa {kappa:<5} {row}", flush=True)


if __name__ == "__main__":
    main()

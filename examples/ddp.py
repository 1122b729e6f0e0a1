"""A training loop in plain torch, with DistributedDataParallel where there is more than one process.

    python examples/ddp.py
    torchrun --nproc-per-node 2 examples/ddp.py

2 lines are this library's: its import, and the one between ``# >>>`` and ``# <<<``. The others are any script's.

Learning rate and betas are those tuned at a batch of 16; the loop makes batches of 128, counted by the optimizer. Losses of
micro-batches are means, divided by the micro-batches that a rank has, so that DDP's average is the mean over the batch.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.nn.parallel import DistributedDataParallel

import largebatch

BATCH_SIZE, MICRO_SIZE, EPOCHS, MAX_NORM = 128, 32, 2, 0.5


def main(dtype: torch.dtype, out: str | None) -> None:
    """Train on the digits, and save weights and optimizer."""
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    digits = load_digits()
    order = torch.randperm(len(digits.target))  # shuffled once
    inputs, targets = torch.tensor(digits.data, dtype=dtype)[order] / 16, torch.tensor(digits.target)[order]

    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    # >>> largebatch
    optimizer = largebatch.batch_size_invariant(optimizer, reference_batch_size=16, micro_batch_size=MICRO_SIZE)
    # <<<
    wrapped = DistributedDataParallel(model) if world_size > 1 else model

    for _ in range(EPOCHS):
        for batch in torch.arange(1536).split(BATCH_SIZE):
            micro_batches = batch.split(MICRO_SIZE)[rank::world_size]
            for index, chosen in enumerate(micro_batches):
                is_last = index == len(micro_batches) - 1
                with nullcontext() if is_last or world_size == 1 else wrapped.no_sync():
                    loss = F.cross_entropy(wrapped(inputs[chosen]), targets[chosen])
                    (loss / len(micro_batches)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()

    if rank == 0:
        accuracy = (model(inputs[1536:]).argmax(1) == targets[1536:]).double().mean()
        print(f"accuracy {accuracy:.4f}")
        if out:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, out)
    if world_size > 1:
        del wrapped  # before its process group
        dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", default="float32", help="float32 or float64")
    parser.add_argument("--out", help="file for the weights")
    arguments = parser.parse_args()
    main(getattr(torch, arguments.dtype), arguments.out)

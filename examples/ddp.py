"""A training loop in plain torch, with DistributedDataParallel where there is more than one process.

    python examples/ddp.py
    torchrun --nproc-per-node 2 examples/ddp.py

10 lines are this library's: its import, and what stands between ``# >>>`` and ``# <<<``. The others are any script's.

Every rank takes its share of the batch, adds up gradients over micro-batches of the summed loss, and divides by what makes
DDP's average over ranks the mean over the batch. So all samples have one weight, in a last batch of another size too, and
the squares need to know of two numbers: samples in the batch, and ranks that DDP averages over.
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
    # >>> largebatch
    largebatch.track(model)  # before DDP and before the optimizer
    reference = largebatch.Reference(batch_size=16, lr=1e-3, betas=(0.9, 0.999))
    optimizer = largebatch.optim.AdamW(
        largebatch.param_groups(model, weight_decay=0.01),
        **reference.at(BATCH_SIZE),
        reference_batch_size=reference.batch_size,
    )
    # <<<
    wrapped = DistributedDataParallel(model) if world_size > 1 else model

    for _ in range(EPOCHS):
        for batch in torch.arange(1600).split(BATCH_SIZE):
            micro_batches = batch[rank::world_size].split(MICRO_SIZE)
            for index, chosen in enumerate(micro_batches):
                is_last = index == len(micro_batches) - 1
                with nullcontext() if is_last or world_size == 1 else wrapped.no_sync():
                    loss = F.cross_entropy(wrapped(inputs[chosen]), targets[chosen], reduction="sum")
                    (loss * world_size / len(batch)).backward()
            # >>> largebatch
            largebatch.optim.clip_grad_norm_(optimizer, MAX_NORM)
            optimizer.set_batch(len(batch), world_size=world_size)
            # <<<
            optimizer.step()
            optimizer.zero_grad()

    if rank == 0:
        accuracy = (model(inputs[1600:]).argmax(1) == targets[1600:]).double().mean()
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

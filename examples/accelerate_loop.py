"""A training loop with Accelerate; needs ``pip install accelerate``.

    python examples/accelerate_loop.py
    torchrun --nproc-per-node 2 examples/accelerate_loop.py        (or accelerate launch)

2 lines are this library's: its import, and the one between ``# >>>`` and ``# <<<``. The others are any script's.

Accelerate divides losses by its accumulation steps. Where the number of micro-batches is no multiple of them, it ends the last
update of an epoch after fewer, and still divides by all; at the end of the data it hands out samples twice to even out the
ranks. Both are as they would be without the line; here 1,536 samples are 12 updates of 128.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import largebatch

BATCH_SIZE, MICRO_SIZE, EPOCHS, MAX_NORM = 128, 32, 2, 0.5


def main(dtype: torch.dtype, out: str | None) -> None:
    """Train on the digits, and save weights and optimizer."""
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    on_cpu = not torch.cuda.is_available()
    world_size = PartialState(cpu=on_cpu).num_processes
    accelerator = Accelerator(cpu=on_cpu, gradient_accumulation_steps=BATCH_SIZE // (MICRO_SIZE * world_size))
    digits = load_digits()
    order = torch.randperm(len(digits.target))  # shuffled once
    inputs, targets = torch.tensor(digits.data, dtype=dtype)[order] / 16, torch.tensor(digits.target)[order]
    loader = DataLoader(TensorDataset(inputs[:1536], targets[:1536]), MICRO_SIZE, drop_last=True)

    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    # >>> largebatch
    optimizer = largebatch.batch_size_invariant(optimizer, reference_batch_size=16, micro_batch_size=MICRO_SIZE)
    # <<<
    wrapped, prepared, loader = accelerator.prepare(model, optimizer, loader)

    for _ in range(EPOCHS):
        for batch_inputs, batch_targets in loader:
            with accelerator.accumulate(wrapped):
                accelerator.backward(F.cross_entropy(wrapped(batch_inputs), batch_targets))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
                prepared.step()
                prepared.zero_grad()

    if accelerator.is_main_process:
        accuracy = (model(inputs[1536:].to(accelerator.device)).argmax(1).cpu() == targets[1536:]).double().mean()
        print(f"accuracy {accuracy:.4f}")
        if out:
            torch.save({"model": accelerator.get_state_dict(wrapped), "optimizer": optimizer.state_dict()}, out)
    del wrapped, prepared, loader
    accelerator.free_memory()  # a wrapper that outlives its process group may abort at exit
    accelerator.end_training()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", default="float32", help="float32 or float64")
    parser.add_argument("--out", help="file for the weights")
    arguments = parser.parse_args()
    main(getattr(torch, arguments.dtype), arguments.out)

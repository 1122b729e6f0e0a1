"""A training loop with Accelerate; needs ``pip install accelerate``.

    python examples/accelerate_loop.py
    torchrun --nproc-per-node 2 examples/accelerate_loop.py        (or accelerate launch)

11 lines are this library's: its import, and what stands between ``# >>>`` and ``# <<<``. The others are any script's.

Two settings of the script make the gradient the mean over the batch. ``drop_last=True``: at the end of the data Accelerate
would hand out samples twice to even out the ranks. ``sync_with_dataloader=False``: there it would end the update after
fewer micro-batches, and still divide by the full number. With both, every update is over exactly ``BATCH_SIZE`` samples;
those that are left at the end of an epoch go into the first update of the next.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from accelerate.utils import GradientAccumulationPlugin
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
    accumulation = GradientAccumulationPlugin(BATCH_SIZE // (MICRO_SIZE * world_size), sync_with_dataloader=False)
    accelerator = Accelerator(cpu=on_cpu, gradient_accumulation_plugin=accumulation)
    digits = load_digits()
    order = torch.randperm(len(digits.target))  # shuffled once
    inputs, targets = torch.tensor(digits.data, dtype=dtype)[order] / 16, torch.tensor(digits.target)[order]
    loader = DataLoader(TensorDataset(inputs[:1600], targets[:1600]), MICRO_SIZE, drop_last=True)

    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    # >>> largebatch
    largebatch.track(model)  # before prepare and before the optimizer
    reference = largebatch.Reference(batch_size=16, lr=1e-3, betas=(0.9, 0.999))
    optimizer = largebatch.optim.AdamW(
        largebatch.param_groups(model, weight_decay=0.01),
        **reference.at(BATCH_SIZE),
        reference_batch_size=reference.batch_size,
    )
    # <<<
    wrapped, prepared, loader = accelerator.prepare(model, optimizer, loader)

    for _ in range(EPOCHS):
        for batch_inputs, batch_targets in loader:
            with accelerator.accumulate(wrapped):
                accelerator.backward(F.cross_entropy(wrapped(batch_inputs), batch_targets))
                # >>> largebatch
                if accelerator.sync_gradients:
                    # accelerator.clip_grad_norm_ would count squares as gradients
                    largebatch.optim.clip_grad_norm_(optimizer, MAX_NORM)
                    optimizer.set_batch(BATCH_SIZE, world_size=world_size)  # which the prepared one does not have
                # <<<
                prepared.step()
                prepared.zero_grad()

    if accelerator.is_main_process:
        accuracy = (model(inputs[1600:].to(accelerator.device)).argmax(1).cpu() == targets[1600:]).double().mean()
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

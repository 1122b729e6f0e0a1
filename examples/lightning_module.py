"""Lightning, the same under every replicating strategy; needs ``pip install lightning``.

    python examples/lightning_module.py
    torchrun --nproc-per-node 2 examples/lightning_module.py

2 lines are this library's: its import, and the one between ``# >>>`` and ``# <<<``. The others are any script's.

Lightning divides losses by ``accumulate_grad_batches``, also in an epoch's last update, which may have fewer of them; that is
as it would be without the line. ``drop_last`` keeps the micro-batches full.
"""

from __future__ import annotations

import argparse
import os

import lightning
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import largebatch

BATCH_SIZE, MICRO_SIZE, EPOCHS, MAX_NORM = 128, 32, 2, 0.5
LAUNCHED = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_WORLD_SIZE", "1"))  # as torchrun says


class Classifier(lightning.LightningModule):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Return the mean loss of a micro-batch."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.01)
        # >>> largebatch
        return largebatch.batch_size_invariant(optimizer, reference_batch_size=16, micro_batch_size=MICRO_SIZE)
        # <<<


def main(dtype: torch.dtype, out: str | None) -> None:
    """Train on the digits, and save the weights."""
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    digits = load_digits()
    order = torch.randperm(len(digits.target))  # shuffled once
    inputs, targets = torch.tensor(digits.data, dtype=dtype)[order] / 16, torch.tensor(digits.target)[order]
    rank, world_size, on_this_node = (int(os.environ.get(n, d)) for n, d in LAUNCHED)
    data = TensorDataset(inputs[:1536], targets[:1536])
    # Lightning's own sampler would shuffle, on several processes only.
    sampler = DistributedSampler(data, world_size, rank, shuffle=False, drop_last=True)
    loader = DataLoader(data, MICRO_SIZE, sampler=sampler, drop_last=True)
    model = Classifier()
    trainer = lightning.Trainer(
        accelerator="auto",
        devices=on_this_node,
        strategy="ddp" if world_size > 1 else "auto",
        max_epochs=EPOCHS,
        accumulate_grad_batches=BATCH_SIZE // (MICRO_SIZE * world_size),
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=MAX_NORM,
    )
    trainer.fit(model, loader)
    if trainer.is_global_zero:
        accuracy = (model.net(inputs[1536:].to(model.device)).argmax(1).cpu() == targets[1536:]).double().mean()
        print(f"accuracy {accuracy:.4f}")
        if out:
            weights = {name.removeprefix("net."): value for name, value in model.state_dict().items()}
            torch.save({"model": weights, "optimizer": trainer.optimizers[0].state_dict()}, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", default="float32", help="float32 or float64")
    parser.add_argument("--out", help="file for the weights")
    arguments = parser.parse_args()
    main(getattr(torch, arguments.dtype), arguments.out)

"""Hugging Face's Trainer with an optimizer and a callback of this library; needs ``pip install 'transformers[torch]>=5'``.

    python examples/hf_trainer.py
    torchrun --nproc-per-node 2 examples/hf_trainer.py

2 lines are this library's: its import, and the one between ``# >>>`` and ``# <<<``. The others are any script's.

The Trainer averages the loss over micro-batches and ranks, also in an epoch's last update, which may have fewer of them. With
``dataloader_drop_last`` all micro-batches are full; without it the Trainer hands out samples twice to even out the ranks.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, __version__

import largebatch

BATCH_SIZE, MICRO_SIZE, EPOCHS, MAX_NORM = 128, 32, 2, 0.5


class Classifier(torch.nn.Module):
    """Two layers, with the loss among the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))

    def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the mean loss, and the logits."""
        logits = self.net(pixels)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Digits(Dataset[dict[str, Tensor]]):
    """Scikit-learn's digits, shuffled once."""

    def __init__(self, chosen: slice, order: Tensor) -> None:
        digits = load_digits()
        self.pixels = torch.tensor(digits.data, dtype=torch.get_default_dtype())[order][chosen] / 16
        self.labels = torch.tensor(digits.target)[order][chosen]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixels": self.pixels[index], "labels": self.labels[index]}


def main(dtype: torch.dtype, out: str | None) -> None:
    """Train on the digits, and save the weights."""
    if int(__version__.split(".")[0]) < 5:
        raise SystemExit(
            f"this script needs transformers 5 or later, not {__version__}: pip install 'transformers[torch]>=5'"
        )
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    folder = tempfile.mkdtemp()
    arguments = TrainingArguments(
        folder,
        use_cpu=not torch.cuda.is_available(),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=MICRO_SIZE,
        train_sampling_strategy="sequential",
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        max_grad_norm=MAX_NORM,
        dataloader_drop_last=True,
    )
    arguments.gradient_accumulation_steps = BATCH_SIZE // (MICRO_SIZE * arguments.world_size)
    order = torch.randperm(1797)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    # >>> largebatch
    optimizer = largebatch.batch_size_invariant(optimizer, reference_batch_size=16, micro_batch_size=MICRO_SIZE)
    # <<<
    trainer = Trainer(
        model,
        arguments,
        train_dataset=Digits(slice(0, 1536), order),
        optimizers=(optimizer, None),
    )
    trainer.train()
    if trainer.is_world_process_zero():
        test = Digits(slice(1536, None), order)
        logits = model.net(test.pixels.to(arguments.device)).cpu()
        print(f"accuracy {(logits.argmax(1) == test.labels).double().mean():.4f}")
        if out:
            weights = {name.removeprefix("net."): value for name, value in model.state_dict().items()}
            torch.save({"model": weights, "optimizer": optimizer.state_dict()}, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", default="float32", help="float32 or float64")
    parser.add_argument("--out", help="file for the weights")
    arguments = parser.parse_args()
    main(getattr(torch, arguments.dtype), arguments.out)

"""Hugging Face's Trainer with an optimizer and a callback of this library; needs ``pip install transformers[torch]``.

    python examples/hf_trainer.py
    torchrun --nproc-per-node 2 examples/hf_trainer.py

29 lines are this library's: its import, and what stands between ``# >>>`` and ``# <<<``. The others are any script's.

The Trainer averages the loss over micro-batches and ranks, also in an epoch's last update, which may have fewer of them.
With ``dataloader_drop_last`` all micro-batches are full, so that all samples of an update have one weight; without it the
Trainer would hand out samples twice to even out the ranks. Its clipping and the ``grad_norm`` in its log take squares for
gradients: the clipping is switched off in favour of the callback's, the log's number is not of use.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

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


# >>> largebatch
class LargeBatch(TrainerCallback):
    """Tells the optimizer what its gradients are means of, and clips them together with their squares."""

    def __init__(self, optimizer: largebatch.optim.AdamW, max_norm: float) -> None:
        self.optimizer, self.max_norm, self.micro_batches = optimizer, max_norm, 0

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse what would clip squares as gradients, or give samples other weights."""
        if args.max_grad_norm or args.fp16 or not args.dataloader_drop_last:
            raise ValueError("expected max_grad_norm=0, fp16=False and dataloader_drop_last=True")

    def on_substep_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the micro-batches before the last one of an update."""
        self.micro_batches += 1

    def on_pre_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Clip, and say what the gradients are means of."""
        largebatch.optim.clip_grad_norm_(self.optimizer, self.max_norm)
        batch_size = (self.micro_batches + 1) * args.train_batch_size * args.world_size
        self.optimizer.set_batch(batch_size, world_size=args.world_size)
        self.micro_batches = 0
        # <<<


def main(dtype: torch.dtype, out: str | None) -> None:
    """Train on the digits, and save the weights."""
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
        # >>> largebatch
        max_grad_norm=0.0,
        dataloader_drop_last=True,
        # <<<
    )
    arguments.gradient_accumulation_steps = BATCH_SIZE // (MICRO_SIZE * arguments.world_size)
    order = torch.randperm(1797)
    model = Classifier()
    # >>> largebatch
    largebatch.track(model)  # before the Trainer and before the optimizer
    reference = largebatch.Reference(batch_size=16, lr=1e-3, betas=(0.9, 0.999))
    optimizer = largebatch.optim.AdamW(
        largebatch.param_groups(model, weight_decay=0.01),
        **reference.at(BATCH_SIZE),
        reference_batch_size=reference.batch_size,
    )
    # <<<
    trainer = Trainer(
        model,
        arguments,
        train_dataset=Digits(slice(0, 1600), order),
        # >>> largebatch
        optimizers=(optimizer, None),
        callbacks=[LargeBatch(optimizer, MAX_NORM)],
        # <<<
    )
    trainer.train()
    if trainer.is_world_process_zero():
        test = Digits(slice(1600, None), order)
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

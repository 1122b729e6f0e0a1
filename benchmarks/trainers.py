"""Throughput of the trainer beside Accelerate, Lightning and Hugging Face's Trainer, on the same models and data.

    pip install accelerate lightning transformers
    python benchmarks/trainers.py

One process on the CPU, as benchmarks/throughput.py: blocks of updates of a loop written by hand, this trainer and each of
the others alternate, and the table has time by hand / time of the trainer, medians over blocks. Each of the others trains as
its documents show it: a DataLoader that shuffles, torch.optim.SGD, a row every 10 updates, no checkpoints, no progress bar.
What comes before the first update and after the last is not counted.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from throughput import CASES, SAMPLES, Case, by_hand, by_trainer, config, random_source
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from largebatch.data import Source
from largebatch.distributed import Ranks, create_backend
from largebatch.training.run import build_model

LR, MOMENTUM = 1e-3, 0.9


def loader(source: Source, batch_size: int) -> DataLoader[tuple[Tensor, ...]]:
    """Return a stock loader of the training samples."""
    train = source.train
    return DataLoader(TensorDataset(train.inputs, train.targets), batch_size, shuffle=True, drop_last=True)


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of a batch."""
    return nn.functional.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())


def by_accelerate(model: nn.Module, source: Source, batch_size: int, updates: int) -> float:
    """Train with a loop of Accelerate's; return the seconds it took."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    model, optimizer, batches = accelerator.prepare(model, optimizer, loader(source, batch_size))
    started, done = time.perf_counter(), 0
    while done < updates:
        for inputs, targets in batches:
            loss = loss_of(model, inputs, targets)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            if done % 10 == 0:
                accelerator.gather(loss.detach()).mean().item()
            if done == updates:
                break
    return time.perf_counter() - started


def by_lightning(model: nn.Module, source: Source, batch_size: int, updates: int) -> float:
    """Train with Lightning's Trainer; return the seconds its loop took."""
    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    times = []

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            loss = loss_of(self.model, *batch)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=LR, momentum=MOMENTUM)

        def on_train_start(self) -> None:
            times.append(time.perf_counter())

        def on_train_end(self) -> None:
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_steps=updates,
            log_every_n_steps=10,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            logger=lightning.pytorch.loggers.CSVLogger(folder),
        )
        trainer.fit(Module(), loader(source, batch_size))
    return times[1] - times[0]


def by_hugging_face(model: nn.Module, source: Source, batch_size: int, updates: int) -> float:
    """Train with the Trainer of transformers; return the seconds its loop took."""
    import transformers

    times = []

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": loss_of(self.model, inputs, labels)}

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *_: object, **__: object) -> None:
            times.append(time.perf_counter())

        def on_train_end(self, *_: object, **__: object) -> None:
            times.append(time.perf_counter())

    train = source.train
    rows = [{"inputs": x, "labels": y} for x, y in zip(train.inputs, train.targets, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            max_steps=updates,
            per_device_train_batch_size=batch_size,
            logging_steps=10,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            use_cpu=True,
            max_grad_norm=0.0,
        )
        wrapped = Wrapped()
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=LR, momentum=MOMENTUM)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        trainer = transformers.Trainer(
            wrapped, arguments, train_dataset=rows, optimizers=(optimizer, schedule), callbacks=[Clock()]
        )
        trainer.pop_callback(transformers.PrinterCallback)
        trainer.train()
    return times[1] - times[0]


OTHERS: dict[str, Callable[[nn.Module, Source, int, int], float]] = {
    "accelerate": by_accelerate,
    "lightning": by_lightning,
    "transformers": by_hugging_face,
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=30, help="updates of one block")
    parser.add_argument("--blocks", type=int, default=9, help="blocks of each")
    parser.add_argument("--json", type=Path, help="write the results there too")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    others = {name: train for name, train in OTHERS.items() if find_spec(name)}
    backend = create_backend(config(next(iter(CASES.values())), 1, 1024).backend, "fp32", Ranks())
    print(f"torch {torch.__version__}, one process, {torch.get_num_threads()} thread(s)")
    print(
        f"| model | by hand, ms per update | {' | '.join(['largebatch', *others])} |\n|---|---|{'---|' * (len(others) + 1)}"
    )
    table = {}
    for name, case in CASES.items():
        source = random_source(case.task, SAMPLES)
        with tempfile.TemporaryDirectory() as folder:
            seconds = measure(case, source, others, backend, options, Path(folder))
        hand, *rest = (statistics.median(times) for times in seconds.values())
        table[name] = {"ms by hand": 1000 * hand / options.updates} | dict(
            zip(["largebatch", *others], [hand / one for one in rest], strict=True)
        )
        print(
            f"| {name} | {1000 * hand / options.updates:.2f} | {' | '.join(f'{hand / one:.3f}' for one in rest)} |",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(table, indent=1))
    backend.close()


def measure(
    case: Case, source: Source, others: dict, backend: object, options: argparse.Namespace, folder: Path
) -> dict[str, list[float]]:
    """Return the seconds of the blocks of each, the first of which is not counted."""

    def fresh() -> nn.Module:
        return build_model(config(case, 1, SAMPLES), case.task)

    ways: dict[str, Callable[[], float]] = {
        "by hand": lambda: by_hand(fresh(), source, case.batch_size, options.updates, 0, 1),
        "largebatch": lambda: by_trainer(case, source, backend, options.updates, folder),
    }
    for name, train in others.items():
        ways[name] = lambda train=train: train(fresh(), source, case.batch_size, options.updates)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for block in range(options.blocks + 1):
        order = list(ways) if block % 2 else list(ways)[::-1]
        for name in order:
            taken = ways[name]()
            if block:  # the first warms up
                seconds[name].append(taken)
    return seconds


if __name__ == "__main__":
    main()

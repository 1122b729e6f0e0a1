"""Where the rows of a run go: metrics.jsonl always, Weights & Biases and TensorBoard by config."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from largebatch.config import LogConfig, Run
from largebatch.section import UserError

Row = dict[str, Any]


class JsonLines:
    """Appends each row to a file, one JSON object a line; a reader can follow it."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a", encoding="utf-8", buffering=1)

    def log(self, row: Row) -> None:
        """Write a row."""
        # JSON has no word for NaN and infinity, which an fp16 gradient's norm may be.
        known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self.file.write(json.dumps(known) + "\n")

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def _scalars(row: Row) -> dict[str, float]:
    """Return a row as flat numbers; betas become beta1 and beta2."""
    flat = {name: value for name, value in row.items() if isinstance(value, int | float)}
    if "betas" in row:
        flat["beta1"], flat["beta2"] = row["betas"]
    return flat


class WandB:
    """Weights & Biases, with samples seen as the horizontal axis."""

    def __init__(self, run: Run, folder: Path, name: str) -> None:
        import wandb

        try:
            self.run = wandb.init(
                project=run.log.project,
                name=name,
                dir=folder,
                mode=run.log.wandb_mode,
                config=run.model_dump(mode="json"),
                settings=wandb.Settings(silent=True),
            )
        except wandb.errors.UsageError as error:
            raise UserError(
                f"log.wandb_mode: Weights & Biases refused to go online ({error}); run `wandb login` or set it to offline"
            ) from error
        self.run.define_metric("*", step_metric="samples")

    def log(self, row: Row) -> None:
        """Send a row."""
        self.run.log(_scalars(row))

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()


class TensorBoard:
    """TensorBoard, with samples seen as the horizontal axis."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, row: Row) -> None:
        """Write a row."""
        for name, value in _scalars(row).items():
            if name not in ("step", "samples"):
                self.writer.add_scalar(name, value, row["samples"])

    def close(self) -> None:
        """Close the files."""
        self.writer.close()


class Observers:
    """Hands each row to several observers."""

    def __init__(self, observers: Iterable[Any] = ()) -> None:
        self.observers = list(observers)

    def log(self, row: Row) -> None:
        """Pass a row on."""
        for observer in self.observers:
            observer.log(row)

    def close(self) -> None:
        """Close every observer."""
        for observer in self.observers:
            observer.close()


def check_trackers(config: LogConfig) -> None:
    """Refuse a tracker that is not installed, before anything is written.

    Raises:
        UserError: with the install command.
    """
    from importlib.util import find_spec

    for tracker in config.trackers:
        if find_spec(tracker) is None:
            raise UserError(f"log.trackers: {tracker} is not installed; pip install 'largebatch[{tracker}]'")


def create_trackers(run: Run, folder: Path) -> list[Any]:
    """Return metrics.jsonl and the trackers of the config."""
    trackers: list[Any] = [JsonLines(folder / "metrics.jsonl")]
    if "wandb" in run.log.trackers:
        trackers.append(WandB(run, folder, folder.name))
    if "tensorboard" in run.log.trackers:
        trackers.append(TensorBoard(folder))
    return trackers


def read_metrics(path: Path) -> tuple[list[Row], list[Row]]:
    """Return the rows of updates and the rows of evaluations in a metrics.jsonl."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "loss" in row], [row for row in rows if "val_loss" in row]

"""Where the rows of a run go: metrics.jsonl always, Weights & Biases and TensorBoard by config."""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from largebatch.config import LogConfig, Run
from largebatch.section import UserError

Row = dict[str, Any]


class JsonLines:
    """Appends each row to a file, one JSON object a line; a reader can follow it.

    Args:
        path: the file; rows that are there stay, but see `rewind`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open()

    def _open(self) -> None:
        # Unbuffered: a line is in the file or not, and a full disk says so at once.
        self.file = self.path.open("ab", buffering=0)

    def log(self, row: Row) -> None:
        """Write a row.

        Raises:
            UserError: if the file cannot be written.
        """
        # JSON has no word for NaN and infinity, which an fp16 gradient's norm may be.
        known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        line = (json.dumps(known) + "\n").encode()
        opened = os.fstat(self.file.fileno())
        size = opened.st_size
        try:
            there = self.path.stat()
        except OSError:
            there = None
        if there is None or (there.st_dev, there.st_ino) != (opened.st_dev, opened.st_ino):
            raise UserError(
                f"{self.path}: was moved or removed while the run was writing it; put the run folder back, then continue with "
                "--resume auto"
            )
        try:
            while line:
                line = line[self.file.write(line) :]
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self.file.fileno(), size)  # no half row
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); make room, then continue with --resume auto"
            ) from error

    def sync(self) -> None:
        """See that the rows so far outlast a power cut."""
        with suppress(OSError):  # a pipe, say
            os.fsync(self.file.fileno())

    def rewind(self, samples: int) -> None:
        """Remove the rows after so many samples, and a last line that was cut short."""
        self.file.close()
        kept = []
        for line in self.path.read_bytes().splitlines(keepends=True):
            try:
                is_kept = line.endswith(b"\n") and json.loads(line)["samples"] <= samples
            except (ValueError, KeyError, TypeError):
                is_kept = False
            kept += [line] * is_kept
        beside = self.path.with_name(self.path.name + ".part")
        try:
            with beside.open("wb") as file:
                file.write(b"".join(kept))
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self.path)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); make room, then try again") from error
        self._open()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def _scalars(row: Row) -> dict[str, float]:
    """Return a row as flat numbers; betas become beta1 and beta2."""
    flat = {name: value for name, value in row.items() if isinstance(value, int | float)}
    flat |= {f"noise_scale/{name}": value for name, value in row.get("noise_scale_by_layer", {}).items() if value}
    if "betas" in row:
        flat["beta1"], flat["beta2"] = row["betas"]
    return flat


class WandB:
    """Weights & Biases, with samples seen as the horizontal axis."""

    def __init__(self, run: Run, folder: Path, name: str) -> None:
        import wandb

        # One id a run folder, so that a resumed run goes on in its own page.
        id_file = folder / "wandb_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8] + "\n", encoding="utf-8")
        try:
            self.run = wandb.init(
                project=run.log.project,
                name=name,
                id=id_file.read_text(encoding="utf-8").strip(),
                resume="allow",
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

    def sync(self) -> None:
        """Do nothing: it writes by itself."""

    def rewind(self, samples: int) -> None:
        """Keep the rows: they are out; those that follow have smaller samples, which is the axis."""

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

    def sync(self) -> None:
        """Write what is buffered."""
        self.writer.flush()

    def rewind(self, samples: int) -> None:
        """Hide what was written after so many samples, as TensorBoard does from a new file on."""
        self.writer.close()
        self.writer = type(self.writer)(str(self.writer.log_dir), purge_step=samples + 1)

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

    def sync(self) -> None:
        """Let every observer see that its rows are on the disk."""
        for observer in self.observers:
            observer.sync()

    def rewind(self, samples: int) -> None:
        """Let every observer forget the rows after so many samples."""
        for observer in self.observers:
            observer.rewind(samples)

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
    """Return the rows of updates and the rows of evaluations in a metrics.jsonl, which may still be written to.

    Raises:
        UserError: if a line of it is no row.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        try:
            row = json.loads(line) if line.endswith(b"\n") else {}
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{path}: line {number} is no row of metrics; the file was damaged or changed")
        rows.append(row)
    return [row for row in rows if "loss" in row], [row for row in rows if "val_loss" in row]

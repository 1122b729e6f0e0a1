"""Loggers for the rows of a run: metrics.jsonl is always written, Weights & Biases and TensorBoard if configured."""

from __future__ import annotations

import json
import math
import os
import struct
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from largebatch.checkpoint.folder import read_bytes, replace_text
from largebatch.config.schema import Config, LogConfig
from largebatch.errors import UserError
from largebatch.section import displayable

Row = dict[str, Any]


class JsonLines:
    """Appends each row to a file as one line of JSON, which can be read while the run continues.

    Args:
        path: the file; existing rows are kept until `rewind`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open()

    def _open(self) -> None:
        # The file is unbuffered, so that a row is in the file once it is written, and a full disk raises an error at once.
        try:
            self.file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise self._cannot("written", error) from error

    def _cannot(self, what: str, error: OSError) -> UserError:
        advice = "make room, then continue with --resume auto"
        return UserError(f"{self.path}: cannot be {what} ({error.strerror}); {advice}")

    def log(self, row: Row) -> None:
        """Write a row.

        Raises:
            UserError: if the file cannot be written.
        """
        # JSON has no NaN or infinity, which the norm of an fp16 gradient may be.
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
                os.ftruncate(self.file.fileno(), size)  # remove the incomplete row
            raise self._cannot("written", error) from error

    def sync(self) -> None:
        """Make the rows written so far survive a power failure."""
        with suppress(OSError):  # for example a pipe
            os.fsync(self.file.fileno())

    def rewind(self, samples: int) -> None:
        """Remove the rows after ``samples`` samples, and an incomplete last line."""
        self.file.close()
        kept = []
        try:
            lines = self.path.read_bytes().splitlines(keepends=True)
        except OSError as error:
            raise self._cannot("read", error) from error
        for line in lines:
            try:
                is_kept = line.endswith(b"\n") and json.loads(line)["samples"] <= samples
            except (ValueError, KeyError, TypeError, RecursionError):
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
            raise self._cannot("written", error) from error
        self._open()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def _scalars(row: Row) -> dict[str, float]:
    """Return the numbers of a row in a flat dict; betas become beta1 and beta2."""
    flat = {name: value for name, value in row.items() if isinstance(value, int | float)}
    flat |= {f"noise_scale/{name}": value for name, value in row.get("noise_scale_by_layer", {}).items() if value}
    flat |= {f"stability_share/{name}": value for name, value in row.get("stability_share_by_layer", {}).items()}
    if "betas" in row:
        flat["beta1"], flat["beta2"] = row["betas"]
    return flat


class WandB:
    """Logs to Weights & Biases, with samples seen as the horizontal axis and as the step of a row.

    Only Weights & Biases knows which rows of a killed run it has kept, because it writes in its own process, some seconds late.
    A resumed run therefore sends only the rows after the last one kept, including those in metrics.jsonl that were lost.
    """

    def __init__(self, config: Config, folder: Path, name: str) -> None:
        import wandb

        self.folder = folder
        run_id = _wandb_id(folder)
        try:
            self.run = wandb.init(
                project=config.log.project,
                name=name,
                id=run_id,
                resume="allow",
                dir=folder,
                mode=config.log.wandb_mode,
                config=config.model_dump(mode="json"),
                settings=wandb.Settings(silent=True),
            )
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"log.wandb_mode: Weights & Biases refused to go {config.log.wandb_mode} ({reason}); run `wandb login`, or "
                "set it to offline"
            ) from error
        self.run.define_metric("*", step_metric="samples")
        self.kept, samples = _kept_offline(folder, run_id)
        if config.log.wandb_mode == "online":
            self.kept = self.run.starting_step - 1
            samples = dict(self.run.summary).get("samples", self.kept)
        # Steps may only increase, so after a rollback they are larger than the number of samples.
        self.step, self.shift = self.kept, self.kept - samples
        self.has_begun = False

    def log(self, row: Row) -> None:
        """Send a row, unless it was already kept."""
        self.has_begun = True
        step = row["samples"] + self.shift
        if step > self.kept:
            self.run.log(_scalars(row), step=step)
            self.step = step

    def sync(self) -> None:
        """Do nothing, because Weights & Biases writes by itself."""

    def rewind(self, samples: int) -> None:
        """Continue after ``samples`` samples: resend lost rows in a resumed run, or shift the steps after a rollback."""
        if self.has_begun:
            self.shift = self.step - samples
            return
        for line in (self.folder / "metrics.jsonl").read_bytes().splitlines():
            self.log(json.loads(line))

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()


def _wandb_id(folder: Path) -> str:
    """Return the id of a run folder, which stays the same so that a resumed run continues on its page."""
    path = folder / "wandb_id"
    known = path.read_text(encoding="utf-8").strip() if path.exists() else ""
    if not known:
        known = uuid.uuid4().hex[:8]
        replace_text(path, known + "\n")
    return known


def _kept_offline(folder: Path, run_id: str) -> tuple[int, int]:
    """Return the step and samples of the last row that Weights & Biases kept in this folder, or (-1, -1) if there is none."""
    for path in sorted(folder.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"), reverse=True):
        last = (-1, -1)
        with suppress(Exception):  # in a file of another version, the rows read so far count
            for row in _wandb_rows(path):
                last = max(last, (int(row["_step"]), int(row["samples"])))
        if last[0] >= 0:
            return last
    return -1, -1


def _wandb_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a .wandb file: protocol buffers in a LevelDB log, whose 32 KiB blocks hold records with headers."""
    record_of = import_module("wandb.proto.wandb_internal_pb2").Record.FromString
    block, header, whole, last = 32768, struct.Struct("<IHB"), 1, 4
    data, at, piece = path.read_bytes(), 7, b""
    while at + header.size <= len(data):
        if block - at % block < header.size:  # the rest of a block is too small for a header
            at += block - at % block
            continue
        _, length, kind = header.unpack_from(data, at)
        at += header.size + length
        if at > len(data):  # the file is incomplete
            return
        piece += data[at - length : at]
        if kind in (whole, last):
            record = record_of(piece)
            if record.HasField("history"):
                yield {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            piece = b""


class TensorBoard:
    """Logs to TensorBoard, with samples seen as the horizontal axis."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = _without_tensorboard(threading.excepthook)
        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, row: Row) -> None:
        """Write a row."""
        for name, value in _scalars(row).items():
            if name not in ("step", "samples"):
                self.writer.add_scalar(name, value, row["samples"])

    def sync(self) -> None:
        """Write the buffered rows."""
        self.writer.flush()

    def rewind(self, samples: int) -> None:
        """Open a new file that makes TensorBoard hide the values after ``samples`` samples."""
        self.writer.close()
        self.writer = type(self.writer)(str(self.writer.log_dir), purge_step=samples + 1)

    def close(self) -> None:
        """Close the files."""
        self.writer.close()


def _without_tensorboard(before: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a hook that ignores exceptions of TensorBoard's thread, because its next call raises them again."""

    def hook(arguments: Any) -> None:
        if not type(arguments.thread).__module__.startswith("tensorboard."):
            before(arguments)

    return hook


class Lenient:
    """Wraps a tracker so that its failure does not stop the run: the failure is reported once, and the tracker is dropped.

    Args:
        name: the name of the tracker.
        create: returns the tracker.
        tell: receives the line about a failure.

    Raises:
        UserError: from ``create``, for any problem that the user can correct before the run begins.
    """

    def __init__(self, name: str, create: Callable[[], Any], tell: Callable[[str], None]) -> None:
        self.name, self.tell, self.tracker = name, tell, None
        self.tracker = self._try(create)

    def _try(self, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except UserError:
            raise
        except Exception as error:
            self.tracker = None
            reason = " ".join(str(error).split()) or type(error).__name__
            self.tell(
                f"log.trackers: {self.name} failed ({reason[:200]}); the run goes on without it, and metrics.jsonl has its rows"
            )
            return None

    def log(self, row: Row) -> None:
        """Pass a row to the tracker."""
        if self.tracker is not None:
            self._try(self.tracker.log, row)

    def sync(self) -> None:
        """Make the tracker write its rows to the disk."""
        if self.tracker is not None:
            self._try(self.tracker.sync)

    def rewind(self, samples: int) -> None:
        """Make the tracker remove the rows after ``samples`` samples."""
        if self.tracker is not None:
            self._try(self.tracker.rewind, samples)

    def close(self) -> None:
        """Close the tracker."""
        if self.tracker is not None:
            self._try(self.tracker.close)


class Loggers:
    """Passes each row to several loggers."""

    def __init__(self, loggers: Iterable[Any] = ()) -> None:
        self.loggers = list(loggers)

    def log(self, row: Row) -> None:
        """Pass a row to every logger."""
        for logger in self.loggers:
            logger.log(row)

    def sync(self) -> None:
        """Make every logger write its rows to the disk."""
        for logger in self.loggers:
            logger.sync()

    def rewind(self, samples: int) -> None:
        """Make every logger remove the rows after ``samples`` samples."""
        for logger in self.loggers:
            logger.rewind(samples)

    def close(self) -> None:
        """Close every logger."""
        for logger in self.loggers:
            logger.close()


def check_trackers(config: LogConfig) -> None:
    """Refuse a tracker that is not installed, before anything is written.

    Raises:
        UserError: with the install command.
    """
    from importlib.util import find_spec

    for tracker in config.trackers:
        if find_spec(tracker) is None:
            raise UserError(f"log.trackers: {tracker} is not installed; pip install 'largebatch[{tracker}]'")


def create_trackers(config: Config, folder: Path, tell: Callable[[str], None]) -> list[Any]:
    """Return loggers for metrics.jsonl and the configured trackers; ``tell`` receives a line if a tracker fails."""
    name = displayable(folder.resolve().name)
    known = {"wandb": lambda: WandB(config, folder, name), "tensorboard": lambda: TensorBoard(folder)}
    return [
        JsonLines(folder / "metrics.jsonl"),
        *(Lenient(tracker, create, tell) for tracker, create in known.items() if tracker in config.log.trackers),
    ]


def read_metrics(path: Path) -> tuple[list[Row], list[Row]]:
    """Return the rows of updates and the rows of evaluations in a metrics.jsonl that may still be written to.

    Raises:
        UserError: if it cannot be read, or one of its lines is not a row.
    """
    rows = []
    try:
        lines = read_bytes(path).splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line) if line.endswith(b"\n") else {}
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{path}: line {number} is no row of metrics; the file was damaged or changed")
        rows.append(row)
    return [row for row in rows if "loss" in row], [row for row in rows if "val_loss" in row]

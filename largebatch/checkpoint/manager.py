"""Management of a run's checkpoints: when they are due, their contents, and continuing from them, on every rank alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from largebatch.checkpoint.folder import CheckpointConfig, CheckpointFolder, read_run_state, samples_of
from largebatch.checkpoint.writer import CheckpointWriter
from largebatch.distributed import Backend
from largebatch.distributed.state import (
    group_state,
    load_group_state,
    load_random_state,
    random_state,
    read_tensors,
    tensor_metadata,
)
from largebatch.distributed.stopping import Reason, StopCoordinator
from largebatch.errors import UserError

Snapshot = Callable[[], tuple[dict[str, Tensor], dict[str, Any]]]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint to continue from, and its state.json."""

    path: Path
    state: dict[str, Any]


class CheckpointManager:
    """Saves and loads the state of a run, and decides with the other ranks when to save and when to stop.

    Every rank has a manager and calls it in the same way: all methods but `failure`, `interrupt` and `note_best` may be
    collectives.

    Args:
        config: when to save, and which checkpoints to keep.
        backend: the engine.
        model: the bare model.
        optimizer: the optimizer.
        snapshot: returns the state to save besides the weights and the optimizer's state: tensors by name, and values for
            state.json.
        samples_per_epoch: number of samples in an epoch.
        folder: the run folder; None to write nothing, so that the manager only decides when to stop.

    Attributes:
        stopped_by: the reason why the run is to stop; None if it is to continue.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        backend: Backend,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        snapshot: Snapshot,
        samples_per_epoch: int,
        folder: Path | None,
    ) -> None:
        self.config, self.backend, self.snapshot = config, backend, snapshot
        self.model, self.optimizer = model, optimizer
        self.coordinator = StopCoordinator(backend.sum, backend.rank, backend.world_size)
        self.stopped_by: Reason | None = None
        self._due, self._best_due = False, False
        self._saved_time, self._saved_samples = time.monotonic(), -1
        self.folder = None if folder is None else CheckpointFolder(folder / "checkpoints")
        self.writer: CheckpointWriter | None = None
        if self.folder is not None:
            every = config.keep_every_epochs
            self.writer = CheckpointWriter(
                self.folder,
                backend.rank,
                backend.world_size,
                asynchronous=config.asynchronous,
                keep_last=config.keep_last,
                keep_every=None if every is None else every * samples_per_epoch,
                timeout_seconds=backend.timeout_seconds,
                sum_over_ranks=backend.sum,
            )

    def maybe_save(self, step: int, samples_seen: int, stop: Reason | None, at_epoch: bool) -> None:
        """Save if a checkpoint is due, and set ``stopped_by`` if the run is to stop after it.

        Args:
            step: number of updates done.
            samples_seen: number of samples in these updates.
            stop: the reason why this rank should stop; None if it should continue.
            at_epoch: whether the last update passed one of the epochs at which to save.
        """
        every = self.config.every_minutes
        overdue = every is not None and time.monotonic() - self._saved_time >= 60.0 * every
        self.stopped_by, asked_to_save = self.coordinator.ask(step, stop, overdue)
        self._due = self._due or asked_to_save or at_epoch
        if self.stopped_by is not None or self._due or self._best_due:
            self.save(samples_seen)

    def save(self, samples_seen: int) -> Path | None:
        """Begin to write a checkpoint of the current state, unless it exists; return its path, or None without a folder."""
        if self.writer is None or self.folder is None:
            return None
        if self._saved_samples != samples_seen:
            backend = self.backend
            backend.align_buffers(self.model, search=True)
            tensors, state = self.snapshot()
            tensors |= {**backend.state(self.model, self.optimizer), **random_state(backend.rank)}
            state |= {
                "world_size": backend.world_size,
                "engine": backend.describe(),
                "groups": group_state(self.optimizer),
                "versions": {name: version(name) for name in ("largebatch", "torch")},
                "date": time.strftime("%Y-%m-%d %H:%M:%S"),
            }
            self.writer.save(samples_seen, tensors, state, self._best_due)
            self._saved_time, self._saved_samples = time.monotonic(), samples_seen
            self._due, self._best_due = False, False
        return self.folder.place(samples_seen)

    def latest(self) -> Checkpoint | None:
        """Return the newest undamaged checkpoint of the run after pending writes, or None if there is none."""
        if self.folder is None:
            return None
        self.wait()
        self.backend.barrier()
        found: Checkpoint | None = None
        if self.backend.rank == 0 and (newest := self.folder.newest_whole()[0]) is not None:
            with suppress(UserError):  # written by a later version
                found = Checkpoint(newest, read_run_state(newest))
        return self.backend.broadcast(found)

    def load(self, found: Checkpoint, step: int, samples_seen: int) -> Tensor:
        """Load weights and the optimizer's state, written by any number of ranks.

        Args:
            found: the checkpoint.
            step: number of updates done at the checkpoint.
            samples_seen: number of samples seen at the checkpoint.

        Returns:
            The sum of the losses since the last row of the log, a float64 scalar: each rank's own sum, or, if the number of
            ranks changed, the sum over all of them on rank 0 and zero on the others.
        """
        path, backend = found.path, self.backend
        backend.load_state(path, self.model, self.optimizer)
        load_group_state(self.optimizer, found.state["groups"])
        is_own = self.folder is not None and path.resolve().parent == self.folder.path.resolve()
        self._saved_samples = samples_seen if is_own else -1
        self._due = not is_own  # a branch writes its own checkpoint at its beginning
        self.coordinator.restart(step)
        losses = read_tensors(path, [name for name in tensor_metadata(path) if name.startswith("loss_sum.")])
        if backend.world_size == found.state["world_size"]:
            return losses[f"loss_sum.{backend.rank}"]
        whole = torch.stack(list(losses.values())).sum()
        return whole if backend.rank == 0 else torch.zeros_like(whole)

    def load_random_state(self, found: Checkpoint) -> None:
        """Load the random state of this rank; call it after everything else that draws random numbers."""
        load_random_state(found.path, self.backend.rank)

    def interrupt(self) -> None:
        """Record a second Ctrl-C: the update is incomplete, so no saved checkpoint counts as the current state."""
        self.stopped_by, self._saved_samples = "interrupted", -1

    def note_best(self) -> None:
        """Record that the validation loss is the lowest so far."""
        self._best_due = self._best_due or self.config.keep_best

    def failure(self) -> str | None:
        """Return the error of a checkpoint, once; None if there is none."""
        return None if self.writer is None else self.writer.failure()

    def wait(self) -> None:
        """Wait until no checkpoint is being written."""
        if self.writer is not None:
            self.writer.wait()

    def close(self, samples_seen: int) -> tuple[str | None, bool]:
        """Finish writing; return the error or None, and whether the state after ``samples_seen`` samples is saved."""
        if self.writer is None:
            return None, False
        self.writer.close()
        failure, saved = self.backend.broadcast((self.writer.failure(), self.writer.saved))
        if failure is None:
            return None, self._saved_samples == samples_seen
        return failure, saved is not None and samples_of(saved) == samples_seen

"""The checkpoints of a run: when one is due, what is in it, and how the run goes on from it; alike on every rank."""

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
    """Saves a run and loads it, and decides with the other ranks when to save and when to stop.

    Every rank has one and calls it alike: all methods but `failure`, `interrupt` and `note_best` may be collectives.

    Args:
        config: when to save, and what to keep.
        backend: the engine.
        model: the bare model.
        optimizer: the optimizer.
        snapshot: returns what is saved beside the weights and the optimizer's state: tensors by name, and values for
            state.json.
        samples_per_epoch: samples between multiples of an epoch.
        folder: run folder; None writes nothing, so that only stopping is left.

    Attributes:
        stopped_by: why the run is to stop; None while it is not.
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
            step: updates done.
            samples_seen: samples of these updates.
            stop: why this rank should stop, if it should.
            at_epoch: whether the last update passed one of the epochs to save at.
        """
        every = self.config.every_minutes
        overdue = every is not None and time.monotonic() - self._saved_time >= 60.0 * every
        self.stopped_by, asked_to_save = self.coordinator.ask(step, stop, overdue)
        self._due = self._due or asked_to_save or at_epoch
        if self.stopped_by is not None or self._due or self._best_due:
            self.save(samples_seen)

    def save(self, samples_seen: int) -> Path | None:
        """Begin to write a checkpoint of the state after so many samples, unless there is one; return its place."""
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
        """Return the newest whole checkpoint of the run, once nothing is being written; None where there is none."""
        if self.folder is None:
            return None
        self.wait()
        self.backend.barrier()
        found: Checkpoint | None = None
        if self.backend.rank == 0 and (newest := self.folder.newest_whole()[0]) is not None:
            with suppress(UserError):  # of a version to come
                found = Checkpoint(newest, read_run_state(newest))
        return self.backend.broadcast(found)

    def load(self, found: Checkpoint, step: int, samples_seen: int) -> Tensor:
        """Load weights and the optimizer's state, whatever number of ranks wrote them.

        Args:
            found: the checkpoint.
            step: updates that it was written after.
            samples_seen: samples that it was written after.

        Returns:
            The sum of the losses since the last row of the log: each rank's own, or, where ranks came or went, that of all
            of them on the first rank and zero on the others; float64 scalar.
        """
        path, backend = found.path, self.backend
        backend.load_state(path, self.model, self.optimizer)
        load_group_state(self.optimizer, found.state["groups"])
        is_own = self.folder is not None and path.resolve().parent == self.folder.path.resolve()
        self._saved_samples = samples_seen if is_own else -1
        self._due = not is_own  # a branch has a checkpoint of its own from its beginning
        self.coordinator.restart(step)
        losses = read_tensors(path, [name for name in tensor_metadata(path) if name.startswith("loss_sum.")])
        if backend.world_size == found.state["world_size"]:
            return losses[f"loss_sum.{backend.rank}"]
        whole = torch.stack(list(losses.values())).sum()
        return whole if backend.rank == 0 else torch.zeros_like(whole)

    def load_random_state(self, found: Checkpoint) -> None:
        """Load the random state of this rank; after everything else that draws random numbers."""
        load_random_state(found.path, self.backend.rank)

    def interrupt(self) -> None:
        """Note a second Ctrl-C: the update is half done, so what was saved before it is no longer where the run stands."""
        self.stopped_by, self._saved_samples = "interrupted", -1

    def note_best(self) -> None:
        """Note that the validation loss is the lowest so far."""
        self._best_due = self._best_due or self.config.keep_best

    def failure(self) -> str | None:
        """Return what went wrong with a checkpoint, once."""
        return None if self.writer is None else self.writer.failure()

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self.writer is not None:
            self.writer.wait()

    def close(self, samples_seen: int) -> tuple[str | None, bool]:
        """Finish; return what went wrong, and whether the state after so many samples is saved."""
        if self.writer is None:
            return None, False
        self.writer.close()
        failure, saved = self.backend.broadcast((self.writer.failure(), self.writer.saved))
        if failure is None:
            return None, self._saved_samples == samples_seen
        return failure, saved is not None and samples_of(saved) == samples_seen

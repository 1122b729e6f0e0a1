"""When a run is saved and when it is stopped, alike on every rank."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from torch import Tensor

from largebatch.checkpoint.folder import CheckpointFolder, samples_of
from largebatch.checkpoint.writer import CheckpointWriter
from largebatch.config.schema import Config
from largebatch.distributed import Backend
from largebatch.distributed.stopping import Reason, StopCoordinator


class CheckpointManager:
    """Says when a checkpoint is due and when the run is to stop, and hands checkpoints to their writer.

    Args:
        config: the config.
        backend: the engine.
        samples_per_epoch: samples between multiples of an epoch.
        folder: run folder; None writes nothing, so that only stopping is left.
    """

    def __init__(self, config: Config, backend: Backend, samples_per_epoch: int, folder: Path | None) -> None:
        self.config, self.backend = config.checkpoint, backend
        self.coordinator = StopCoordinator(backend.sum, backend.rank, backend.world_size)
        self.stopped_by: Reason | None = None
        self._due, self._best_due = False, False
        self._saved_time, self._saved_samples = time.monotonic(), -1
        self.writer: CheckpointWriter | None = None
        if folder is not None:
            every = self.config.keep_every_epochs
            self.writer = CheckpointWriter(
                CheckpointFolder(folder / "checkpoints"),
                backend.rank,
                backend.world_size,
                self.config.asynchronous,
                self.config.keep_last,
                None if every is None else every * samples_per_epoch,
                config.backend.timeout_seconds,
                backend.sum,
            )

    def restart(self, step: int, samples_seen: int, path: Path) -> None:
        """Go on from a checkpoint: its path, and the updates and samples that it was written after."""
        is_own = self.writer is not None and path.resolve().parent == self.writer.folder.path.resolve()
        self._saved_samples = samples_seen if is_own else -1
        self._due = not is_own  # a branch has a checkpoint of its own from its beginning
        self.coordinator.restart(step)

    def interrupt(self) -> None:
        """Note a second Ctrl-C: the update is half done, so what was saved before it is no longer where the run stands."""
        self.stopped_by, self._saved_samples = "interrupted", -1

    def note_best(self) -> None:
        """Note that the validation loss is the lowest so far."""
        self._best_due = self._best_due or self.config.keep_best

    def is_due(self, step: int, stop: Reason | None, at_epoch: bool) -> bool:
        """Return whether to save now; sets ``stopped_by`` where the run is to stop after it. A collective.

        Args:
            step: updates done.
            stop: why this rank should stop, if it should.
            at_epoch: whether the last update passed one of the epochs to save at.
        """
        every = self.config.every_minutes
        overdue = every is not None and time.monotonic() - self._saved_time >= 60.0 * every
        agreed, asked_to_save = self.coordinator.ask(step, stop, overdue)
        self._due = self._due or asked_to_save or at_epoch
        self.stopped_by = agreed
        return agreed is not None or self._due or self._best_due

    def has(self, samples_seen: int) -> bool:
        """Return whether the state after so many samples needs no writing: it is saved, or there is nowhere to."""
        return self.writer is None or self._saved_samples == samples_seen

    def save(self, samples_seen: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Begin to write a checkpoint; see `CheckpointWriter.save`."""
        assert self.writer is not None
        self.writer.save(samples_seen, tensors, state, self._best_due)
        self._saved_time, self._saved_samples = time.monotonic(), samples_seen
        self._due, self._best_due = False, False

    def failure(self) -> str | None:
        """Return what went wrong with a checkpoint, once."""
        return None if self.writer is None else self.writer.failure()

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self.writer is not None:
            self.writer.wait()

    def close(self, samples_seen: int) -> tuple[str | None, bool]:
        """Finish; return what went wrong, and whether the state after so many samples is saved. A collective."""
        if self.writer is None:
            return None, False
        self.writer.close()
        failure, saved = self.backend.broadcast((self.writer.failure(), self.writer.saved))
        if failure is None:
            return None, self._saved_samples == samples_seen
        return failure, saved is not None and samples_of(saved) == samples_seen

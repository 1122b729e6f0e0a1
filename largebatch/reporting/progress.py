"""The progress and the summary of a run, and the protocol of its loggers."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from largebatch.distributed.stopping import Reason
from largebatch.reporting.loggers import Row


class Logger(Protocol):
    """Receives the rows of a run: a metrics.jsonl file, a progress bar, or a tracker."""

    def log(self, row: Row) -> None:
        """Log the row of an update (with ``loss``), of an evaluation (with ``val_loss``), or of an event (with ``event``)."""
        ...

    def sync(self) -> None:
        """Write the rows so far to the disk."""
        ...

    def rewind(self, samples: int) -> None:
        """Remove the rows after ``samples`` samples, from where the run continues."""
        ...

    def close(self) -> None:
        """Close the logger."""
        ...


@dataclass(kw_only=True)
class RunMetrics:
    """Fields that the progress and the summary of a run have in common.

    Args:
        seconds: wall time including evaluation, over all parts of a resumed run.
        skipped: number of updates skipped because of a non-finite gradient.
        unreadable: a line for each sample left out because it cannot be read, with the reason; each line once.
        rollbacks: number of returns to a checkpoint after a non-finite gradient; the order of the samples then changes.
        loss: mean training loss in the last row of the log.
        val_loss: validation loss of the last evaluation.
        val_accuracy: accuracy of the last evaluation, in [0, 1]; None if the task has none.
        best_val_accuracy: highest accuracy of all evaluations.
    """

    seconds: float = 0.0
    skipped: int = 0
    unreadable: list[str] = field(default_factory=list)
    rollbacks: int = 0
    loss: float | None = None
    val_loss: float | None = None
    val_accuracy: float | None = None
    best_val_accuracy: float | None = None


@dataclass(kw_only=True)
class Summary(RunMetrics):
    """Summary of a run.

    Args:
        status: ``finished``; ``preempted`` by a signal or the time limit; ``interrupted``; ``diverged`` at a non-finite
            gradient; ``unsaved`` if the run finished but its last state could not be written.
        updates: number of updates; skipped ones are included.
        samples: number of samples seen.
        epochs: the same number in epochs.
        samples_per_second: training throughput over all ranks, without evaluation.
        world_size: number of ranks.
        message: why the run did not finish, or why its last state could not be saved; None otherwise.
        stopped_by: the reason for the stop of an interrupted or preempted run.
    """

    status: str = "finished"
    updates: int = 0
    samples: int = 0
    epochs: float = 0.0
    samples_per_second: float = 0.0
    world_size: int = 1
    message: str | None = None
    stopped_by: Reason | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields; numbers that JSON cannot represent become None."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


@dataclass(kw_only=True)
class Progress(RunMetrics):
    """Progress of a run, which with the weights, optimizer state and random state is all the state that a checkpoint needs.

    Args:
        step: number of updates done.
        samples_seen: number of samples in these updates.
        skipped_in_a_row: number of skipped updates since the last one that was not skipped.
        loss_samples: number of samples whose losses are not in a row yet.
        row_samples: number of samples seen at the last row.
        train_seconds: wall time of updates, in seconds.
        owes_evaluation: whether the evaluation after the last update has not finished.
        best_val_loss: lowest validation loss of all evaluations.
    """

    step: int = 0
    samples_seen: int = 0
    skipped_in_a_row: int = 0
    loss_samples: int = 0
    row_samples: int = 0
    train_seconds: float = 0.0
    owes_evaluation: bool = False
    best_val_loss: float | None = None

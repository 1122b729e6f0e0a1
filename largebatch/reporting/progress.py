"""Where a run stands, what it came to, and who is told."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from largebatch.distributed.stopping import Reason
from largebatch.reporting.loggers import Row


class Logger(Protocol):
    """Whoever wants to see the rows of a run: metrics.jsonl, a progress bar, a tracker."""

    def log(self, row: Row) -> None:
        """Take a row: an update's (it has a loss), an evaluation's (a val_loss), or what happened (an event)."""
        ...

    def sync(self) -> None:
        """See that the rows so far are on the disk."""
        ...

    def rewind(self, samples: int) -> None:
        """Forget the rows after so many samples: the run continues from there."""
        ...

    def close(self) -> None:
        """Finish."""
        ...


@dataclass(kw_only=True)
class RunMetrics:
    """What a running and an ended run both say of themselves.

    Args:
        seconds: wall time, evaluation included, over all parts of a resumed run.
        skipped: updates left out at a non-finite gradient.
        unreadable: samples that were left out of updates and evaluations because they cannot be read, and why, each once.
        rollbacks: returns to a checkpoint at a non-finite gradient; each continues with another order of the samples.
        loss: training loss of the last logged updates.
        val_loss: of the last evaluation.
        val_accuracy: of the last evaluation, in [0, 1]; None where there is no such thing.
        best_val_accuracy: of all evaluations.
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
    """What a run came to.

    Args:
        status: ``finished``; ``preempted`` by a signal or its time limit; ``interrupted``; ``diverged`` at a non-finite
            gradient; ``unsaved`` where it finished and its last state could not be written.
        updates: optimizer steps.
        samples: samples seen.
        epochs: the same in epochs.
        samples_per_second: training throughput over all ranks, evaluation left out.
        world_size: number of ranks.
        message: why it did not finish.
        stopped_by: what asked for the stop of a preempted run.
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
        """Return the fields; numbers that JSON has no word for become None."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


@dataclass(kw_only=True)
class Progress(RunMetrics):
    """Where a run stands; with the weights, the optimizer and the random numbers, all that a checkpoint needs.

    Args:
        step: updates done.
        samples_seen: samples they used.
        skipped_in_a_row: the last of the skipped ones.
        loss_samples: samples whose losses wait for the next row.
        row_samples: samples seen at the last row.
        train_seconds: time in updates.
        owes_evaluation: whether the evaluation after the last update is still to be done.
        best_val_loss: lowest of all evaluations.
    """

    step: int = 0
    samples_seen: int = 0
    skipped_in_a_row: int = 0
    loss_samples: int = 0
    row_samples: int = 0
    train_seconds: float = 0.0
    owes_evaluation: bool = False
    best_val_loss: float | None = None

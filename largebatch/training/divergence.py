"""Response of a run to a gradient that is NaN or infinite, and the messages about it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from largebatch.distributed import NonFiniteError
from largebatch.reporting.progress import Progress

Choice = Literal["stop", "skip", "roll_back"]

# Numbers of updates skipped in a row, and of returns to a checkpoint in a run, after which the run stops.
MOST_SKIPS, MOST_ROLLBACKS = 20, 10


class Diverged(Exception):
    """The run cannot go on after a gradient that was NaN or infinite; the message says why."""


def choose(choice: Choice, progress: Progress) -> Choice:
    """Return the response to a non-finite gradient: the config's choice, or "stop" once that was taken too often."""
    if choice == "skip" and progress.skipped_in_a_row >= MOST_SKIPS:
        return "stop"
    return "stop" if choice == "roll_back" and progress.rollbacks >= MOST_ROLLBACKS else choice


def describe(error: NonFiniteError, progress: Progress) -> str:
    """Return a line with the number of the update and the ranks whose loss was not finite."""
    ranks = f"the loss was not finite on rank {', '.join(map(str, error.ranks))}"
    cause = ranks if error.ranks else "every loss was finite"
    return (
        f"update {progress.step + 1} (after {progress.samples_seen} samples): the gradient is NaN or infinite, {cause}"
    )


def last_words(what: str, choice: Choice, progress: Progress, checkpoint: Path | None) -> str:
    """Return a line that says why the run stops and what the user can do.

    Args:
        what: the line from `describe`.
        choice: the choice in the config.
        progress: the progress of the run.
        checkpoint: the checkpoint with the state before the update; None if nothing is saved.
    """
    tried = {
        "stop": "",
        "skip": f", {MOST_SKIPS} updates in a row were skipped",
        "roll_back": f", after {progress.rollbacks} returns to a checkpoint"
        if progress.rollbacks
        else ", no checkpoint yet",
    }
    advice = "lower optimizer.lr, lengthen the warm-up, or set optimizer.max_grad_norm"
    if checkpoint is None:
        return f"{what}{tried[choice]}; {advice}"
    return (
        f"{what}{tried[choice]}; the state before it is in {checkpoint}; {advice}; --resume that checkpoint with --out NEW "
        "goes on from there with such changes"
    )

"""The folder of a study: who wrote its files, which of its runs are finished, and errors about damaged files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from largebatch.checkpoint.folder import read_mapping, read_text
from largebatch.config.schema import Config
from largebatch.errors import UserError

UNFINISHED = ("interrupted", "preempted", "unsaved")
# Keys of a run's summary that the table of a study uses.
TAKEN = ("status", "updates", "samples", "val_loss", "val_accuracy")


def check_study_folder(out: Path) -> None:
    """Refuse a folder with results that this study would replace and that no study wrote.

    Raises:
        UserError: with the name of the first such file.
    """
    held = [name for name in ("table.md", "table.json", "curves.png") if os.path.lexists(out / name)]
    try:
        rows = json.loads(read_text(out / "table.json"))
        is_own = bool(rows) and all("variant" in row for row in rows)
    except (OSError, ValueError, TypeError):
        is_own = False
    if held and not is_own:
        raise UserError(
            f"--out: {out} holds {held[0]}, which no study wrote and this one would replace; name another folder"
        )


def read_summary(folder: Path) -> dict[str, Any]:
    """Return the summary.json of a run.

    Raises:
        UserError: if it cannot be read, or lacks a key that the table uses.
    """
    path = folder / "summary.json"
    summary = read_mapping(path, "summary of a run")
    missing = [name for name in TAKEN if name not in summary]
    if missing:
        raise UserError(f"{path}: has no '{missing[0]}'; it was damaged or changed")
    return summary


def is_finished(config: Config, folder: Path) -> bool:
    """Return whether a folder holds this run, with the same config, and the run has ended.

    Raises:
        UserError: if it holds another run, or its files cannot be read.
    """
    if not os.path.lexists(folder / "summary.json") or read_summary(folder)["status"] in UNFINISHED:
        return False
    try:
        written = read_text(folder / "config.yaml")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UserError(
            f"{folder / 'config.yaml'}: cannot be read ({why}); remove {folder} to train the run again"
        ) from error
    if written != config.to_yaml():
        raise UserError(f"{folder}: holds a run of another config; name another --out, or remove it")
    return True


@contextmanager
def results_told(out: Path) -> Iterator[None]:
    """Convert errors from writing a study's table and figure into a `UserError` of one line.

    Raises:
        UserError: if a file cannot be written, or a run's rows or summary are not those of a run.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{out}: the results cannot be written ({error.strerror}); the runs are kept: once they can, the same command "
            "writes them"
        ) from error
    except UserError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{out}: rows or a summary in it are not those of a run ({type(error).__name__}: {error}); they were changed"
        ) from error

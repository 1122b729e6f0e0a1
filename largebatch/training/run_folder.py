"""The run folder: checks of who wrote its files, so that a run overwrites only files that a run wrote."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from largebatch.checkpoint.folder import (
    BEST,
    LATEST,
    LOCK,
    PART,
    STATE,
    CheckpointFolder,
    locked,
    read_mapping,
    read_state,
    samples_of,
)
from largebatch.errors import UserError

CHECKPOINTS, CONFIG, METRICS, WEIGHTS = "checkpoints", "config.yaml", "metrics.jsonl", "model.safetensors"
# Files that a run writes as a whole, and so would replace.
WRITTEN = (CONFIG, METRICS, "summary.json", "curve.png", WEIGHTS, "wandb_id")
SECTIONS = ("data", "model", "batch", "optimizer", "schedule")


def default_folder(name: str) -> Path:
    """Return the path runs/NAME-DATE-TIME."""
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def check_folder(folder: Path, resume: bool = False) -> None:
    """Refuse a folder that cannot take a run.

    Args:
        folder: the run folder.
        resume: whether a run in it is to be continued.

    Raises:
        UserError: if the folder is a checkpoint or not a folder, if it holds something that no run wrote and that a run would
            overwrite, or if it holds a run that is not to be continued.
    """
    try:
        _check(folder, resume)
    except OSError as error:
        raise UserError(f"--out: cannot read {folder} ({error.strerror})") from error


def _check(folder: Path, resume: bool) -> None:
    if os.path.lexists(folder) and not folder.is_dir():
        what = "a link to nothing" if folder.is_symlink() and not folder.exists() else "a file"
        raise UserError(f"--out: {folder} is {what}; name a folder")
    if samples_of(folder) is not None and (folder / STATE).exists():
        raise UserError(f"--out: {folder} is a checkpoint; name a run folder, and the checkpoint with --resume")
    checkpoints = folder / CHECKPOINTS
    if os.path.lexists(checkpoints) and not checkpoints.is_dir():
        what = f"a link to {os.readlink(checkpoints)}, which is not there" if checkpoints.is_symlink() else "a file"
        raise UserError(
            f"--out: {checkpoints} is {what}; put back the folder that it stands for, or name another --out"
        )
    _refuse_pipes(folder)
    if os.path.lexists(folder / LOCK) and _locked_by(folder) is None:
        raise UserError(f"--out: {folder} holds {LOCK}, which no run wrote; name another folder")
    held = _held(folder)
    if not held:
        return
    if not is_run(folder):
        raise UserError(
            f"--out: {folder} holds {held[0]}, which no run wrote and this one would replace; name another folder"
        )
    if not resume:
        raise UserError(
            f"--out: {folder} already holds a run; continue it with --resume auto, name another folder, or remove it"
        )


def _refuse_pipes(folder: Path) -> None:
    """Refuse a pipe, socket or device that has the name of a run's file, because the run would wait for it forever.

    Raises:
        UserError: with the name.
    """
    for name in (LOCK, *WRITTEN):
        for path in (folder / name, folder / (name + PART)):
            if path.exists() and not path.is_file() and not path.is_dir():
                raise UserError(
                    f"--out: {folder} holds {path.name}, a pipe, socket or device where a run has a file; remove it, or name "
                    "another folder"
                )


def _held(folder: Path) -> list[str]:
    """Return the names in a folder that a run would overwrite."""
    held = [name for name in WRITTEN if os.path.lexists(folder / name)]
    checkpoints = folder / CHECKPOINTS
    held += [f"{CHECKPOINTS}/{name}" for name in (LATEST, BEST) if os.path.lexists(checkpoints / name)]
    return held + [f"{CHECKPOINTS}/{path.name}" for path in CheckpointFolder(checkpoints).saved()]


def is_run(folder: Path) -> bool:
    """Return whether a run wrote the files of a folder that have the names of a run's files.

    A folder with a config also needs the lock or the rows of a run. A folder without one needs a checkpoint, and either the
    lock or rows, or none of the other files that a run writes: its checkpoints were copied there alone.
    """
    saved = CheckpointFolder(folder / CHECKPOINTS).saved()
    has_traces = _locked_by(folder) is not None or _has_rows(folder / METRICS)
    if os.path.lexists(folder / CONFIG):
        return has_traces and config_of(folder) is not None
    is_lone = not any(os.path.lexists(folder / name) for name in WRITTEN)
    return (has_traces or is_lone) and any(_is_checkpoint(path) for path in saved)


def config_of(folder: Path) -> dict[str, Any] | None:
    """Return the config of the run in a folder, or None if there is none or the file is not a valid config."""
    try:
        config = read_mapping(folder / CONFIG, "config of a run")
    except UserError:
        return None
    return config if all(isinstance(config.get(name), Mapping) for name in SECTIONS) and "seed" in config else None


def _locked_by(folder: Path) -> str | None:
    """Return the beginning of what a run wrote into the lock of a folder, or None if no run's lock is there."""
    try:
        with (folder / LOCK).open("rb") as file:
            text = file.read(8)
    except OSError:
        return None
    return text.decode() if b"process ".startswith(text) else None


def _has_rows(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            row = json.loads(file.readline(2**20))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(row, dict) and "samples" in row


def _is_checkpoint(path: Path) -> bool:
    try:
        read_state(path)
    except UserError:
        return False
    return True


def lock_wait() -> float:
    """Return the seconds to wait for a run folder; longer after a restart, when the previous processes may still be exiting."""
    counts = (os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return 30.0 if any(count not in ("0", "") for count in counts) else 2.0


def claim(folder: Path, may_rename: bool, held: ExitStack) -> Path:
    """Make a new run folder and lock it; return its path.

    Args:
        folder: the run folder.
        may_rename: whether to append a number to its name if another run has taken the name.
        held: stack that holds the lock and, when it closes, removes the folder if nothing was written into it.

    Raises:
        UserError: if another run has made the folder, or it cannot be made.
    """
    place, number = folder, 1
    while True:
        try:
            _make_parents(place)
            place.mkdir()  # if two runs begin together, only one of them makes it
            break
        except FileExistsError as error:
            if not may_rename:
                raise UserError(f"--out: {folder} was begun by another run just now; name another folder") from error
            number += 1
            place = folder.with_name(f"{folder.name}-{number}")
        except OSError as error:
            raise UserError(f"--out: cannot write to {folder} ({error.strerror})") from error
    held.callback(_remove_unused, place)
    held.enter_context(locked(place, 0.0))
    if (place / "config.yaml").exists():  # another run began and ended in between
        raise UserError(f"--out: {place} was begun by another run just now; name another folder")
    return place


def _remove_unused(folder: Path) -> None:
    """Remove a run folder that holds only the lock."""
    with suppress(OSError):
        if [path.name for path in folder.iterdir()] == [LOCK]:
            (folder / LOCK).unlink()
            folder.rmdir()


def _make_parents(place: Path) -> None:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UserError(f"--out: cannot write to {place} (a folder above it is a file)") from error

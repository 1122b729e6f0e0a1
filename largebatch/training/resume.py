"""Choice of the checkpoint that a run continues from, and the checks that it may."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from largebatch.checkpoint.folder import (
    STATE,
    CheckpointFolder,
    find_problems,
    read_mapping,
    read_run_state,
    samples_of,
)
from largebatch.checkpoint.manager import Checkpoint
from largebatch.config.schema import Config
from largebatch.data import changed_parts
from largebatch.errors import UserError
from largebatch.section import leaves, user_path
from largebatch.training.run_folder import CHECKPOINTS, CONFIG, METRICS, WEIGHTS, config_of, is_run

# Keys that may differ from the run that wrote a checkpoint: they decide where samples are computed, and what is shown and kept,
# but not which samples enter an update or how these change the weights.
FREE = (
    "backend", "loader", "log", "checkpoint", "evaluate", "batch.micro_size", "data.path", "data.corrupt", "data.train_samples",
    "optimizer.non_finite",
)  # fmt: skip
BOUND = ("backend.squares_every", "backend.squares_dtype")
BATCH = ("batch.size", "batch.max_size", "batch.growth", "batch.critical_share")
# Keys that a run that branches off into its own folder may change as well.
BRANCH = ("optimizer", "scaling", "schedule", "warmup", "noise", *BATCH)
SAME_IN_A_BRANCH = ("optimizer.name",)

ALLOWED_CHANGES = (
    "may differ: the number of ranks, batch.micro_size, backend (but squares_every and squares_dtype), loader, log, "
    "checkpoint, evaluate, data.path, corrupt and train_samples, optimizer.non_finite; a run that branches off (--resume "
    "CHECKPOINT --out NEW) may also change optimizer (but its name), scaling, schedule, warmup, noise and batch.size, "
    "max_size, growth and critical_share"
)


def run_folder_of(resume: str) -> Path:
    """Return the run folder for ``--resume PATH``: PATH itself, or the folder of the run that wrote the checkpoint PATH.

    Raises:
        UserError: if the checkpoint does not lie in the folder of the run that wrote it.
    """
    path = user_path(resume, "--resume")
    if samples_of(path) is None:
        return path
    if not path.is_dir():
        raise UserError(f"--resume: {path} does not exist")
    # Try the path as given first, because checkpoints may be a link to another disk; or PATH may link to a run's checkpoint.
    for place in (path.absolute(), path.resolve()):
        folder = place.parent.parent
        if place.parent.name == CHECKPOINTS and is_run(folder) and _wrote(folder, path):
            return folder
    raise UserError(
        f"--resume: {path} does not lie in the folder of its run (RUN/{CHECKPOINTS}/{path.name} beside RUN/{CONFIG}); say with "
        "--out where the run is to go on"
    )


def _wrote(folder: Path, checkpoint: Path) -> bool:
    """Return whether the run of a folder wrote a checkpoint, judged by their configs."""
    config = config_of(folder)
    if config is None:
        return False
    try:
        state = read_run_state(checkpoint)
    except UserError:  # damaged: the error is raised where the checkpoint is read
        return True
    return not _differing(config, state["config"])


def _differing(own: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """Return the keys by which two configs belong to different runs.

    A key that only one of them has is ignored: it belongs to another version, or to another kind of section with another name.
    """
    ours, theirs = dict(leaves(own)), dict(leaves(saved))
    keys = [key for key in ours if key in theirs and theirs[key] != ours[key]]
    return [key for key in keys if key in BOUND or not _is_under(key, FREE)]


def find_checkpoint(resume: str, folder: Path) -> tuple[Checkpoint | None, tuple[str, ...]]:
    """Return the checkpoint that a run continues from, or None if it begins anew, and notes for the user.

    Args:
        resume: ``auto`` for the newest whole checkpoint of the run folder, if it has one; another run folder, for its newest
            whole checkpoint; or a checkpoint.
        folder: the run folder.

    Raises:
        UserError: if the named checkpoint is missing or damaged, or if a run has checkpoints and all of them are damaged.
    """
    path = folder if resume == "auto" else user_path(resume, "--resume")
    if samples_of(path) is not None:
        if not path.is_dir():
            raise UserError(f"--resume: {path} does not exist")
        problems = find_problems(path)
        if problems:
            raise UserError(f"--resume: {path} is damaged: {'; '.join(problems)}")
        return Checkpoint(path, read_run_state(path)), ()
    checkpoints = CheckpointFolder(path / CHECKPOINTS)
    newest, damaged = checkpoints.newest_whole()
    if newest is not None:
        return Checkpoint(newest, read_run_state(newest)), tuple(
            f"{line}; the one before it is used" for line in damaged
        )
    if damaged:
        raise UserError(f"--resume: no checkpoint of {path} is whole: {damaged[0]}")
    if resume != "auto":
        raise UserError(f"--resume: {path} has no checkpoint (expected {path}/checkpoints/samples-*/{STATE})")
    return None, ()


def _is_under(key: str, sections: Sequence[str]) -> bool:
    return any(key == section or key.startswith(section + ".") for section in sections)


def check_same_run(config: Config, begun_with: Mapping[str, Any], where: Path, is_branch: bool = False) -> list[str]:
    """Refuse to continue a run of another model, optimizer, plan or data set; return the keys that a branch changes.

    Args:
        config: the config to continue with.
        begun_with: the config that the run was begun with, as a mapping.
        where: the folder or checkpoint with that config.
        is_branch: whether the run branches off from it.

    Raises:
        UserError: with each key that differs, and the keys that may differ.
    """
    saved, own = dict(leaves(begun_with)), dict(leaves(config.model_dump(mode="json")))
    differing = _differing(own, saved)
    changed = [key for key in differing if is_branch and _is_under(key, BRANCH) and key not in SAME_IN_A_BRANCH]
    differing = [key for key in differing if key not in changed]
    if differing:
        listed = ", ".join(f"{key} {saved[key]} there, {own[key]} here" for key in differing[:4])
        more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise UserError(f"--resume: {where} is of another run: {listed}{more}; {ALLOWED_CHANGES}")
    return [f"{key} {saved[key]} there, {own[key]} here" for key in changed]


def _check_data(config: Config, found: Checkpoint, data: Mapping[str, Any]) -> tuple[str, ...]:
    """Refuse to continue on other data, or return notes about it if checkpoint.same_data is false.

    Raises:
        UserError: with the differences.
    """
    num_here, num_there = data["train"]["samples"], found.state["num_train"]
    if num_there != num_here:
        counts = f"{num_there:,} training samples there, {num_here:,} here"
        then = (
            "an order of its own from here on, in which some samples of the epoch under way come twice or not at all; schedule "
            "and end by the new length of an epoch"
        )
        if config.checkpoint.same_data:
            raise UserError(
                f"--resume: {found.path} is of another data set: {counts}; put back what is gone (of a photograph that cannot "
                f"be read the name is enough, with --data.corrupt skip), or go on so, --checkpoint.same_data false: {then}"
            )
        return (f"continues on another data set: {counts}; {then}",)
    changed = changed_parts(data, found.state.get("data"))  # an old checkpoint has no digest
    if not changed:
        return ()
    line = f"{found.path} was written with other data, which differs in {', '.join(changed)}"
    if config.checkpoint.same_data:
        raise UserError(
            f"--resume: {line}; bring the former data back, or go on with this with --checkpoint.same_data false"
        )
    return (line,)


def _begun_again(folder: Path) -> tuple[str, ...]:
    """Return a note if a run that has rows but no checkpoint begins again.

    Raises:
        UserError: if the run had finished, because its weights would be replaced.
    """
    if os.path.lexists(folder / WEIGHTS):
        raise UserError(
            f"--resume: {folder} holds the weights of a finished run ({WEIGHTS}) and no checkpoint to continue from; name "
            f"another --out, or remove {WEIGHTS} to begin it again"
        )
    try:
        has_rows = (folder / METRICS).stat().st_size > 0
    except OSError:
        has_rows = False
    return (f"{folder} has no checkpoint: the run begins again, and so do its rows",) if has_rows else ()


def choose_checkpoint(
    config: Config, resume: str, folder: Path, data: Mapping[str, Any]
) -> tuple[Checkpoint | None, tuple[str, ...]]:
    """Return the result of `find_checkpoint`, after checking that the run may continue from it in its folder.

    Args:
        config: the config.
        resume: see `find_checkpoint`.
        folder: the run folder.
        data: the digest of the run's data.

    Raises:
        UserError: if the run may not continue from it.
    """
    found, notes = find_checkpoint(resume, folder)
    own = CheckpointFolder(folder / CHECKPOINTS)
    if found is None:
        # A run that ended before its first checkpoint begins again if its config is the same.
        if (folder / CONFIG).exists():
            check_same_run(config, read_mapping(folder / CONFIG, "config of a run"), folder)
        return None, (*notes, *_begun_again(folder))
    is_own = found.path.resolve().parent == own.path.resolve()
    changed = check_same_run(config, found.state["config"], found.path, is_branch=not is_own)
    if is_own and (folder / CONFIG).exists():  # refuse a checkpoint of another run that was put there
        check_same_run(config, read_mapping(folder / CONFIG, "config of a run"), folder)
    if changed:
        notes = (*notes, f"branches off at {found.path} with {', '.join(changed)}")
    rules = {found.state["config"]["scaling"]["rule"], config.scaling.rule}
    if len(rules) > 1 and found.state["config"]["scaling"]["rule"] == "adascale":
        raise UserError(
            f"--resume: {found.path} stands on AdaScale's clock, on which a run with scaling.rule {config.scaling.rule} cannot "
            "go on; branch off with adascale, or begin anew"
        )
    notes = (*notes, *_check_data(config, found, data))
    if not is_own and ((folder / CONFIG).exists() or own.saved()):
        if not (folder / CONFIG).exists():
            raise UserError(f"--out: {folder} already has checkpoints; name another folder")
        # The run branched off earlier and was restarted with the same command.
        check_same_run(config, read_mapping(folder / CONFIG, "config of a run"), folder)
        begun, more = find_checkpoint("auto", folder)
        if begun is not None:
            more = (*more, *_check_data(config, begun, data))
            return begun, (*more, f"{folder} was begun at {found.path} or elsewhere before: it goes on where it stands")
    newer = [path for path in own.saved() if path.name > found.path.name] if is_own and resume != "auto" else []
    newer = [path for path in newer if not find_problems(path)]
    if newer:
        raise UserError(
            f"--resume: {folder} has newer checkpoints, up to {newer[-1].name}; name a new folder with --out to branch off "
            f"at {found.path.name}, or remove them"
        )
    return found, notes

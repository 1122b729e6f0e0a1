"""Checkpoints on disk. A checkpoint folder is either complete or absent, and is checked against its manifest.

    RUN/checkpoints/
        latest                      name of the newest checkpoint, for people and scripts
        best                        name of the checkpoint with the lowest validation loss (checkpoint.keep_best)
        samples-000000012800/       one checkpoint, named by the number of samples seen
            *.distcp .metadata      tensors, as torch.distributed.checkpoint writes them
            state.json              progress of the run, its config, and versions
            manifest.json           bytes and SHA-256 of every other file
        samples-000000025600.part/  a checkpoint that is being written

A checkpoint is written, with its manifest, into a folder with the suffix `.part`, which is then renamed; `latest` is updated
last. So whenever a process ends, every folder without `.part` is complete, unless the disk loses data, which the manifest
shows.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from largebatch.errors import UserError
from largebatch.section import Count, Epochs, Minutes, Section

PREFIX, PART = "samples-", ".part"
STATE, MANIFEST, LATEST, BEST, LOCK = "state.json", "manifest.json", "latest", "best", ".lock"
FORMAT = 1
READERS = 8  # number of files read in parallel to check a checkpoint

Entry = dict[str, Any]


class CheckpointConfig(Section):
    """When the state of a run is kept, and for how long. There is one at the end, and one where a run is stopped."""

    every_minutes: Minutes | None = 10.0
    """Minutes between two checkpoints; null for none by the clock."""
    every_epochs: Epochs | None = None
    """Epochs between two checkpoints, beside those by the clock."""
    keep_last: Count = 2
    """Newest checkpoints that are kept."""
    keep_best: bool = False
    """Save where an evaluation has the lowest validation loss so far, and keep that one too."""
    keep_every_epochs: Epochs | None = None
    """Keep for good the first checkpoint after each multiple of so many epochs."""
    asynchronous: bool = True
    """Write beside the training, from a copy in the host's memory; false stops the training while it writes."""
    same_data: bool = True
    """Continue only on the data that the checkpoint was written with; false tells what differs and goes on."""
    time_limit_minutes: Minutes | None = None
    """Stop after this time with a checkpoint, as at a signal of pre-emption."""


def replace_text(path: Path, text: str) -> None:
    """Replace a small file by writing a temporary file and renaming it, so that readers see the old text or the new."""
    beside = path.with_name(path.name + PART)
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError:
        with suppress(OSError):
            beside.unlink()
        raise


def read_bytes(path: Path) -> bytes:
    """Return the contents of a file. A pipe that nobody writes to is read as empty instead of waiting.

    Raises:
        OSError: if it cannot be read.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        return file.read() or b""


def read_text(path: Path) -> str:
    """Return the text of a file, as `read_bytes` reads it.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not UTF-8 text.
    """
    return read_bytes(path).decode()


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """Return the contents of a small YAML or JSON file.

    Args:
        path: the file.
        what: the name of its expected contents, for the message.

    Raises:
        UserError: if it cannot be read, or does not hold a mapping.
    """
    try:
        values = yaml.safe_load(read_text(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path}: is no {what} ({type(error).__name__}); it was damaged or changed") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: is no {what} (it holds no mapping); it was damaged or changed")
    return values


def describe_file(path: Path) -> Entry:
    """Return the size in bytes and the SHA-256 of a file, as a manifest entry."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def samples_of(path: Path) -> int | None:
    """Return the number of samples seen at a checkpoint from its folder's name, or None if it is not a checkpoint's name."""
    name = re.fullmatch(f"{PREFIX}([0-9]{{12,}})", path.name)
    return int(name[1]) if name else None


def find_problems(path: Path) -> list[str]:
    """Return the problems of a checkpoint, one line each; an empty list if it is complete and undamaged."""
    try:
        manifest = json.loads(read_text(path / MANIFEST))
        files = {name: {"bytes": int(e["bytes"]), "sha256": e["sha256"]} for name, e in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [f"{MANIFEST} cannot be read ({type(error).__name__})"]
    problems = [] if STATE in files else [f"{MANIFEST} does not have {STATE}"]
    outside = [name for name in files if Path(name).name != name]
    if outside:
        return [f"{MANIFEST} names '{outside[0][:80]}', which is no file of this folder"]

    def problem(name: str) -> str | None:
        expected = files[name]
        try:
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name}: {size:,} bytes, the manifest has {expected['bytes']:,}"
            return None if describe_file(path / name) == expected else f"{name}: the checksum is not the manifest's"
        except OSError as error:
            return f"{name}: {error.strerror}"

    with ThreadPoolExecutor(READERS) as readers:  # hashing releases the GIL
        problems += filter(None, readers.map(problem, files))
    return problems or _renamed(path)


def _renamed(path: Path) -> list[str]:
    """Return a line if an undamaged checkpoint has the name of another one, and so would count as newer or older than it is."""
    named = samples_of(path)
    with suppress(UserError, KeyError, TypeError, ValueError):  # damaged or of another format: reported elsewhere
        seen = read_state(path)["progress"]["samples_seen"]
        if named is not None and seen != named:
            return [f"it was renamed: {STATE} is of {seen} samples, so its name is {PREFIX}{seen:012d}"]
    return []


def read_state(path: Path) -> dict[str, Any]:
    """Return the state.json of a checkpoint: the progress of the run, its config, and versions.

    Raises:
        UserError: if it is not a checkpoint, or has another format.
    """
    try:
        state = json.loads(read_text(path / STATE))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a checkpoint ({STATE} cannot be read)") from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: not a checkpoint ({STATE} is no mapping)")
    if state.get("format") != FORMAT:
        raise UserError(
            f"{path}: checkpoint format {state.get('format')}, this version reads {FORMAT}; "
            f"it was written by largebatch {state.get('versions', {}).get('largebatch', 'of another version')}"
        )
    return dict(state)


def read_run_state(path: Path) -> dict[str, Any]:
    """Return the result of `read_state`, after checking the types of a run's values.

    Raises:
        UserError: see `read_state`; also if a value is missing or of the wrong type.
    """
    state = read_state(path)
    problem = _problem_of(state)
    if problem:
        raise UserError(f"{path}: not a checkpoint ({STATE}: {problem})")
    return state


# The keys of a state.json, and the types of their values.
_KINDS: dict[str, type | tuple[type, ...]] = {
    "progress": dict, "config": dict, "num_train": int, "world_size": int, "micro_size": int, "engine": str, "groups": list,
    "versions": dict, "date": str,
}  # fmt: skip


def _problem_of(state: dict[str, Any]) -> str | None:
    """Return the first problem in the values of a state.json, or None if there is none."""
    for key, kind in _KINDS.items():
        if not isinstance(state.get(key), kind):
            return f"'{key}' is {'missing' if key not in state else 'of another kind'}"
    for key in ("samples_seen", "step"):
        value = state["progress"].get(key)
        if not isinstance(value, int) or value < 0:
            return f"'progress.{key}' is no count"
    if not isinstance(state["config"].get("scaling"), dict) or "rule" not in state["config"]["scaling"]:
        return "'config' is no config of a run"
    if not all(isinstance(group, dict) for group in state["groups"]):
        return "'groups' is of another kind"
    if not isinstance(state.get("data", {}), dict):
        return "'data' is of another kind"
    if min(state["num_train"], state["world_size"], state["micro_size"]) < 1:
        return "a count is not positive"
    return None


@contextmanager
def locked(folder: Path, wait_seconds: float = 30.0) -> Iterator[None]:
    """Lock a run folder for this process, so that processes of an earlier launch cannot write beside a resumed run.

    Args:
        folder: the run folder, which must exist.
        wait_seconds: time to wait for a process that is still exiting.

    Raises:
        UserError: if another process holds the lock, or it cannot be written. Without locks in the file system, none is held.
    """
    try:
        opened = (folder / LOCK).open("a+b", buffering=0)
    except OSError as error:
        raise UserError(f"--out: cannot write to {folder} ({error.strerror})") from error
    with opened as file:
        deadline = time.monotonic() + wait_seconds
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    file.seek(0)
                    holder = file.read().decode(errors="replace").strip() or "another process"
                    raise UserError(f"--out: {folder} is being written by {holder}; stop it first") from error
                time.sleep(0.2)
            except OSError:
                break
        with suppress(OSError):  # on a full disk the lock is held without a name in it
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}\n".encode())
        yield


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        path: the folder, ``RUN/checkpoints``, which is made when the first checkpoint is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def place(self, samples_seen: int) -> Path:
        """Return the path of the checkpoint after ``samples_seen`` samples."""
        return self.path / f"{PREFIX}{samples_seen:012d}"

    def part(self, samples_seen: int) -> Path:
        """Return the path where that checkpoint is written before it is committed."""
        return self.place(samples_seen).with_name(self.place(samples_seen).name + PART)

    def saved(self) -> list[Path]:
        """Return the checkpoints, oldest first."""
        found = [p for p in self.path.glob(PREFIX + "*") if samples_of(p) is not None and p.is_dir()]
        return sorted(found, key=lambda p: samples_of(p) or 0)

    def newest_whole(self) -> tuple[Path | None, list[str]]:
        """Return the newest undamaged checkpoint by its manifest, and a line for each newer one that is damaged."""
        damaged: list[str] = []
        for path in reversed(self.saved()):
            problems = find_problems(path)
            if not problems:
                return path, damaged
            damaged.append(f"{path} is damaged: {'; '.join(problems)}")
        return None, damaged

    def begin(self, samples_seen: int) -> Path:
        """Make the folder `part`, empty, and return it."""
        part = self.part(samples_seen)
        _discard(part)
        part.mkdir(parents=True)
        return part

    def commit(self, part: Path, state: Mapping[str, Any], files: Mapping[str, Entry]) -> Path:
        """Write a checkpoint's state and manifest, rename it to its place, and return that; call `mark_latest` next.

        Args:
            part: the folder from `begin`, with the tensors in it.
            state: the values that `read_state` will return.
            files: the manifest entries of the tensors' files.
        """
        replace_text(part / STATE, json.dumps({"format": FORMAT, **state}, indent=2) + "\n")
        entries = {**files, STATE: describe_file(part / STATE)}
        replace_text(part / MANIFEST, json.dumps({"files": entries}, indent=2) + "\n")
        place = part.with_name(part.name.removesuffix(PART))
        if os.path.lexists(place):  # a damaged one, which the run has reached again
            _remove(place)
        _sync_folder(part)
        part.rename(place)
        _sync_folder(self.path)
        return place

    def mark_latest(self, place: Path) -> None:
        """Write the name of the newest checkpoint to `latest`."""
        replace_text(self.path / LATEST, place.name + "\n")

    def mark_best(self, place: Path) -> None:
        """Write the name of the checkpoint with the lowest validation loss to `best`."""
        replace_text(self.path / BEST, place.name + "\n")

    def best(self) -> Path | None:
        """Return the checkpoint with the lowest validation loss, or None if none was marked."""
        try:
            return self.path / read_text(self.path / BEST).strip()
        except (OSError, ValueError):
            return None

    def prune(self, newest: Path, keep_last: int, keep_every: float | None = None) -> None:
        """Remove all but the best checkpoint, the last few, and the first after each multiple of ``keep_every`` samples.

        Args:
            newest: the checkpoint that was just committed. Later ones are damaged, or from before the run went back; they are
                removed too, so that they do not count among the last few.
            keep_last: number of the newest checkpoints to keep, at least 1.
            keep_every: number of samples; None to keep none permanently.
        """
        everything = self.saved()
        saved = [path for path in everything if path.name <= newest.name]
        kept = {self.best(), *saved[-keep_last:]}
        before = 0
        for path in saved:
            samples = samples_of(path) or 0
            if keep_every is not None and samples // keep_every > before // keep_every:
                kept.add(path)
            before = samples
        for path in everything:
            if path not in kept:
                _remove(path)

    def clean(self) -> None:
        """Remove files and folders that were being written when a process ended, if possible."""
        names = (PREFIX + "*" + PART, LATEST + PART, BEST + PART)  # leave other files alone
        for part in (part for name in names for part in self.path.glob(name)):
            _discard(part)


def _discard(path: Path) -> None:
    """Remove a folder, a file or a link, but not the target of a link; ignore errors."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _remove(path: Path) -> None:
    """Remove a checkpoint, after renaming it, so that a partly removed folder is not taken for a checkpoint."""
    doomed = path.with_name(f"{path.name}.old{PART}")
    _discard(doomed)
    path.rename(doomed)
    _discard(doomed)


def _sync_folder(path: Path) -> None:
    """Make renames in a folder survive a power failure, if the file system supports it."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)

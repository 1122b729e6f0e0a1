"""Saving while training goes on: the state is copied, a thread writes the copy, rank 0 commits it."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.torch_version import TorchVersion

from largebatch.checkpoint import CheckpointFolder, describe_file
from largebatch.distributed.state import write_tensors

# A disk with less room than this, beside what was being written, is full.
FULL_BYTES = 2**20
# Before, a stager emptied its own tables after its first use.
STAGES_ONCE = TorchVersion(torch.__version__) < "2.13"


def cause_of(error: BaseException) -> str:
    """Return an exception's own cause in one line; torch.distributed.checkpoint wraps those of all ranks into one."""
    failures = getattr(error, "failures", None)
    if failures:
        rank, wrapped = sorted(failures.items())[0]
        inner = wrapped[0] if isinstance(wrapped, tuple) else wrapped
        return f"rank {rank}: {cause_of(inner)}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time; every rank makes one and calls it alike.

    Args:
        folder: where checkpoints go, on a file system that all ranks see.
        rank: this process; rank 0 commits.
        world_size: ranks that write.
        asynchronous: copy the state and write it beside the training; False writes before `save` returns.
        keep_last: newest checkpoints that are kept.
        keep_every: samples; the first checkpoint after each multiple is kept for good.
        timeout_seconds: a rank that is not heard of for so long in a save makes it fail.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        rank: int,
        world_size: int,
        asynchronous: bool = True,
        keep_last: int = 1,
        keep_every: float | None = None,
        timeout_seconds: float = 600.0,
    ) -> None:
        self.folder, self.rank = folder, rank
        self.keep_last, self.keep_every = keep_last, keep_every
        # The writing thread's collectives must not meet the training's.
        timeout = timedelta(seconds=timeout_seconds)
        # Every rank is a member, which the type that torch 2.14 declares does not say.
        self.group: Any = dist.new_group(backend="gloo", timeout=timeout) if world_size > 1 else None
        self.asynchronous = asynchronous
        self.stager: DefaultStager | None = None
        self.thread: threading.Thread | None = None
        self.error: str | None = None
        self.saved: Path | None = None
        self.stalled_seconds = 0.0
        self.busy_seconds = 0.0

    def save(
        self, samples_seen: int, tensors: Mapping[str, Tensor], state: dict[str, Any], is_best: bool = False
    ) -> None:
        """Write a checkpoint; what went wrong with it is told by `failure`, now or later.

        Args:
            samples_seen: names the checkpoint.
            tensors: by name; not read any more when this returns.
            state: of rank 0, for state.json.
            is_best: whether its validation loss is the lowest so far.
        """
        started = time.perf_counter()
        self.wait()
        if not self.asynchronous:
            self._write(samples_seen, tensors, state, is_best)
        else:
            if self.stager is None or STAGES_ONCE:
                self.stager = DefaultStager(StagingOptions(torch.cuda.is_available(), False, False, False))
            staged = self.stager.stage(dict(tensors))
            # A daemon: a rank whose peers are gone must be able to leave.
            self.thread = threading.Thread(target=self._write, args=(samples_seen, staged, state, is_best), daemon=True)
            self.thread.start()
        self.stalled_seconds += time.perf_counter() - started

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def failure(self) -> str | None:
        """Return, once, what went wrong with the last checkpoint; None while all is well."""
        error, self.error = self.error, None
        return error

    def close(self) -> None:
        """Wait, and let go of the copy."""
        self.wait()
        if self.stager is not None:
            self.stager.close()

    def _write(self, samples_seen: int, tensors: Mapping[str, Tensor], state: dict[str, Any], is_best: bool) -> None:
        started = time.perf_counter()
        part, place = None, None
        try:
            part = self._begin(samples_seen)
            write_tensors(part, tensors, self.group)
            files = self._describe(part)
            if self.rank == 0:
                self.saved = place = self.folder.commit(part, state, files)
                # The checkpoint is there, whatever comes: a name that cannot be moved loses nothing.
                try:
                    self.folder.mark_latest(place)
                    if is_best:
                        self.folder.mark_best(place)
                finally:
                    self.folder.prune(place, self.keep_last, self.keep_every)
        except BaseException as error:
            name = self.folder.place(samples_seen).name
            what = f"checkpoint {name} not written" if place is None else f"checkpoint {name} is whole, but"
            self.error = f"{what}: {self._cause_of(error)}"
            if part is not None and self.rank == 0:
                shutil.rmtree(part, ignore_errors=True)
        self.busy_seconds += time.perf_counter() - started

    def _cause_of(self, error: BaseException) -> str:
        cause = cause_of(error)
        # torch's archive writer does not pass on what the system told it.
        if "inline_container" in cause and self.folder.path.is_dir():
            free = shutil.disk_usage(self.folder.path).free
            reason = os.strerror(errno.ENOSPC) if free < FULL_BYTES else "the file system did not take all bytes"
            return f"{reason}: {self.folder.path} ({free:,} bytes free)"
        return cause

    def _begin(self, samples_seen: int) -> Path:
        """Make the folder on rank 0, and see that every rank sees it."""
        part = self.folder.place(samples_seen)
        failure: OSError | None = None
        if self.rank == 0:
            try:
                part = self.folder.begin(samples_seen)
            except OSError as error:
                failure = error
        part, _ = self._share((part, failure))[0]
        try:
            is_seen = part.is_dir()
        except OSError:
            is_seen = False
        if not is_seen:
            what = f"rank {self.rank} does not see it; the run folder must be on a file system all ranks share"
            failure = FileNotFoundError(2, what, str(part))
        self._share((part, failure))
        return part

    def _describe(self, part: Path) -> dict[str, Any]:
        """Return the manifest's entries; each rank reads back what it wrote itself."""
        mine, failure = {}, None
        try:
            mine = {path.name: describe_file(path) for path in part.glob(f"__{self.rank}_*")}
            if self.rank == 0:
                mine[".metadata"] = describe_file(part / ".metadata")
        except OSError as error:
            failure = error
        return {name: entry for files, _ in self._share((mine, failure)) for name, entry in files.items()}

    def _share(self, outcome: tuple[Any, OSError | None]) -> list[tuple[Any, OSError | None]]:
        """Return what every rank came to, on every rank.

        Raises:
            OSError: where a rank failed, on all of them alike: none waits for one that gave up.
        """
        outcomes: list[Any] = [outcome]
        if self.group is not None:
            outcomes = [None] * dist.get_world_size(self.group)
            dist.all_gather_object(outcomes, outcome, group=self.group)
        failures = [failure for _, failure in outcomes if failure is not None]
        if failures:
            raise failures[0]
        return outcomes

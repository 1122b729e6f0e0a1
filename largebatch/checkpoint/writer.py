"""Saving while training goes on: the state is copied, a thread writes the copy, rank 0 commits it."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.torch_version import TorchVersion

from largebatch.checkpoint.folder import CheckpointFolder, describe_file
from largebatch.distributed.state import write_tensors
from largebatch.distributed.watch import cause_of

# A disk with less room than this, beside what was being written, is full.
FULL_BYTES = 2**20
# Before, a stager emptied its own tables after its first use.
STAGES_ONCE = TorchVersion(torch.__version__) < "2.13"
T = TypeVar("T")


class SaveError(RuntimeError):
    """A step of a save failed on some rank, and every rank was told of it."""


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
        sum_over_ranks: elementwise sum of a tensor over the ranks, by the training's own collectives.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        rank: int,
        world_size: int,
        *,
        asynchronous: bool = True,
        keep_last: int = 1,
        keep_every: float | None = None,
        timeout_seconds: float = 600.0,
        sum_over_ranks: Callable[[Tensor], Tensor] = lambda values: values,
    ) -> None:
        self.folder, self.rank, self.world_size = folder, rank, world_size
        self.keep_last, self.keep_every = keep_last, keep_every
        self.timeout, self.sum_over_ranks = timedelta(seconds=timeout_seconds), sum_over_ranks
        # Every rank is a member, which the type that torch 2.14 declares does not say.
        self.group: Any = None
        self.is_broken = True  # the group: none yet, or one in which the ranks may be at different collectives
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
        self._join()
        if not self.asynchronous:
            self._write(samples_seen, tensors, None, state, is_best)
        else:
            staged, failure = self._stage(tensors)
            # A daemon: a rank whose peers are gone must be able to leave.
            arguments = (samples_seen, staged, failure, state, is_best)
            self.thread = threading.Thread(target=self._write, args=arguments, daemon=True)
            self.thread.start()
        self.stalled_seconds += time.perf_counter() - started

    def _join(self) -> None:
        """Give the writing threads a group of their own, whose collectives do not meet the training's.

        A group that has lost a message stays broken. All ranks take a new one where one of them has noticed.
        """
        if self.world_size == 1 or not float(self.sum_over_ranks(torch.tensor(float(self.is_broken)))):
            return
        if self.group is not None:
            dist.destroy_process_group(self.group)
        self.group = dist.new_group(backend="gloo", timeout=self.timeout)
        self.is_broken = False

    def _stage(self, tensors: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], BaseException | None]:
        """Return a copy in the host's memory, or why there is none."""
        try:
            if self.stager is None or STAGES_ONCE:
                self.stager = DefaultStager(StagingOptions(torch.cuda.is_available(), False, False, False))
            staged: Any = self.stager.stage(dict(tensors))
            return staged, None
        except (Exception, CheckpointException) as error:
            self.stager = None  # which may hold half of a copy
            return {}, error

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

    def _write(
        self,
        samples_seen: int,
        tensors: Mapping[str, Tensor],
        failure: BaseException | None,
        state: dict[str, Any],
        is_best: bool,
    ) -> None:
        started = time.perf_counter()
        place = None
        try:
            part = self._begin(samples_seen, failure)
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
        except BaseException as error:  # CheckpointException is no Exception
            name = self.folder.place(samples_seen).name
            what = f"checkpoint {name} not written" if place is None else f"checkpoint {name} is whole, but"
            self.error = f"{what}: {self._cause_of(error)}"
            self.is_broken = not isinstance(error, SaveError | CheckpointException)  # those reached every rank
            if self.rank == 0:
                shutil.rmtree(self.folder.part(samples_seen), ignore_errors=True)
            if isinstance(error, KeyboardInterrupt):
                raise
        self.busy_seconds += time.perf_counter() - started

    def _cause_of(self, error: BaseException) -> str:
        cause = cause_of(error)
        # torch's archive writer does not pass on what the system told it.
        if "inline_container" in cause and self.folder.path.is_dir():
            free = shutil.disk_usage(self.folder.path).free
            reason = os.strerror(errno.ENOSPC) if free < FULL_BYTES else "the file system did not take all bytes"
            return f"{reason}: {self.folder.path} ({free:,} bytes free)"
        return cause

    def _begin(self, samples_seen: int, failure: BaseException | None) -> Path:
        """Make the folder on rank 0, and see that every rank sees it."""

        def begin() -> Path:
            if failure is not None:
                raise failure
            return self.folder.begin(samples_seen) if self.rank == 0 else self.folder.place(samples_seen)

        part = self._on_every_rank(begin)[0]

        def see() -> None:
            if not part.is_dir():
                what = f"rank {self.rank} does not see it; the run folder must be on a file system all ranks share"
                raise FileNotFoundError(2, what, str(part))

        self._on_every_rank(see)
        return part

    def _describe(self, part: Path) -> dict[str, Any]:
        """Return the manifest's entries; each rank reads back what it wrote itself."""

        def describe() -> dict[str, Any]:
            mine = {path.name: describe_file(path) for path in part.glob(f"__{self.rank}_*")}
            return mine | ({".metadata": describe_file(part / ".metadata")} if self.rank == 0 else {})

        return {name: entry for files in self._on_every_rank(describe) for name, entry in files.items()}

    def _on_every_rank(self, step: Callable[[], T]) -> list[T]:
        """Return what a step came to on each rank, on every rank.

        Raises:
            SaveError: where it failed on a rank, on all of them alike: none waits for one that gave up.
        """
        mine, failure = None, None
        try:
            mine = step()
        except (Exception, CheckpointException) as error:
            failure = self._cause_of(error)  # in words: not every exception can travel
        outcomes: list[Any] = [(mine, failure)]
        if self.group is not None:
            outcomes = [None] * self.world_size
            dist.all_gather_object(outcomes, (mine, failure), group=self.group)
        for rank, (_, problem) in enumerate(outcomes):
            if problem is not None:
                raise SaveError(
                    problem if problem.startswith("rank ") or self.world_size == 1 else f"rank {rank}: {problem}"
                )
        return [value for value, _ in outcomes]

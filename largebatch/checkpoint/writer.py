"""Writing of checkpoints while training continues: the state is copied, a thread writes the copy, and rank 0 commits it."""

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

# A disk counts as full if it has less free space than this while the files of the failed checkpoint are still on it.
FULL_BYTES = 2**20
# Before this version, a stager emptied its own tables after its first use.
STAGES_ONCE = TorchVersion(torch.__version__) < "2.13"
T = TypeVar("T")


class SaveError(RuntimeError):
    """A step of a save failed on at least one rank, and every rank knows of the failure."""


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time. Every rank makes a writer and calls it in the same way.

    Args:
        folder: the folder of the checkpoints, on a file system that all ranks share.
        rank: the rank of this process; rank 0 commits.
        world_size: number of ranks that write.
        asynchronous: whether to copy the state and write it while training continues; False to write before `save` returns.
        keep_last: number of the newest checkpoints to keep.
        keep_every: number of samples; the first checkpoint after each multiple is kept permanently.
        timeout_seconds: time after which a save fails if a rank does not respond.
        sum_over_ranks: returns the elementwise sum of a tensor over the ranks, using the collectives of the training.
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
        # Every rank is a member of the group. The type is Any because the type that torch 2.14 declares allows for other ranks.
        self.group: Any = None
        self.is_broken = True  # whether there is no group, or its ranks may be at different collectives
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
        """Write a checkpoint. Its error, if any, is returned by `failure` now or later.

        Args:
            samples_seen: number of samples, which names the checkpoint.
            tensors: the tensors by name; they may be changed once this returns.
            state: the values for state.json, used on rank 0.
            is_best: whether its validation loss is the lowest so far.
        """
        started = time.perf_counter()
        self.wait()
        self._join()
        if not self.asynchronous:
            self._write(samples_seen, tensors, None, state, is_best)
        else:
            staged, failure = self._stage(tensors)
            # A daemon thread, so that a rank can exit although the other ranks are lost.
            arguments = (samples_seen, staged, failure, state, is_best)
            self.thread = threading.Thread(target=self._write, args=arguments, daemon=True)
            self.thread.start()
        self.stalled_seconds += time.perf_counter() - started

    def _join(self) -> None:
        """Create a process group for the writing threads, so that their collectives do not interfere with the training's.

        A group that lost a message stays broken, so all ranks create a new one once any rank has noticed.
        """
        if self.world_size == 1 or not float(self.sum_over_ranks(torch.tensor(float(self.is_broken)))):
            return
        if self.group is not None:
            dist.destroy_process_group(self.group)
        self.group = dist.new_group(backend="gloo", timeout=self.timeout)
        self.is_broken = False

    def _stage(self, tensors: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], BaseException | None]:
        """Return a copy of the tensors in host memory and None, or an empty mapping and the error."""
        try:
            if self.stager is None or STAGES_ONCE:
                self.stager = DefaultStager(StagingOptions(torch.cuda.is_available(), False, False, False))
            staged: Any = self.stager.stage(dict(tensors))
            return staged, None
        except (Exception, CheckpointException) as error:
            self.stager = None  # it may hold an incomplete copy
            return {}, error

    def wait(self) -> None:
        """Wait until no checkpoint is being written."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def failure(self) -> str | None:
        """Return the error of the last checkpoint, once; None if there is none."""
        error, self.error = self.error, None
        return error

    def close(self) -> None:
        """Wait for the last write, and free the copy."""
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
                # The checkpoint is complete now: it is not lost if `latest` or `best` cannot be written.
                try:
                    self.folder.mark_latest(place)
                    if is_best:
                        self.folder.mark_best(place)
                finally:
                    self.folder.prune(place, self.keep_last, self.keep_every)
        except BaseException as error:  # CheckpointException is not an Exception
            name = self.folder.place(samples_seen).name
            what = f"checkpoint {name} not written" if place is None else f"checkpoint {name} is whole, but"
            self.error = f"{what}: {self._cause_of(error)}"
            self.is_broken = not isinstance(error, SaveError | CheckpointException)  # those were raised on every rank
            if self.rank == 0:
                shutil.rmtree(self.folder.part(samples_seen), ignore_errors=True)
            if isinstance(error, KeyboardInterrupt):
                raise
        self.busy_seconds += time.perf_counter() - started

    def _cause_of(self, error: BaseException) -> str:
        cause = cause_of(error)
        # torch's archive writer does not report the system's error.
        if "inline_container" in cause and self.folder.path.is_dir():
            free = shutil.disk_usage(self.folder.path).free
            reason = os.strerror(errno.ENOSPC) if free < FULL_BYTES else "the file system did not take all bytes"
            return f"{reason}: {self.folder.path} ({free:,} bytes free)"
        return cause

    def _begin(self, samples_seen: int, failure: BaseException | None) -> Path:
        """Make the folder on rank 0, and check that every rank sees it."""

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
        """Return the manifest's entries; each rank reads the files that it wrote."""

        def describe() -> dict[str, Any]:
            mine = {path.name: describe_file(path) for path in part.glob(f"__{self.rank}_*")}
            return mine | ({".metadata": describe_file(part / ".metadata")} if self.rank == 0 else {})

        return {name: entry for files in self._on_every_rank(describe) for name, entry in files.items()}

    def _on_every_rank(self, step: Callable[[], T]) -> list[T]:
        """Return, on every rank, the results of a step on all ranks.

        Raises:
            SaveError: on all ranks, if the step failed on any, so that no rank waits for one that failed.
        """
        mine, failure = None, None
        try:
            mine = step()
        except (Exception, CheckpointException) as error:
            failure = self._cause_of(error)  # as text, because not every exception can be pickled
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

"""Batches from a DataLoader, whose worker processes are monitored, and ended in any case."""

from __future__ import annotations

import atexit
import ctypes
import pickle
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import Queue, active_children
from multiprocessing.connection import wait
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from largebatch.data.parcel import Parcel
from largebatch.data.sampler import SampleKeys
from largebatch.data.source import Batch, Samples, TensorSamples, may_miss, readable
from largebatch.errors import LostWorkerError, UserError
from largebatch.process.limits import OPEN_FILES_ADVICE, is_out_of_files
from largebatch.process.own_code import folder_kept
from largebatch.process.signals import handled_by
from largebatch.section import Depth, Section

MOST_WORKERS = 1024  # per rank; more than any machine can run
# How long to wait for a killed process to end: in a system call on a dead network mount it never ends.
KILLED_SECONDS = 3.0
MEMORY_ADVICE = (
    "if the kernel ended it for want of memory, lower loader.num_workers or loader.prefetch, or give the job more"
)
PR_SET_PDEATHSIG = 1  # option of prctl(2)
# Interval at which to check, while waiting for a batch, whether the workers are alive.
LOOK_SECONDS = 1.0


Check = Callable[[Tensor, np.ndarray, Tensor], None]


class LoaderConfig(Section):
    """Options of the data loader."""

    num_workers: Annotated[int, Field(ge=0, le=MOST_WORKERS)] = 0
    """Number of worker processes per rank; 0 loads in the training process."""
    prefetch: Depth = 2
    """Number of micro-batches that each worker loads in advance."""


@dataclass(frozen=True)
class MicroBatch:
    """The samples of one forward and backward pass on one rank.

    Args:
        inputs: (n, ...) on the device.
        targets: (n, ...) on the device.
        num_samples: number of samples that count; 0 for the placeholder with which an idle rank takes part in the reduction.
        first: position of the first planned sample in the update's batch.
        missing: planned samples that are left out: position among the planned ones -> what could not be read and why, empty if
            the sample has no target to learn.
    """

    inputs: Tensor
    targets: Tensor
    num_samples: int
    first: int = 0
    missing: Mapping[int, str] = field(default_factory=dict)

    @property
    def places(self) -> slice:
        """Positions of the planned samples in the update's batch."""
        return slice(self.first, self.first + self.num_samples + len(self.missing))

    def rows(self, places: Iterable[int]) -> list[int]:
        """Return the rows of some planned samples, given by position among the planned ones, without the missing ones."""
        return [place - sum(gap < place for gap in self.missing) for place in places if place not in self.missing]


class NoWorkersError(UserError):
    """Raised if worker processes cannot be started."""


def _packed(batch: Any) -> Any:
    return batch if get_worker_info() is None else Parcel(batch)


def _bind_to_the_rank(dies_with_it: bool, _: int) -> None:
    """Make a worker ignore signals that ask the run to stop: Slurm, Ctrl-C and a closed terminal signal all
    processes, but the update still needs its data.

    On Linux a worker dies with its rank. Otherwise its copies of the rank's connections would stay open, and the other ranks
    would not see them close. On other systems torch's worker checks every five seconds whether its rank is alive.

    Args:
        dies_with_it: whether to end the worker with the thread that started it; only the main thread lives as long as the rank.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if dies_with_it and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Batches:
    """The batches of a DataLoader, whose workers end when `close` is called.

    `close` is needed after an exception: its traceback keeps the DataLoader's iterator alive, workers ignore signals that ask
    the run to stop, and the interpreter waits for them at exit.

    Args:
        samples: a data set.
        batch_sampler: yields the keys of each batch.
        config: number of workers, and prefetching.
        device: device to which batches are moved.
        dtype: data type of floating-point inputs and targets.
        timeout_seconds: how long to wait for a batch from the workers.
        check: function like `Task.check`.
        known: returns for targets (n, ...) on the CPU which samples have a target, bool (n,); others are left out. None: all.
    """

    def __init__(
        self,
        samples: Samples,
        batch_sampler: Any,
        config: LoaderConfig,
        device: torch.device,
        dtype: torch.dtype,
        timeout_seconds: float,
        check: Check,
        known: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.known, self._may_miss = known, may_miss(samples)
        workers: dict[str, Any] = {}
        if config.num_workers:
            workers = {
                "prefetch_factor": config.prefetch,
                "worker_init_fn": partial(_bind_to_the_rank, threading.current_thread() is threading.main_thread()),
                "timeout": min(LOOK_SECONDS, timeout_seconds),
            }
        self.device, self.dtype, self.timeout_seconds, self._count = device, dtype, timeout_seconds, 0
        loader: DataLoader[Any] = DataLoader(
            _Guarded(samples, check),  # type: ignore[arg-type]  # fetched by __getitems__, with the sampler's keys
            batch_sampler=batch_sampler,
            num_workers=config.num_workers,
            collate_fn=_packed,
            pin_memory=device.type == "cuda",
            **workers,
        )
        before = signal.getsignal(signal.SIGCHLD)
        self.shortage: str | None = None
        try:
            self._batches: Any = _started(loader)
        finally:
            if threading.current_thread() is threading.main_thread():
                # Torch's handler raises when a worker dies, at any point of the rank's code: in a save, within an update.
                signal.signal(signal.SIGCHLD, before)
        self._workers = list(getattr(self._batches, "_workers", ()))
        self._closed, self._hanging = threading.Event(), ""
        self._waits_since: float | None = None
        if self._workers:
            threading.Thread(target=self._watch, daemon=True).start()
        atexit.register(self.close)  # runs before multiprocessing's exit handler, which waits for the workers

    def next(self, planned: int, first: int = 0) -> MicroBatch:
        """Return the next batch on the device.

        Args:
            planned: number of planned samples; 0 for a placeholder, which is ignored.
            first: position of the first planned sample in the update's batch.

        Raises:
            UserError, LostWorkerError: see `read`.
        """
        inputs, targets, missing = readable(self.read())
        if missing and not self._may_miss:
            raise UserError(
                "data: a data set that returns {row: why} of unreadable samples has to have may_miss = True"
            )
        missing = missing if planned else {}
        if self.known is not None and planned > len(missing):
            inputs, targets, missing = _with_targets(inputs, targets, missing, planned, self.known(targets))
        return MicroBatch(self._move(inputs), self._move(targets), planned - len(missing), first, missing)

    def _move(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None, non_blocking=True)

    def read(self) -> Batch:
        """Return the next batch as the data set returned it.

        Raises:
            UserError: if a sample cannot be read.
            LostWorkerError: if a worker has died, or sends no batch in time.
        """
        self._waits_since = time.monotonic()
        try:
            while (batch := self._next()) is None:
                pass
        finally:
            self._waits_since = None
        self._count += 1
        return batch

    def _next(self) -> Batch | None:
        """Return the next batch; None if it has not arrived yet."""
        assert self._waits_since is not None
        try:
            batch = next(self._batches)
            if isinstance(batch, Parcel):
                self.shortage = batch.shortage or self.shortage
                return batch.open()
            return batch
        except UserError as error:
            # The message of a worker's error includes its traceback; the last line is the exception itself.
            line = str(error).strip().splitlines()[-1]
            raise UserError(line.removeprefix(f"{UserError.__module__}.{UserError.__name__}: ")) from error
        except (RuntimeError, OSError, EOFError) as error:
            is_early = "DataLoader timed out" in str(error)
            waited = time.monotonic() - self._waits_since
            if (
                self._workers and not is_early
            ):  # the connection to a dying worker, and its sentinel, close before the process has ended
                gone = wait([worker.sentinel for worker in self._workers], KILLED_SECONDS)
                for worker in self._workers:
                    if worker.sentinel in gone:
                        worker.join(KILLED_SECONDS)
            dead = [f"{w.pid} {_ending(w.exitcode)}" for w in self._workers if w.exitcode is not None]
            if self._hanging or (is_early and not dead and waited >= self.timeout_seconds):
                hanging = self._hanging or self._find_hanging()
                self.close()
                raise LostWorkerError(
                    f"worker process {hanging} of the data loader gave no batch in {self.timeout_seconds:g} s "
                    "(backend.timeout_seconds): it hangs, or the file system that holds the data does"
                ) from error
            if dead:
                self.close()
                raise LostWorkerError(
                    f"worker process {', '.join(dead)} while it loaded data; {MEMORY_ADVICE}"
                ) from error
            if is_early:
                return None
            if self._workers and ("ancdata" in str(error) or isinstance(error, EOFError) or is_out_of_files(error)):
                raise UserError(
                    "loader.num_workers: a batch could not be taken over from its worker process, which needs an open file; "
                    f"{OPEN_FILES_ADVICE}, or lower loader.num_workers or loader.prefetch"
                ) from error
            raise

    def close(self) -> None:
        """End the workers, including those that hang."""
        atexit.unregister(self.close)
        self._closed.set()
        if not self._workers:
            return
        # Torch's handler, which a DataLoader in user code may have set, raises when a worker dies.
        with handled_by(signal.SIGCHLD, signal.SIG_DFL):
            for worker in self._workers:
                worker.kill()
            for worker in self._workers:
                worker.join(KILLED_SECONDS)
            self._batches._shutdown_workers()  # the garbage collector might close its queues before it writes to them
        self._workers = []

    def _watch(self) -> None:
        """Kill the workers if the rank has waited too long: receiving from a stopped worker has no timeout."""
        while not self._closed.wait(1.0):
            since = self._waits_since
            if since is not None and time.monotonic() - since > self.timeout_seconds + 1.0:
                self._hanging = self._find_hanging()
                for worker in self._workers:
                    worker.kill()
                return

    def _find_hanging(self) -> str:
        """Return the ids of the workers that are stopped or wait for a disk; otherwise of the one that owes the next batch."""
        found = [str(worker.pid) for worker in self._workers if _state(worker.pid) in ("T", "t", "D")]
        return ", ".join(found) or str(self._workers[self._count % len(self._workers)].pid)


def _started(loader: DataLoader[Any]) -> Iterator[Any]:
    """Create a loader's iterator, which starts its workers.

    Raises:
        NoWorkersError: if they cannot be started; those already started are ended.
        LostWorkerError: if one dies meanwhile; the others are ended.
    """
    others = active_children()
    try:
        if loader.num_workers:
            Queue()  # fail here: an iterator that cannot create a queue raises a second time when it is deleted
        return iter(loader)
    except (OSError, RuntimeError) as error:
        dead = re.match(r"DataLoader worker \(pid (\d+)\) (.+?)[. ]*$", str(error))
        if isinstance(error, RuntimeError) and dead is None and "start new thread" not in str(error):
            raise
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if isinstance(half_made := frame.f_locals.get("self"), _MultiProcessingDataLoaderIter):
                half_made._shutdown = True  # otherwise its deletion raises, because it has nothing to shut down
        left = set(active_children()).difference(others)
        with handled_by(signal.SIGCHLD, signal.SIG_DFL):  # torch's handler would raise here instead of the error below
            for worker in left:
                worker.kill()  # workers ignore SIGTERM
            for worker in left:
                worker.join(KILLED_SECONDS)
        if dead is not None:
            raise LostWorkerError(
                f"worker process {dead[1]} {dead[2]} while it was started; {MEMORY_ADVICE}"
            ) from error
        raise NoWorkersError(
            f"loader.num_workers: worker processes could not be started ({error}); they need a /dev/shm "
            "that can be written to (docker run --shm-size) and leave to start processes (ulimit -u); 0 loads without any"
        ) from error


def _ending(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _with_targets(
    inputs: Tensor, targets: Tensor, missing: dict[int, str], planned: int, known: Tensor
) -> tuple[Tensor, Tensor, dict[int, str]]:
    """Leave out the samples without a target; if no sample is left, keep the first one as a placeholder."""
    if bool(known.all()):
        return inputs, targets, missing
    places = [place for place in range(planned) if place not in missing]
    ignored = {place: "" for place, is_known in zip(places, known.tolist(), strict=True) if not is_known}
    rows = torch.nonzero(known).flatten() if bool(known.any()) else torch.tensor([0])
    return inputs.index_select(0, rows), targets.index_select(0, rows), {**missing, **ignored}


@dataclass(frozen=True)
class _Guarded:
    """Samples whose code cannot exit the process, raise an exception that cannot be pickled, or return invalid batches.

    An exit would look like the end of the run. In a worker, an exit or an exception that cannot be pickled would look like a
    hang.

    Args:
        samples: the data set.
        check: function like `Task.check`.
    """

    samples: Samples
    check: Check

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, keys: SampleKeys) -> Batch:
        batch = self._read(keys)
        for what, part in zip(("inputs", "targets"), batch, strict=False):
            if not isinstance(part, Tensor) or len(part) != len(keys):
                came = f"a tensor of {len(part)}" if isinstance(part, Tensor) else f"a {type(part).__name__}"
                raise UserError(
                    f"data: the {what} of {len(keys)} samples should be a tensor ({len(keys)}, ...), they are {came}"
                )
        missing = batch[2] if len(batch) == 3 and isinstance(batch[2], Mapping) else {}
        rows: Any = [row for row in range(len(keys)) if row not in missing] if missing else slice(None)
        self.check(batch[1][rows], keys.indices[rows], batch[0][rows])
        return batch

    def _read(self, keys: SampleKeys) -> Batch:
        try:
            with (
                nullcontext() if isinstance(self.samples, TensorSamples) else folder_kept()
            ):  # tensors run no user code
                return self.samples.__getitems__(keys)
        except SystemExit as error:
            raise UserError(f"data: the data set's own code called sys.exit({error.code!r}) for a sample") from error
        except Exception as error:
            try:
                pickle.dumps(type(error))
            except Exception:
                raise RuntimeError(f"{type(error).__name__}: {error}") from error
            raise
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and get_worker_info() is None:
                raise  # Ctrl-C in the rank itself
            raise RuntimeError(f"the data set's own code raised {type(error).__name__}: {error}") from error


def _state(process_id: int) -> str:
    """Return Linux's one-letter code of a process's state; an empty string elsewhere."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""

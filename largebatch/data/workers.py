"""Batches from the worker processes of a stock DataLoader: fetched, watched, and ended whatever happens."""

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

MOST_WORKERS = 1024  # of a rank: beyond what a machine has
# How long a process that was killed may take to go: in a system call on a dead network mount, for ever.
KILLED_SECONDS = 3.0
MEMORY_ADVICE = (
    "if the kernel ended it for want of memory, lower loader.num_workers or loader.prefetch, or give the job more"
)
PR_SET_PDEATHSIG = 1  # of prctl(2)
# How often it is looked whether a worker that is waited for still lives.
LOOK_SECONDS = 1.0


Check = Callable[[Tensor, np.ndarray, Tensor], None]


class LoaderConfig(Section):
    """The data loader."""

    num_workers: Annotated[int, Field(ge=0, le=MOST_WORKERS)] = 0
    """Worker processes per rank; 0 loads in the training process."""
    prefetch: Depth = 2
    """Micro-batches each worker holds ready."""


@dataclass(frozen=True)
class MicroBatch:
    """The samples of one forward and backward pass on one rank.

    Args:
        inputs: (n, ...) on the device.
        targets: (n, ...) on the device.
        num_samples: samples that count; 0 where an idle rank holds a stand-in so that it can take part in the reduction.
        first: place of the first of them in the update's batch.
        missing: samples that are not among them: place among the planned ones -> what could not be read and why, empty where
            the sample has no target to learn.
    """

    inputs: Tensor
    targets: Tensor
    num_samples: int
    first: int = 0
    missing: Mapping[int, str] = field(default_factory=dict)

    @property
    def places(self) -> slice:
        """Places in the update's batch of the samples that were planned."""
        return slice(self.first, self.first + self.num_samples + len(self.missing))

    def rows(self, places: Iterable[int]) -> list[int]:
        """Return the rows of some of the planned samples, named by place among them; none for those that are missing."""
        return [place - sum(gap < place for gap in self.missing) for place in places if place not in self.missing]


class NoWorkersError(UserError):
    """Worker processes cannot be started here."""


def _packed(batch: Any) -> Any:
    return batch if get_worker_info() is None else Parcel(batch)


def _bind_to_the_rank(dies_with_it: bool, _: int) -> None:
    """Ignore, in a worker, what asks the run to stop: Slurm, Ctrl-C and a terminal that closes reach all
    processes, and the update needs its data.

    On Linux a worker dies with its rank: it holds copies of the rank's connections, which the other ranks see closed when it
    is gone. Elsewhere it looks for its rank every five seconds.

    Args:
        dies_with_it: whether it may, as the kernel ends it with the thread that has started it.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if dies_with_it and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Batches:
    """The batches of a stock DataLoader, whose workers end when it is closed.

    Closing matters after an error: its traceback keeps the DataLoader's iterator alive, workers ignore what asks the run
    to stop, and the interpreter waits for them at its exit.

    Args:
        samples: a data set.
        batch_sampler: the keys of every batch.
        config: workers and prefetch.
        device: where batches go.
        dtype: of floating-point inputs and targets.
        timeout_seconds: how long to wait for a batch of the workers.
        check: as `Task.check`.
        known: tells from targets (n, ...) on the CPU which samples have any, bool (n,); the others are left out. None: all do.
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
            _Guarded(samples, check),  # type: ignore[arg-type]  # a Samples is fetched by __getitems__, with the keys of its batch sampler
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
                # Torch's own handler raises when a worker dies, wherever the rank is: in a save, in the middle of an update.
                signal.signal(signal.SIGCHLD, before)
        self._workers = list(getattr(self._batches, "_workers", ()))
        self._closed, self._hanging = threading.Event(), ""
        self._waits_since: float | None = None
        if self._workers:
            threading.Thread(target=self._watch, daemon=True).start()
        atexit.register(self.close)  # before multiprocessing's own exit handler, which waits for them

    def next(self, planned: int, first: int = 0) -> MicroBatch:
        """Return the next batch on the device.

        Args:
            planned: its samples; 0 for a stand-in, which counts for nothing.
            first: place of the first of them in the update's batch.

        Raises:
            UserError, LostWorkerError: as `read`.
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
        """Return the next batch as it was read.

        Raises:
            UserError: for a sample that cannot be read.
            LostWorkerError: if a worker is gone, or gives no batch in time.
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
        """Return the next batch, None where there is none yet."""
        assert self._waits_since is not None
        try:
            batch = next(self._batches)
            if isinstance(batch, Parcel):
                self.shortage = batch.shortage or self.shortage
                return batch.open()
            return batch
        except UserError as error:
            # A worker's error arrives with its traceback in the message; the last line is what was raised.
            line = str(error).strip().splitlines()[-1]
            raise UserError(line.removeprefix(f"{UserError.__module__}.{UserError.__name__}: ")) from error
        except (RuntimeError, OSError, EOFError) as error:
            is_early = "DataLoader timed out" in str(error)
            waited = time.monotonic() - self._waits_since
            if (
                self._workers and not is_early
            ):  # the connection to one that dies goes before it does, and so does its sentinel
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
        """End the workers, those that hang too."""
        atexit.unregister(self.close)
        self._closed.set()
        if not self._workers:
            return
        # Torch's handler, where a loader of the user's own has set it, raises when a worker dies.
        with handled_by(signal.SIGCHLD, signal.SIG_DFL):
            for worker in self._workers:
                worker.kill()
            for worker in self._workers:
                worker.join(KILLED_SECONDS)
            self._batches._shutdown_workers()  # the garbage collector would close its queues before it writes to them
        self._workers = []

    def _watch(self) -> None:
        """Kill the workers when the rank has waited too long: it may be receiving from one that is stopped, without a limit."""
        while not self._closed.wait(1.0):
            since = self._waits_since
            if since is not None and time.monotonic() - since > self.timeout_seconds + 1.0:
                self._hanging = self._find_hanging()
                for worker in self._workers:
                    worker.kill()
                return

    def _find_hanging(self) -> str:
        """Return the ids of the workers that are stopped or wait for a disk, or of the one whose turn it is."""
        found = [str(worker.pid) for worker in self._workers if _state(worker.pid) in ("T", "t", "D")]
        return ", ".join(found) or str(self._workers[self._count % len(self._workers)].pid)


def _started(loader: DataLoader[Any]) -> Iterator[Any]:
    """Return a loader's iterator, which starts its workers.

    Raises:
        NoWorkersError: if they cannot be started; none of them is left.
        LostWorkerError: if one dies meanwhile; likewise.
    """
    others = active_children()
    try:
        if loader.num_workers:
            Queue()  # an iterator that gets none complains a second time when it is thrown away
        return iter(loader)
    except (OSError, RuntimeError) as error:
        dead = re.match(r"DataLoader worker \(pid (\d+)\) (.+?)[. ]*$", str(error))
        if isinstance(error, RuntimeError) and dead is None and "start new thread" not in str(error):
            raise
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if isinstance(half_made := frame.f_locals.get("self"), _MultiProcessingDataLoaderIter):
                half_made._shutdown = (
                    True  # or it complains when it is thrown away, as it lacks what it would shut down
                )
        left = set(active_children()).difference(others)
        with handled_by(signal.SIGCHLD, signal.SIG_DFL):  # torch's would raise here, in place of what is told below
            for worker in left:
                worker.kill()  # they ignore what asks them to end
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
    """Leave out the samples that are not known; one stands in where there would be none."""
    if bool(known.all()):
        return inputs, targets, missing
    places = [place for place in range(planned) if place not in missing]
    ignored = {place: "" for place, is_known in zip(places, known.tolist(), strict=True) if not is_known}
    rows = torch.nonzero(known).flatten() if bool(known.any()) else torch.tensor([0])
    return inputs.index_select(0, rows), targets.index_select(0, rows), {**missing, **ignored}


@dataclass(frozen=True)
class _Guarded:
    """Samples whose code cannot end the process, nor raise what could not leave it, nor return what no model takes.

    An exit would pass for the end of the run, and in a worker, like an exception that cannot be pickled, for a hang.

    Args:
        samples: the data set.
        check: as `Task.check`.
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
            ):  # nobody's code runs in tensors
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
                raise  # Ctrl-C in the rank's own process
            raise RuntimeError(f"the data set's own code raised {type(error).__name__}: {error}") from error


def _state(process_id: int) -> str:
    """Return the letter in which Linux says what a process does; empty elsewhere."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""

"""A pool of gloo ranks that are handed functions. A fresh spawn per test would cost seconds each."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

START_SECONDS, TIMEOUT_SECONDS = 240, 120


def _serve(rank: int, pipe: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    pipe.send((True, "ready"))
    while (task := pipe.recv()) is not None:
        function, arguments, world_size, store = task
        try:
            dist.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
            )
            try:
                result = function(rank, world_size, *arguments)
            finally:
                dist.destroy_process_group()
            pipe.send((True, result))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


class RankPool:
    """``pool(world_size, function, *arguments)`` calls function(rank, world_size, *arguments) on each rank.

    Functions must stand at the top of a test module. A rank that raises or hangs ends the pool's processes, as its peers
    would wait for it; the next call starts new ones.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.workers: list[tuple[Any, Any]] = []
        self.folder = tempfile.TemporaryDirectory()
        self.calls = 0

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        for rank in range(self.most):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self.workers.append((process, ours))
        for process, pipe in self.workers:  # the imports take their time on a busy machine
            if not pipe.poll(START_SECONDS) or not process.is_alive():
                raise AssertionError("a rank of the pool did not start")
            pipe.recv()

    def __call__(self, world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        if not self.workers:
            self._start()
        self.calls += 1
        store = Path(self.folder.name) / f"store-{self.calls}"
        for _, pipe in self.workers[:world_size]:
            pipe.send((function, arguments, world_size, store))
        answers: list[tuple[bool, Any]] = []
        for rank, (_, pipe) in enumerate(self.workers[:world_size]):
            failed = any(not good for good, _ in answers)
            if pipe.poll(2 if failed else TIMEOUT_SECONDS):
                answers.append(pipe.recv())
            else:
                answers.append((False, f"rank {rank} did not answer"))
        problems = [f"rank {rank}: {text}" for rank, (good, text) in enumerate(answers) if not good]
        if problems:
            self.close()
            raise AssertionError("\n".join(problems))
        return [result for _, result in answers]

    def close(self) -> None:
        for process, pipe in self.workers:
            process.kill()
            process.join()
            pipe.close()
        self.workers = []

"""A save that fails on one rank: the same line on every rank, no rank waits for another, and the next save succeeds."""

import threading

import pytest
import torch.distributed.checkpoint as dcp
from runs import digits
from torch.distributed.checkpoint.api import CheckpointException
from zero import _fresh_counters, needs_deepspeed

from largebatch.checkpoint import writer as saving
from largebatch.checkpoint.folder import CheckpointFolder, find_problems
from largebatch.distributed import Ranks
from largebatch.training.run import train

OFTEN = {"checkpoint.every_minutes": None, "checkpoint.every_epochs": 0.25, "checkpoint.keep_last": 100,
         "schedule.epochs": 0.75, "warmup.name": "none", "warmup.epochs": 0.0, "precision": "fp32"}  # fmt: skip
ENGINES = {
    "ddp": {},
    "fsdp": {"backend.name": "fsdp"},
    "zero 2": {"backend.name": "deepspeed", "backend.zero_stage": 2},
    "zero 3": {"backend.name": "deepspeed", "backend.zero_stage": 3},
}


class Untold(Exception):
    """Does not travel: it holds what cannot be pickled."""

    def __init__(self, what):
        super().__init__(what)
        self.lock = threading.Lock()


def _raise(kind):
    if kind == "checkpoint exception":  # derived from BaseException
        raise CheckpointException("write", {})
    raise {"disk": OSError(28, "No space left on device"), "memory": MemoryError(), "untold": Untold("lost")}[kind]


# Where a save can fail on one rank alone.
STEPS = {
    "copy": (saving.DefaultStager, "stage"),
    "folder": (CheckpointFolder, "begin"),
    "plan": (dcp.FileSystemWriter, "prepare_local_plan"),
    "tensors": (dcp.filesystem._FileSystemWriter, "write_data"),
    "between": (saving, "write_tensors"),  # the other ranks are at a collective of torch's by then
    "checksum": (saving, "describe_file"),
    "commit": (CheckpointFolder, "commit"),
}


def train_failing(rank, world_size, folder, step, kind, victim, number, flags):
    """Train with the save of this number failing in a step on one rank; return how it ended, and what rank 0 told."""
    from largebatch.training.log import RunLog

    told, calls = [], []
    owner, name = STEPS[step]
    function = getattr(owner, name)

    def call(*arguments, **options):
        calls.append(1)
        # Rank 0 takes the checksum of the index besides.
        if rank == victim and (len(calls) + (step == "checksum" and rank == 0)) == number:
            _raise(kind)
        return function(*arguments, **options)

    _fresh_counters_where_there_are()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("largebatch.reporting.plots.plot_run", lambda *_: None)
        patch.setattr(owner, name, call)
        tell = RunLog.event
        patch.setattr(RunLog, "event", lambda self, _, text, *rest: (told.append(text), tell(self, _, text, *rest)))
        summary = train(digits(**OFTEN | flags), folder, ranks=Ranks(rank, rank, world_size)).summary
    return summary.status, summary.message, told


def _fresh_counters_where_there_are():
    import sys

    if "deepspeed" in sys.modules:
        _fresh_counters()


def check(results, folder, cause):
    """One save was lost, and its line is the same on every rank."""
    lines = {line.removesuffix("; training goes on") for _, _, told in results for line in told}
    assert [status for status, *_ in results] == ["finished"] * len(results)
    # The others learn of it, too, but have nobody to tell, and may end before they would.
    assert len(results[0][2]) == 1 and len(lines) == 1
    (line,) = lines
    assert line.startswith("checkpoint samples-") and "not written: " in line
    assert cause in line and "\n" not in line
    paths = CheckpointFolder(folder / "checkpoints").saved()
    assert len(paths) == 2 and all(not find_problems(path) for path in paths)
    assert list((folder / "checkpoints").glob("*.part")) == []


CASES = [(step, kind, victim) for step in STEPS for kind in ("checkpoint exception", "disk", "untold") for victim in (0, 1)
         if (step not in ("folder", "commit") or victim == 0) and step != "between" and (step, kind) != ("plan", "untold")]  # fmt: skip


@pytest.mark.parametrize("asynchronous", [False, True], ids=["in between", "beside"])
@pytest.mark.parametrize(("step", "kind", "victim"), CASES)
def test_a_save_that_fails_on_a_rank_is_lost_alone(step, kind, victim, asynchronous, rank_pool, tmp_path):
    if step == "copy" and not asynchronous:
        pytest.skip("there is no copy")
    flags = {"checkpoint.asynchronous": asynchronous}
    results = rank_pool(2, train_failing, tmp_path / "run", step, kind, victim, 2, flags)
    # What comes after the last collective of a save is rank 0's alone.
    told_by = results[:1] if step == "commit" else results
    cause = {"checkpoint exception": "CheckpointException", "disk": "No space left", "untold": "lost"}[kind]
    check(told_by, tmp_path / "run", cause)
    if step != "commit":
        assert f"rank {victim}: " in results[0][2][0]


@pytest.mark.parametrize(
    "engine", [e if e == "fsdp" else pytest.param(e, marks=needs_deepspeed) for e in list(ENGINES)[1:]]
)
@pytest.mark.parametrize("asynchronous", [False, True], ids=["in between", "beside"])
def test_every_engine_goes_on_after_a_save_that_failed(engine, asynchronous, rank_pool, tmp_path):
    flags = ENGINES[engine] | {"checkpoint.asynchronous": asynchronous}
    results = rank_pool(2, train_failing, tmp_path / "run", "tensors", "checkpoint exception", 1, 2, flags)
    check(results, tmp_path / "run", "rank 1: CheckpointException")


@pytest.mark.parametrize("asynchronous", [False, True], ids=["in between", "beside"])
def test_ranks_that_have_lost_each_other_in_a_save_find_each_other_again(asynchronous, rank_pool, tmp_path):
    """The one that failed says why, the other that it waited in vain; the next save has a group of its own."""
    flags = {"checkpoint.asynchronous": asynchronous, "backend.timeout_seconds": 1.0}
    results = rank_pool(2, train_failing, tmp_path / "run", "between", "memory", 1, 2, flags)
    assert [status for status, *_ in results] == ["finished"] * 2
    assert "Timed out waiting 1000ms" in results[0][2][0] and "not written: MemoryError" in results[1][2][0]
    paths = CheckpointFolder(tmp_path / "run" / "checkpoints").saved()
    assert len(paths) == 2 and all(not find_problems(path) for path in paths)


@pytest.mark.parametrize("victim", [0, 1])
def test_the_last_save_failing_on_a_rank_is_told_by_all(victim, rank_pool, tmp_path):
    results = rank_pool(2, train_failing, tmp_path / "run", "tensors", "checkpoint exception", victim, 3, {})
    assert all(status == "unsaved" for status, *_ in results) and results[0][1] == results[1][1]
    assert f"the last state is lost: checkpoint samples-000000001078 not written: rank {victim}: " in results[0][1]

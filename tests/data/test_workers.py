"""Runs whose samples are loaded by processes of their own: every way out of a run ends them too, at once."""

import errno
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from jobs import (
    Job,
    checkpoints,
    free_port,
    no_job_left,  # noqa: F401
    rows,
    wait_until,
    write_config,
)

from largebatch.checkpoint.folder import find_problems
from largebatch.data.parcel import Parcel
from largebatch.data.sampler import SampleKeys
from largebatch.data.source import TensorSamples
from largebatch.data.workers import Batches, LoaderConfig
from largebatch.errors import LostWorkerError, UserError

SECONDS = 10.0  # in which a run ends, whatever ended it
LOST, LOST_WORKER = 5, 6  # exit codes
TIMEOUT = 4.0  # backend.timeout_seconds where a worker hangs


def write_photos(folder: Path, broken: str | None = None, half: str = "train") -> Path:
    """Write two classes of 24 photographs of random pixels, one of them broken in a way; return the folder."""
    numpy, image = pytest.importorskip("numpy"), pytest.importorskip("PIL.Image")
    draw = numpy.random.default_rng(0)
    for place in ("train", "val"):
        for label in ("cat", "dog"):
            (folder / place / label).mkdir(parents=True)
            for number in range(24):
                pixels = draw.integers(0, 256, (12, 12, 3), dtype=numpy.uint8)
                image.fromarray(pixels).save(folder / place / label / f"{number:02}.png")
    victim = folder / half / "dog" / "11.png"
    if broken == "truncated":
        victim.write_bytes(victim.read_bytes()[:200])
    elif broken == "empty":
        victim.write_bytes(b"")
    elif broken == "text":
        victim.write_text("no photograph")
    elif broken == "dangling":
        victim.unlink()
        victim.symlink_to("/nowhere/to/be/found.png")
    return folder


def start(
    folder,
    num_workers,
    world_size=1,
    epochs=4000,
    every=1000,
    prefetch=2,
    flags=(),
    broken=None,
    half="train",
    **variables,
):
    """Start a run on photographs; return its ranks."""
    photos = write_photos(folder / "photos", broken, half)
    config = write_config(
        folder,
        data={"path": str(photos), "name": "image_folder", "image_size": 8},
        model={"name": "test_workers:small_model"},
        batch={"reference_size": 8, "size": 16},
        optimizer={"second_moment": "micro_batch"},
        schedule={"epochs": epochs},
        evaluate={"every_epochs": every},  # with workers of its own
        loader={"num_workers": num_workers, "prefetch": prefetch},
    )
    words = [sys.executable, "-m", "largebatch", "train", config, "--out", folder / "run", *flags]
    variables = {"LARGEBATCH_TEST_SECONDS": 0.02, **variables}
    if world_size == 1:
        return [Job(words, folder / "rank0.log", **variables)]
    place = {"WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [
        Job(words, folder / f"rank{rank}.log", **(place | {"RANK": rank, "LOCAL_RANK": rank} | variables))
        for rank in range(world_size)
    ]


def small_model(task):
    from jobs import SlowMLP
    from torch import nn

    model = SlowMLP(task.num_outputs)
    model.layers[1] = nn.Linear(3 * 8 * 8, 32)
    return model


def workers_of(job):
    """Return the process ids of the processes that a rank has started."""
    return [pid for pid in job.family() if pid != job.process.pid and parent_of(pid) == job.process.pid]


def parent_of(pid):
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def said_by(job):
    """Return the last line in which a rank says why it ends."""
    lines = [line for line in job.printed().splitlines() if line.startswith("largebatch: ")]
    return lines[-1] if lines else ""


def end(jobs, since=None):
    """Return the exit codes, and after how many seconds the last rank was gone; see that no process is left.

    Args:
        jobs: the ranks.
        since: when what ends them happened; None for when the first one says so.
    """
    if since is None:
        wait_until(lambda: any(said_by(job) or job.process.poll() is not None for job in jobs), 90, "an end")
        since = time.monotonic()
    codes = [job.wait(60) for job in jobs]
    took = time.monotonic() - since
    # A rank that was killed ends nothing; its workers look for it every five seconds.
    wait_until(lambda: not any(job.family() for job in jobs), SECONDS, "no process left")
    return codes, took


def after_a_checkpoint(folder, act):
    """Do something to a run that has saved a state, and return when."""
    wait_until(lambda: checkpoints(folder / "run"), 90, "a checkpoint")
    act()
    return time.monotonic()


def test_a_broken_photograph_ends_the_run_and_its_workers(tmp_path):
    jobs = start(tmp_path, 2, broken="truncated")
    codes, took = end(jobs)
    assert codes == [2] and took < SECONDS
    assert "dog/11.png" in said_by(jobs[0]) and "Traceback" not in jobs[0].printed()


def test_a_killed_worker_is_one_line_and_exit_code_6(tmp_path):
    jobs = start(tmp_path, 2)
    wait_until(lambda: rows(tmp_path / "run"), 90, "a row")
    victim = workers_of(jobs[0])[-1]
    os.kill(victim, signal.SIGKILL)
    codes, took = end(jobs, time.monotonic())
    assert codes == [LOST_WORKER] and took < SECONDS
    said = said_by(jobs[0])
    assert f"worker process {victim} was killed by SIGKILL" in said and "loader.num_workers" in said
    assert "Traceback" not in jobs[0].printed()


# Each: options of the run; what is done to it, None for nothing; the exit code of the rank concerned and of the other;
# what a rank says.
WAYS_OUT = {
    **{
        f"{kind} photograph": ({"broken": kind}, None, (2, 2), "dog/11.png")
        for kind in ("truncated", "empty", "text", "dangling")
    },
    "broken validation photograph": ({"broken": "truncated", "half": "val", "every": 1}, None, (2, 2), "dog/11.png"),
    "worker killed": (
        {}, lambda jobs: os.kill(workers_of(jobs[-1])[0], signal.SIGKILL), (LOST_WORKER, LOST), "was killed by SIGKILL"
    ),
    "worker hangs": (
        {"flags": ("--backend.timeout_seconds", f"{TIMEOUT}")},
        lambda jobs: os.kill(workers_of(jobs[-1])[0], signal.SIGSTOP), (LOST_WORKER, LOST), "gave no batch in 4 s",
    ),
    "terminated": ({}, lambda jobs: [job.send(signal.SIGTERM) for job in jobs], (75, 75), "stopped by a signal"),
    "Ctrl-C": ({}, lambda jobs: [job.send(signal.SIGINT) for job in jobs], (130, 130), "interrupted after update"),
    "killed": ({}, lambda jobs: jobs[-1].send(signal.SIGKILL), (-9, LOST), ""),
    "time limit": ({"flags": ("--checkpoint.time_limit_minutes", "0.02")}, None, (75, 75), "time limit reached"),
    "diverged": (
        {"flags": ("--precision", "fp16", "--optimizer.lr", "1e9", "--optimizer.weight_decay", "0")},
        None, (3, 3), "diverged",
    ),
    "raised": ({"LARGEBATCH_TEST_RAISES": "{last}:40"}, None, (1, LOST), ""),
    "finished": ({"epochs": 2}, None, (0, 0), ""),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("num_workers", [0, 1, 4])
@pytest.mark.parametrize("way", WAYS_OUT)
def test_every_way_out_ends_the_workers(tmp_path, way, num_workers, world_size):
    if way.startswith("worker") and num_workers == 0:
        pytest.skip("there is no worker")
    options, act, (own, other), words = WAYS_OUT[way]
    options = dict(options)
    if "LARGEBATCH_TEST_RAISES" in options:
        options["LARGEBATCH_TEST_RAISES"] = f"{world_size - 1}:40" if world_size > 1 else "0:40"
    jobs = start(tmp_path, num_workers, world_size, **options)
    since = None if act is None else after_a_checkpoint(tmp_path, lambda: act(jobs))
    codes, took = end(jobs, since)
    print(f"{way}, {num_workers} workers, {world_size} ranks: {codes} after {took:.1f} s: {[said_by(j) for j in jobs]}")
    assert sorted(codes) == sorted([own, other][:world_size])
    assert took < SECONDS + (TIMEOUT if way == "worker hangs" else 0.0)
    assert any(words in said_by(job) for job in jobs)
    assert way == "raised" or all("Traceback" not in job.printed() for job in jobs)
    assert all("Exception ignored" not in job.printed() for job in jobs)
    for name in checkpoints(tmp_path / "run"):
        assert find_problems(tmp_path / "run" / "checkpoints" / name) == []


SMALL = """
mount -t tmpfs -o size=$0 tmpfs /dev/shm
exec "$@"
"""


def start_with_little_memory(folder, size, *flags):
    """Start a run of two workers that find so much in /dev/shm; return it."""
    if subprocess.run(["unshare", "-m", "sh", "-c", SMALL, size, "true"], capture_output=True).returncode:
        pytest.skip("this user may not mount a /dev/shm of its own")
    schedule = {"epochs": 1}
    config = write_config(
        folder, schedule=schedule, loader={"num_workers": 2, "prefetch": 16}, evaluate={"every_epochs": 0.5}
    )
    words = [sys.executable, "-m", "largebatch", "train", config, "--out", folder / "run", *flags]
    return Job(["unshare", "-m", "sh", "-c", SMALL, size, *words], folder / "printed")


def test_a_small_dev_shm_costs_time_alone(tmp_path):
    """As Docker's 64 MB are to photographs: what finds no room there is sent as bytes, and the curve is the same."""
    (tmp_path / "large").mkdir()
    small, large = start_with_little_memory(tmp_path, "200k"), start_with_little_memory(tmp_path / "large", "64m")
    assert [small.wait(150), large.wait(150)] == [0, 0], small.printed()
    (event,) = [row["event"] for row in rows(tmp_path / "run") if "event" in row]
    assert event.startswith("no shared memory for workers' batches (unable to allocate shared memory(shm) for file <")
    assert "No space left on device" in event and "docker run --shm-size" in event
    assert [row for row in rows(tmp_path / "run") if "event" not in row] == rows(tmp_path / "large" / "run")


def test_a_dev_shm_without_room_for_a_worker_is_one_line(tmp_path):
    job = start_with_little_memory(tmp_path, "8k")
    assert job.wait(150) == 2
    expected = "largebatch: error: loader.num_workers: worker processes could not be started ([Errno 28] No space left on device)"
    assert said_by(job).startswith(expected)
    assert "Traceback" not in job.printed() and "ignored" not in job.printed() and not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("what", ["process", "thread"])
def test_workers_that_cannot_be_started_leave_none(what, monkeypatch):
    """The second of three, or the thread that feeds the first, meets a limit: one line, and those that are there are ended."""
    fork, calls = os.fork, []

    def limited():
        calls.append(1)
        if len(calls) == 2:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return fork()

    before = set(multiprocessing.active_children())

    def no_thread(*_):
        raise RuntimeError("can't start new thread")

    if what == "process":
        monkeypatch.setattr(os, "fork", limited)
    else:
        monkeypatch.setattr("torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_put_index", no_thread)
    with pytest.raises(UserError, match=r"worker processes could not be started .*ulimit -u"):
        Batches(range(16), [], LoaderConfig(num_workers=3), torch.device("cpu"), torch.float32, 5.0, lambda *_: None)
    gc.collect()
    wait_until(lambda: before.issuperset(multiprocessing.active_children()), 10, "no worker")


def test_a_worker_that_dies_while_the_others_are_started_is_a_lost_one(monkeypatch):
    victims = []

    def kill(iterator):
        victims.append(iterator._workers[0].pid)
        os.kill(victims[0], signal.SIGKILL)
        time.sleep(20)  # torch's handler of SIGCHLD raises here

    before, handler = multiprocessing.active_children(), signal.getsignal(signal.SIGCHLD)
    monkeypatch.setattr("torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_put_index", kill)
    # Torch sets its handler for the first loader of a process alone, and another test may have had that one.
    monkeypatch.setattr("torch.utils.data._utils.signal_handling._SIGCHLD_handler_set", False)
    with pytest.raises(
        LostWorkerError, match=r"^worker process \d+ is killed by signal: Killed while it was started; if the"
    ):
        Batches(range(16), [], LoaderConfig(num_workers=2), torch.device("cpu"), torch.float32, 5.0, lambda *_: None)
    wait_until(lambda: multiprocessing.active_children() == before, 10, "no worker")
    assert signal.getsignal(signal.SIGCHLD) == handler and len(victims) == 1


@pytest.mark.parametrize(
    "error",
    [EOFError(), OSError(errno.EMFILE, "Too many open files"), RuntimeError("received 0 items of ancdata")],
    ids=["closed", "limit", "received"],
)
def test_a_batch_that_finds_no_free_file_is_one_line(error, monkeypatch):
    def no_file(_):
        raise error

    keys = SampleKeys(torch.zeros(2).long().numpy(), torch.arange(2).numpy())
    samples = TensorSamples(torch.zeros(4, 1), torch.zeros(4).long())
    batches = Batches(
        samples, [keys], LoaderConfig(num_workers=1), torch.device("cpu"), torch.float32, 30.0, lambda *_: None
    )
    monkeypatch.setattr(Parcel, "open", no_file)
    monkeypatch.setattr("largebatch.data.workers.KILLED_SECONDS", 0.1)
    with pytest.raises(UserError, match=r"taken over from its worker process, .*; raise .* \(ulimit -n\), or lower"):
        batches.next(2)
    batches.close()


def test_a_parcel_keeps_what_cannot_be_shared(monkeypatch):
    batch = (torch.arange(6, dtype=torch.bfloat16).view(2, 3), torch.tensor([0, 1]), {1: "why"})
    shared = Parcel(batch)

    def fail(*_):
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    with monkeypatch.context() as patch:
        patch.setattr(ForkingPickler, "dumps", fail)
        kept, pinned = Parcel(batch), Parcel(batch).pin_memory()
    assert shared.shortage is None and "No usable temporary directory" in kept.shortage
    for parcel in (shared, kept, pinned):
        inputs, targets, missing = parcel.open()
        assert torch.equal(inputs, batch[0]) and torch.equal(targets, batch[1]) and missing == {1: "why"}


def test_a_loader_that_was_never_asked_is_thrown_away_in_silence(capfd):
    """As of a run that is resumed when it is finished: its queues have never been written to."""
    for _ in range(3):
        batches = Batches(
            range(16), [], LoaderConfig(num_workers=2), torch.device("cpu"), torch.float32, 5.0, lambda *_: None
        )
        batches.close()
        batches.itself = batches
        del batches
        gc.collect()
        time.sleep(0.2)
    assert capfd.readouterr().err == ""


class Wandering:
    """Samples that are read from another folder."""

    def __len__(self):
        return 4

    def __getitems__(self, keys):
        os.chdir("/")
        return torch.zeros(len(keys), 2), torch.zeros(len(keys))


def test_samples_that_go_elsewhere_take_nobody_along(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys = SampleKeys(torch.zeros(2).long().numpy(), torch.arange(2).numpy())
    batches = Batches(Wandering(), [keys], LoaderConfig(), torch.device("cpu"), torch.float32, 5.0, lambda *_: None)
    assert batches.next(2).num_samples == 2
    batches.close()
    assert Path.cwd() == tmp_path

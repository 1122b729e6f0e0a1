"""Runs whose samples are loaded by processes of their own: every way out of a run ends them too, at once."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from jobs import (
    Job,
    checkpoints,
    free_port,
    no_job_left,  # noqa: F401
    rows,
    wait_until,
    write_config,
)

from largebatch.checkpoint import find_problems

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

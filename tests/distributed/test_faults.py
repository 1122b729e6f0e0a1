"""Ranks that die, hang or raise, and links that break: the others say who and why, stop, and nothing is corrupted."""

import os
import re
import shutil
import signal
import sys
import time

import pytest
from jobs import (
    Job,
    assert_same_run,
    checkpoints,
    free_port,
    hosts,  # noqa: F401
    ip,
    no_job_left,  # noqa: F401
    summary,
    wait_until,
    write_config,
    write_torchrun,
)

from largebatch.checkpoint.folder import find_problems

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

TIMEOUT = 8.0  # backend.timeout_seconds
# To notice, to wait for the accounts of the others, and to end a process, on a busy machine.
NOTICE = 12.0
LOST = 5  # exit code


def start_ranks(folder, config, world_size=2, prefix=lambda rank: (), address="127.0.0.1", **variables):
    """Start the ranks of a job without a launcher, which would end those that the test watches."""
    port = free_port()
    ranks = []
    for rank in range(world_size):
        given = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": world_size,
            "MASTER_ADDR": address,
            "MASTER_PORT": port,
            "LARGEBATCH_TEST_SECONDS": 0.05,
        }
        words = [sys.executable, "-m", "largebatch", "train", config, "--out", folder / "run", "--resume", "auto"]
        ranks.append(Job([*prefix(rank), *words], folder / f"rank{rank}.log", **given | variables))
    return ranks


def start_long(folder, **variables):
    """Start 2 ranks that would train for hours; return them when they have two checkpoints."""
    ranks = start_ranks(folder, long_config(folder), **variables)
    wait_until(lambda: len(checkpoints(folder / "run")) >= 2, 150, "two checkpoints")
    return ranks


def long_config(folder):
    return write_config(folder, schedule={"epochs": 4000}, backend={"timeout_seconds": TIMEOUT})


def last_words(job):
    """Return the line in which a rank says why it stops."""
    lines = [line for line in job.printed().splitlines() if line.startswith("largebatch:")]
    assert lines, job.printed()[-3000:]
    return lines[-1]


def check_kept(folder):
    """See that each checkpoint is whole, and that a run continues from the newest."""
    saved = checkpoints(folder / "run")
    assert saved and all(find_problems(folder / "run" / "checkpoints" / name) == [] for name in saved)


@pytest.mark.parametrize("victim", [1, 0])
def test_a_rank_is_killed(tmp_path, victim):
    """Its connections close, so that the other one knows at once."""
    ranks = start_long(tmp_path)
    started = time.monotonic()
    ranks[victim].kill()
    other = ranks[1 - victim]
    code = other.wait(TIMEOUT + NOTICE)
    print(f"rank {victim} killed: exit {code} after {time.monotonic() - started:.1f} s: {last_words(other)}")
    assert code == LOST
    assert f"rank {1 - victim} stops" in last_words(other)
    if victim == 1:
        assert f"no word from rank 1 ({os.uname().nodename}, process" in last_words(other)
    else:
        assert "rank 0" in last_words(other) and "is gone" in last_words(other)
    assert f"continue with --resume auto --out {tmp_path / 'run'}" in last_words(other)
    check_kept(tmp_path)


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_ranks_that_run_other_modules_where_weights_are_cut(tmp_path, engine):
    """They meet in collectives of different sizes, which may end a process in the midst of one: the other knows why."""
    backend = {"name": engine, "timeout_seconds": TIMEOUT, **({"zero_stage": 3} if engine == "deepspeed" else {})}
    config = write_config(tmp_path, model={"name": "jobs:parting_mlp"}, backend=backend, schedule={"epochs": 2})
    text = config.read_text().replace("second_moment: sample", "second_moment: batch")
    config.write_text(text)
    ranks = start_ranks(tmp_path, config)
    codes = [rank.wait(150) for rank in ranks]
    said = " ".join(rank.printed() for rank in ranks)
    print(codes, *(rank.printed()[-600:] for rank in ranks), sep="\n")
    assert 0 not in codes
    assert "module 'ways." in said and "use --backend.name ddp" in said


@pytest.mark.parametrize("victim", [1, 0])
def test_a_rank_hangs(tmp_path, victim):
    ranks = start_long(tmp_path)
    started = time.monotonic()
    os.kill(ranks[victim].process.pid, signal.SIGSTOP)
    other = ranks[1 - victim]
    code = other.wait(2 * TIMEOUT + NOTICE)
    seconds = time.monotonic() - started
    print(f"rank {victim} stopped: exit {code} after {seconds:.1f} s: {last_words(other)}")
    assert code == LOST
    assert f"rank {victim}" in last_words(other).split("stops:")[1]
    assert seconds < TIMEOUT + NOTICE
    check_kept(tmp_path)


@pytest.mark.parametrize("victim", [1, 0])
def test_a_rank_raises(tmp_path, victim):
    """The cause is said by its own rank, and by the other too where rank 0 lives to pass it on."""
    ranks = start_ranks(tmp_path, long_config(tmp_path), LARGEBATCH_TEST_RAISES=f"{victim}:60")
    codes = [rank.wait(150) for rank in ranks]
    print(f"rank {victim} raised: exits {codes}: {last_words(ranks[1 - victim])}")
    assert codes[victim] == 1 and codes[1 - victim] == LOST
    assert "broken on purpose" in ranks[victim].printed()
    if victim == 1:
        assert "rank 1: RuntimeError: broken on purpose" in last_words(ranks[0])
    else:  # which takes the accounts with it
        assert "is gone or cannot be reached: its own log says why" in last_words(ranks[1])
    check_kept(tmp_path)


def test_torchrun_leaves_nobody_behind(tmp_path):
    """Without restarts a killed rank ends the job; afterwards it continues where the last checkpoint stands."""
    given = {"TORCHRUN": write_torchrun(tmp_path), "NPROC_PER_NODE": 2, "LARGEBATCH_TEST_SECONDS": 0.05}
    config = write_config(tmp_path, backend={"timeout_seconds": TIMEOUT})
    command = ["launch/torchrun.sh", config, "--out", tmp_path / "run"]
    job = Job(command, tmp_path / "job.log", **given)
    wait_until(lambda: len(checkpoints(tmp_path / "run")) >= 2, 150)
    started = time.monotonic()
    os.kill(job.ranks()[1], signal.SIGKILL)
    code = job.wait(60)
    print(f"rank 1 killed under torchrun: exit {code} after {time.monotonic() - started:.1f} s: {last_words(job)}")
    assert code == LOST and not job.family()
    check_kept(tmp_path)
    assert Job(command, tmp_path / "again.log", **given).wait() == 0
    assert "resumed from" in (tmp_path / "again.log").read_text()
    shutil.move(tmp_path / "run", tmp_path / "continued")
    assert Job(command, tmp_path / "whole.log", **given).wait() == 0
    assert_same_run(tmp_path / "continued", tmp_path / "run")


def test_nodes_without_a_common_run_folder(tmp_path):
    """Each node its own disk, where one for all was meant: said when the first checkpoint is due, and at the end."""
    for rank in (0, 1):
        (tmp_path / f"node{rank}").mkdir()
    config = write_config(tmp_path, schedule={"epochs": 1})
    at = "import os, sys; os.chdir(sys.argv[1]); os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
    ranks = []
    port = free_port()
    for rank in (0, 1):
        given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        words = [
            sys.executable,
            "-c",
            at,
            tmp_path / f"node{rank}",
            "-m",
            "largebatch",
            "train",
            config,
            "--out",
            "run",
        ]
        ranks.append(Job(words, tmp_path / f"rank{rank}.log", **given))
    codes = [rank.wait() for rank in ranks]
    print(f"exits {codes}: {last_words(ranks[0])}")
    assert codes == [4, 4]
    assert "rank 1 does not see it; the run folder must be on a file system all ranks share" in ranks[0].printed()
    assert checkpoints(tmp_path / "node0" / "run") == []
    assert summary(tmp_path / "node0" / "run")["status"] == "unsaved"


@pytest.mark.parametrize("what", ["epochs", "code"])
def test_nodes_that_differ(tmp_path, what):
    """Two agents of torchrun, one started with another flag, or beside another copy of the model's file."""
    config = write_config(tmp_path, schedule={"epochs": 1}, model={"name": "net:net"})
    port, nodes = free_port(), []
    for number in (0, 1):
        code = tmp_path / f"node{number}"
        code.mkdir()
        rate = 1 + (number if what == "code" else 0)
        text = f"import torch\n\n\ndef net(task):\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10), torch.nn.Softplus({rate}))\n"
        (code / "net.py").write_text(text)
        given = {"NNODES": 2, "NPROC_PER_NODE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": code}
        given["TORCHRUN"] = write_torchrun(code)
        flags = ["--schedule.epochs", 1 + number] if what == "epochs" else []
        words = ["launch/torchrun.sh", config, "--out", tmp_path / "run", *flags]
        nodes.append(Job(words, tmp_path / f"node{number}.log", **given))
    codes = [node.wait() for node in nodes]
    lines = {line for node in nodes for line in node.printed().splitlines() if line.startswith("largebatch: error: ")}
    print(codes, lines)
    assert codes == [2, 2] and len(lines) == 1
    numbers = "(1.0 on rank 0, 2.0 on rank 1|2.0 on rank 0, 1.0 on rank 1)"  # as the agents came
    expected = f"schedule.epochs is {numbers}" if what == "epochs" else "rank 1 differs from rank 0 in net;"
    assert re.search(expected, lines.pop()) and not (tmp_path / "run").exists()


def test_the_link_between_nodes_is_lost(tmp_path, hosts):
    """No connection closes: nothing arrives any more, and each side can only wait until its time is over."""
    ranks = start_long(
        tmp_path,
        prefix=lambda rank: ("ip", "netns", "exec", hosts[rank]),
        address="10.78.0.1",
        GLOO_SOCKET_IFNAME="eth0",
    )
    started = time.monotonic()
    ip("-n", hosts[1], "link", "set", "eth0", "down")
    ended = {}  # (exit code, seconds) by rank
    while len(ended) < 2 and time.monotonic() - started < 2 * TIMEOUT + NOTICE:
        for number, rank in enumerate(ranks):
            if number not in ended and rank.process.poll() is not None:
                ended[number] = rank.process.returncode, round(time.monotonic() - started, 1)
        time.sleep(0.05)
    print(f"link lost: exits and seconds {ended}: {[last_words(ranks[number]) for number in ended]}")
    assert {number: code for number, (code, _) in ended.items()} == {0: LOST, 1: LOST}
    assert "no word from rank 1" in last_words(ranks[0])
    assert "rank 0" in last_words(ranks[1]).split("stops:")[1]
    assert all(seconds < TIMEOUT + NOTICE for _, seconds in ended.values())
    check_kept(tmp_path)

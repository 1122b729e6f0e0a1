"""Ranks and nodes that go and come: torchrun starts the job again, and the run ends as if nothing had happened."""

import json
import os
import signal
import socket
import time

import pytest
from jobs import (
    Job,
    assert_same_run,
    checkpoints,
    free_port,
    no_job_left,  # noqa: F401
    rows,
    samples,
    summary,
    wait_until,
    write_config,
    write_torchrun,
)

from largebatch.checkpoint.folder import find_problems

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# Rounds of the rendezvous in seconds instead of minutes; what keeps a machine of the tests busy is not the network.
RENDEZVOUS = "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3"
SECONDS = 0.06  # of a forward pass: some 100 updates take 10 s or so
# Only the order of sums differs: the batch is cut over one rank or two.
FLOAT64 = 1e-10


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    """``untouched(ranks, precision)`` -> folder of the run that nobody touches."""
    done = {}

    def run(ranks, precision):
        if (ranks, precision) not in done:
            folder = tmp_path_factory.mktemp("untouched")
            config = write_config(folder, precision=precision)
            job = _start(folder, config, "only", NPROC_PER_NODE=ranks)
            assert job.wait() == 0, job.printed()
            done[ranks, precision] = folder / "run"
        return done[ranks, precision]

    return run


def _start(folder, config, name, **variables):
    given = {"TORCHRUN": write_torchrun(folder), "NPROC_PER_NODE": 1} | variables
    return Job(["launch/torchrun.sh", config, "--out", folder / "run"], folder / f"{name}.log", **given)


def _start_nodes(folder, names, port, addresses=None):
    """Start the agents, the one that keeps the rendezvous first; torchrun gives out ranks in the order of the addresses."""
    config = write_config(folder, precision="fp64")
    given = {
        "NNODES": "1:2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "PET_RDZV_CONF": RENDEZVOUS,
        "LARGEBATCH_TEST_SECONDS": SECONDS,
    }
    nodes = []
    for i, name in enumerate(names):
        own = {"PET_LOCAL_ADDR": addresses[i]} if addresses else {}
        nodes.append(_start(folder, config, name, **given, **own))
        wait_until(lambda: _listens(port), 60, "the rendezvous")  # the first one keeps it
    return nodes


def _listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _world_sizes(folder):
    """Return the ranks that each of the kept checkpoints was written by."""
    return [
        json.loads((folder / "checkpoints" / name / "state.json").read_text())["world_size"]
        for name in checkpoints(folder)
    ]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_started_again(tmp_path, untouched, victim):
    expected = untouched(2, "fp32")
    out = tmp_path / "run"
    given = {"NPROC_PER_NODE": 2, "MAX_RESTARTS": 2, "LARGEBATCH_TEST_SECONDS": SECONDS}
    job = _start(tmp_path, write_config(tmp_path), "job", **given)
    wait_until(lambda: len(checkpoints(out)) >= 2, 150)
    at = samples(out)
    ranks = job.ranks()
    os.kill(ranks[victim], signal.SIGKILL)
    killed = time.monotonic()
    wait_until(lambda: len(job.ranks()) == 2 and not set(job.ranks()) & set(ranks), 100, "new ranks")
    restarted = time.monotonic() - killed
    code = job.wait()
    print(
        f"rank {victim} killed at {at} samples: new ranks after {restarted:.1f} s, finished after "
        f"{time.monotonic() - killed:.1f} s"
    )
    assert code == 0 and "resumed from" in job.printed()
    assert_same_run(out, expected)
    assert not job.family()


@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL"])
def test_a_node_leaves(tmp_path, untouched, how):
    expected = untouched(1, "fp64")
    out = tmp_path / "run"
    stays, leaves = _start_nodes(tmp_path, ["stays", "leaves"], free_port())
    wait_until(lambda: len(checkpoints(out)) >= 2, 150)
    assert _world_sizes(out)[-1] == 2
    left, at = time.monotonic(), samples(out)
    if how == "SIGTERM":
        leaves.send(signal.SIGTERM)
        assert leaves.wait(60) == 75
    else:
        leaves.kill()
    gone = time.monotonic() - left
    wait_until(lambda: stays.printed().count("resumed from") == 1, 150, "the job goes on")
    resumed = time.monotonic() - left
    code = stays.wait()
    print(
        f"{how} at {at} samples: the node was gone after {gone:.1f} s, the job went on alone after {resumed:.1f} s and "
        f"ended after {time.monotonic() - left:.1f} s"
    )
    assert code == 0, stays.printed()[-3000:]
    assert summary(out)["world_size"] == 1
    assert_same_run(out, expected, FLOAT64)


def test_a_node_joins(tmp_path, untouched):
    expected = untouched(1, "fp64")
    out, port = tmp_path / "run", free_port()
    (first,) = _start_nodes(tmp_path, ["first"], port)
    wait_until(lambda: len(checkpoints(out)) >= 2, 150)
    assert _world_sizes(out)[-1] == 1
    joined, at = time.monotonic(), samples(out)
    (second,) = _start_nodes(tmp_path, ["second"], port)
    codes = [first.wait(), second.wait()]
    print(f"a node joined at {at} samples, the job ended after {time.monotonic() - joined:.1f} s")
    assert codes == [0, 0], first.printed()[-3000:] + second.printed()[-3000:]
    assert summary(out)["world_size"] == 2, "it came in time to take part"
    assert_same_run(out, expected, FLOAT64)
    assert rows(out)


def test_a_node_is_replaced(tmp_path, untouched):
    """One leaves and another comes while the first, which keeps the rendezvous, stays: torch 2.13's shared store fails here."""
    expected = untouched(1, "fp64")
    out, port = tmp_path / "run", free_port()
    stays, leaves = _start_nodes(tmp_path, ["stays", "leaves"], port)
    wait_until(lambda: len(checkpoints(out)) >= 1, 150)
    leaves.kill()
    left = time.monotonic()
    (comes,) = _start_nodes(tmp_path, ["comes"], port)
    codes = [stays.wait(), comes.wait()]
    print(f"a node was replaced; the job ended after {time.monotonic() - left:.1f} s")
    assert codes == [0, 0], stays.printed()[-3000:] + comes.printed()[-3000:]
    assert summary(out)["world_size"] == 2
    assert_same_run(out, expected, FLOAT64)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_node_that_keeps_the_rendezvous_dies(tmp_path, untouched, rank):
    """Nothing is left to meet at: the job ends, and says so; the same command on a node that lives continues it."""
    expected = untouched(1, "fp64")
    out, port = tmp_path / "run", free_port()
    addresses = ["127.0.0.1", "127.0.0.2"] if rank == 0 else ["127.0.0.2", "127.0.0.1"]
    dies, stays = _start_nodes(tmp_path, ["dies", "stays"], port, addresses)
    wait_until(lambda: len(checkpoints(out)) >= 2, 150)
    assert [int(v[b"RANK"]) for v in dies.family().values() if b"RANK" in v] == [rank]
    died, at = time.monotonic(), samples(out)
    dies.kill()
    wait_until(lambda: not stays.ranks(), 60, "the rank that is left ends")
    ended = time.monotonic() - died
    code = stays.wait(60)
    said = [line for line in stays.printed().splitlines() if line.startswith(("largebatch:", "torchrun.sh:"))]
    print(
        f"the rendezvous' node, of rank {rank}, died at {at} samples: the other's rank ended after {ended:.1f} s, its agent "
        f"after {time.monotonic() - died:.1f} s with {code}:\n" + "\n".join(said)
    )
    assert code == 5 and not stays.family()
    assert "RendezvousConnectionError" in stays.printed()
    lost = "rank 0, which keeps the ranks' meeting place, is gone" if rank == 0 else "no word from rank 1 ("
    assert said[0].startswith(f"largebatch: error: rank {1 - rank} stops: {lost}")
    assert f"continue with --resume auto --out {out}" in said[0]
    assert said[-1] == stays.printed().splitlines()[-1], "below the tracebacks of torchrun"
    assert f"continues from the newest checkpoint in {out} (on each node; with another's MASTER_ADDR" in said[-1]
    kept = [out / "checkpoints" / name for name in checkpoints(out)]
    assert kept and all(find_problems(folder) == [] for folder in kept)

    (again,) = _start_nodes(tmp_path, ["again"], free_port())
    assert again.wait() == 0, again.printed()[-3000:]
    assert f"resumedfrom{kept[-1]}" in "".join(again.printed().split())  # whose lines are wrapped
    assert_same_run(out, expected, FLOAT64)

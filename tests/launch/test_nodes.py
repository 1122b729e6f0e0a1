"""launch/torchrun.sh on two hosts, network namespaces of this machine, of which one lacks something."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from jobs import (
    Job,
    hosts,  # noqa: F401
    no_job_left,  # noqa: F401
    summary,
    write_config,
    write_torchrun,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

BOTH = "127.0.0.1 localhost\n10.78.0.1 first\n10.78.0.2 second\n"
DEBIANS = ("127.0.0.1 localhost\n127.0.1.1 first\n", "127.0.0.1 localhost\n127.0.1.1 second\n10.78.0.1 first\n")
# A host of its own: name and hosts file.
ENTER = 'hostname "$0"; mount --bind "$1" /etc/hosts; shift; exec "$@"'
# A torchrun whose clock is behind by CLOCK seconds.
BEHIND = """
import os, sys
from datetime import datetime, timedelta
from torch.distributed.elastic.rendezvous import dynamic_rendezvous
from torch.distributed.run import main


class Clock:
    @staticmethod
    def now(zone=None):
        return datetime.now(zone) - timedelta(seconds=float(os.environ["CLOCK"]))


dynamic_rendezvous.datetime = Clock
main()
"""


def start(folder, spaces, number, config, hosts_file, **variables):
    (folder / f"hosts{number}").write_text(hosts_file)
    (folder / f"node{number}").mkdir()
    torchrun = write_torchrun(folder / f"node{number}")
    if "CLOCK" in variables:
        (torchrun.parent / "behind.py").write_text(BEHIND)
        torchrun.write_text(
            torchrun.read_text().replace("-m torch.distributed.run", str(torchrun.parent / "behind.py"))
        )
    words = ["ip", "netns", "exec", spaces[number], "unshare", "--mount", "--uts", "bash", "-c", ENTER]
    words += [
        ("first", "second")[number],
        folder / f"hosts{number}",
        "launch/torchrun.sh",
        config,
        "--out",
        folder / "run",
    ]
    given = {"NNODES": 2, "MASTER_ADDR": "first", "NPROC_PER_NODE": 1, "TORCHRUN": torchrun, "GLOO_SOCKET_IFNAME": ""}
    return Job(words, folder / f"node{number}.log", **given | variables)


CASES = {
    "nothing": ({}, (BOTH, BOTH), (0, 0), None),
    "Debian's hosts": ({}, DEBIANS, (0, 0), None),
    "own names": ({"MASTER_ADDR": "10.78.0.1"}, ("127.0.0.1 localhost\n",) * 2, (0, 0), None),
    "clock 20 s behind": ({"CLOCK": 20}, (BOTH, BOTH), (0, 0), None),
    "clock 300 s behind": ({"CLOCK": 300}, (BOTH, BOTH), (2, 1), "2 nodes were asked for, 1 came (first)"),
    "no hosts": (
        {"MASTER_ADDR": "10.78.0.1"},
        ("", ""),
        (2, 2),
        "does not know localhost, which torchrun needs: add the line 127.0.0.1 localhost to its /etc/hosts",
    ),
    "no data": ({}, (BOTH, BOTH), (2, 2), "rank 1 (second): data.path: nothing lies at '/nowhere'"),
    "no config": ({}, (BOTH, BOTH), (2, 2), "rank 1 (second): none.yaml: no such config file"),
    "loopback alone": ({"GLOO_SOCKET_IFNAME": "lo"}, (BOTH, BOTH), (5, 5), "set GLOO_SOCKET_IFNAME on every node to"),
}


@pytest.mark.parametrize("lacks", CASES)
def test_two_nodes(tmp_path, hosts, lacks):
    variables, files, codes, line = CASES[lacks]
    backend = {"timeout_seconds": 60}
    config = write_config(tmp_path, schedule={"epochs": 0.2}, optimizer={"second_moment": "batch"}, backend=backend)
    if lacks == "no data":
        config.write_text(config.read_text().replace("name: digits", "name: jobs:rows_of_a_node"))
    first = {name: value for name, value in variables.items() if name != "CLOCK"}
    nodes = [
        start(tmp_path, hosts, 0, config, files[0], LARGEBATCH_TEST_DATA="here", **first),
        start(tmp_path, hosts, 1, "none.yaml" if lacks == "no config" else config, files[1], **variables),
    ]
    ended = [node.wait(200) for node in nodes]
    said = [node.printed() for node in nodes]
    if lacks == "loopback alone":  # the first to know ends the rendezvous, and with it perhaps the other
        assert 5 in ended and 0 not in ended and line in "".join(said)
        return
    assert ended == list(codes), "\n".join(said)
    if line is None:
        assert summary(tmp_path / "run")["world_size"] == 2
        return
    assert not (tmp_path / "run").exists()
    for code, text in zip(codes, said, strict=True):
        if code == 1:
            assert text.splitlines()[-1].startswith("torchrun.sh: exit code 1: no process of this node has begun: ")
        else:
            assert line in text and "Traceback" not in text


# All that can be written is the folder of the runs.
READ_ONLY = """
mount --make-rprivate / && mount --bind "$0" "$0"
for place in /tmp /dev/shm /var/tmp; do
    if [[ $(stat -c %m "$place") != / ]]; then mount -o remount,bind,ro "$(stat -c %m "$place")"; fi
done
mount -o remount,bind,ro / && ! touch /tmp/x && ! touch /dev/shm/x && touch "$0"/x && rm "$0"/x && exec "$@"
"""


@pytest.mark.parametrize("by", ["alone", "torchrun.sh"])
@pytest.mark.parametrize("machine", ["read-only", "unknown uid"])
def test_a_machine_with_little_of_its_own(tmp_path, machine, by):
    """As containers are: nothing can be written but one folder; nobody knows who runs it."""
    if os.geteuid() != 0:
        pytest.skip("mounting and other users need root")
    folder = tmp_path / "runs"
    folder.mkdir()
    config = write_config(tmp_path, schedule={"epochs": 0.2}, optimizer={"second_moment": "batch"})
    words = ["unshare", "--mount", "bash", "-c", READ_ONLY, folder]
    if machine == "unknown uid":
        folder.chmod(0o777)
        uid = "54321"  # which may read what root's tests are made of
        words = ["setpriv", "--reuid", uid, "--regid", uid, "--clear-groups", "--inh-caps", "+dac_read_search"]
        words += ["--ambient-caps", "+dac_read_search", "env", "-u", "HOME", "-u", "USER", "-u", "LOGNAME"]
    run = [sys.executable, "-m", "largebatch", "train"] if by == "alone" else ["launch/torchrun.sh"]
    given = {"NPROC_PER_NODE": 2, "TORCHRUN": Path(sys.executable).with_name("torchrun")}
    job = Job([*words, *run, config, "--out", folder / "run"], tmp_path / "said", **given)
    assert job.wait() == 0, job.printed()
    assert summary(folder / "run")["status"] == "finished" and "warning: log" not in job.printed()
    left = [path.name for path in folder.iterdir() if not path.name.startswith("torchinductor_")]
    assert left == ["run"], "but for what torch keeps among temporary files"

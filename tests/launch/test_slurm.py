"""launch/slurm.sbatch under a real Slurm of two nodes, which this test starts on the loopback of this machine."""

import os
import platform
import shutil
import subprocess
import time

import pytest
from jobs import (
    ROOT,
    Job,
    assert_same_run,
    checkpoints,
    environment,
    no_job_left,  # noqa: F401
    summary,
    wait_until,
    write_config,
    write_torchrun,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CONFIG = """
ClusterName=largebatch
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=17610
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool.%n
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[17611-17612] CPUs=4 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """Two nodes; `submit`, `signal` and `state` speak of jobs."""

    def __init__(self, folder):
        self.folder, self.daemons = folder, []
        for name in ("state", "spool.n1", "spool.n2"):
            (folder / name).mkdir()
        (folder / "slurm.conf").write_text(CONFIG.format(host=platform.node(), folder=folder))
        (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        files = {
            "key-file": "munge.key",
            "socket": "munge.sock",
            "pid-file": "munged.pid",
            "log-file": "m",
            "seed-file": "seed",
        }
        self.start("munged", "-F", "--force", *(f"--{option}={folder / name}" for option, name in files.items()))
        wait_until((folder / "munge.sock").exists, 20, "munge")
        self.start("slurmctld", "-D", "-c")
        for node in ("n1", "n2"):
            self.start("slurmd", "-D", "-N", node)
        wait_until(lambda: self.call("sinfo", "-h", "-o", "%T %D").strip() == "idle 2", 40, "two idle nodes")

    def start(self, *words):
        self.daemons.append(Job(words, self.folder / f"{words[0]}.out", SLURM_CONF=self.folder / "slurm.conf"))

    def call(self, *words, **variables):
        given = environment(SLURM_CONF=self.folder / "slurm.conf", **variables)
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True, env=given, cwd=ROOT)
        return done.stdout

    def state(self, job):
        words = self.call("scontrol", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def submit(self, config, out, *flags, **variables):
        """Submit the launcher with flags of sbatch, and return the job's number."""
        given = {
            "TORCHRUN": write_torchrun(out.parent),
            "NPROC_PER_NODE": 1,
            "MASTER_ADDR": "127.0.0.1",
            "LARGEBATCH_TEST_SECONDS": 0.05,
            "OUT": out,
        }
        words = ["sbatch", "--parsable", "-o", out.with_suffix(".log"), *flags, "launch/slurm.sbatch", config]
        return self.call(*words, **given | variables).strip()

    def finish(self, job, seconds=200):
        """Wait for a job to end; one that was requeued need not wait out Slurm's two minutes."""
        deadline = time.monotonic() + seconds
        while (state := self.state(job))["JobState"] not in (
            "COMPLETED",
            "FAILED",
            "TIMEOUT",
            "CANCELLED",
            "NODE_FAIL",
        ):
            assert time.monotonic() < deadline, state
            if state["JobState"] == "PENDING" and state["Reason"] == "BeginTime":
                time.sleep(3)  # a job that is started again in the second in which it was revoked cannot be
                self.call("scontrol", "update", f"jobid={job}", "StartTime=now")
            time.sleep(0.3)
        return state


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and Slurm; missing: {', '.join(missing) or 'root'}")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    Job.started.clear()  # the daemons outlive a test
    yield cluster
    for daemon in reversed(cluster.daemons):
        daemon.kill()


def test_a_requeued_job_ends_as_if_nothing_had_happened(cluster, tmp_path):
    config, whole, out = write_config(tmp_path), tmp_path / "whole", tmp_path / "run"
    started = time.monotonic()
    state = cluster.finish(cluster.submit(config, whole))
    assert state["JobState"] == "COMPLETED", whole.with_suffix(".log").read_text()[-3000:]
    assert summary(whole)["world_size"] == 2
    print(f"a job to its end: {time.monotonic() - started:.1f} s")

    job = cluster.submit(config, out)
    wait_until(lambda: len(checkpoints(out)) >= 1, 120)
    signalled = time.monotonic()
    cluster.call("scancel", "--signal=USR1", job)
    seconds = wait_until(lambda: cluster.state(job)["JobState"] == "PENDING", 60, "requeued")
    assert summary(out)["status"] == "preempted" and summary(out)["updates"] < 90
    state = cluster.finish(job)
    print(f"SIGUSR1: requeued after {seconds:.1f} s, finished after {time.monotonic() - signalled:.1f} s")
    printed = out.with_suffix(".log").read_text()
    assert state["JobState"] == "COMPLETED" and state["Restarts"] == "1", printed[-3000:]
    assert "goes back into the queue" in printed and "resumed from" in printed
    assert_same_run(out, whole)


def test_a_job_has_its_nodes_and_their_cpus_whatever_environment_it_was_given(cluster, tmp_path):
    """With a list for --export, srun hands on that list alone: NNODES would be missing, and each node train by itself."""
    out = tmp_path / "run"
    given = {"TORCHRUN": write_torchrun(tmp_path), "OUT": out, "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": ROOT / "tests"}
    export = ",".join(f"{name}={value}" for name, value in (given | {"GLOO_SOCKET_IFNAME": "lo"}).items())
    job = cluster.submit(write_config(tmp_path, schedule={"epochs": 1}), out, f"--export={export}")
    state = cluster.finish(job)
    printed = out.with_suffix(".log").read_text()
    assert state["JobState"] == "COMPLETED" and summary(out)["world_size"] == 2, printed[-3000:]
    assert state["NumCPUs"] == "8" and printed.count("2 x CPU") == 1


def test_a_mistake_ends_a_job_for_good(cluster, tmp_path):
    out = tmp_path / "run"
    given = {"none": ("--export=NONE", "there is no 'torchrun' on this node ("), "config": ("", "no such config file")}
    for name, (flag, line) in given.items():
        state = cluster.finish(cluster.submit(tmp_path / f"{name}.yaml", out, *filter(None, [flag])))
        printed = out.with_suffix(".log").read_text()
        assert state["JobState"] == "FAILED" and state["ExitCode"] == "2:0" and state["Restarts"] == "0", printed[
            -3000:
        ]
        assert printed.count(line) == 2 and "Traceback" not in printed, "one line a node"
        out.with_suffix(".log").unlink()


def test_srun_alone_does_not_train_each_task_by_itself(cluster, tmp_path):
    words = ["srun", "-N2", "--ntasks-per-node=1", "-o", tmp_path / "said", ROOT / "launch/torchrun.sh"]
    cluster.call(*words, write_config(tmp_path), "--out", tmp_path / "run", TORCHRUN=write_torchrun(tmp_path))
    said = (tmp_path / "said").read_text()
    assert said.count("this is one of 2 tasks of Slurm and NNODES is not set") == 2 and not (tmp_path / "run").exists()

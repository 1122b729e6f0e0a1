"""launch/torchrun.sh: what it passes on, and what it makes of what comes back."""

import signal

import pytest
from jobs import (
    ROOT,
    Job,
    no_job_left,  # noqa: F401
    wait_until,
)
from launching import (
    CONFIG,
    launch,  # noqa: F401
)


def test_a_run_folder_makes_it_resume(launch):
    _, said, _ = launch(CONFIG, "--out", launch.out)
    assert said[said.index("--out") :][:4] == ["--out", str(launch.out), "--resume", "auto"]
    assert "--max-restarts=0" in said and "--standalone" in said
    _, said, _ = launch(CONFIG, f"--out={launch.out}")
    assert "--resume" in said
    assert "--resume" not in launch(CONFIG)[1], "without a run folder there is nothing to continue"
    _, said, _ = launch(CONFIG, "--out", launch.out, "--resume", "never")
    assert said.count("--resume") == 1 and "auto" not in said


@pytest.mark.parametrize(
    ("ranks", "torchruns", "ours"),
    [
        ("0 0", 0, 0),
        ("0 0", 1, 1),
        ("75 75", 1, 75),
        ("75", 0, 75),  # the time limit
        ("130", 1, 130),
        ("3 3", 0, 3),
        ("4", 1, 4),
        ("5 2", 1, 2),
        ("2 5", 1, 2),  # lost by the mistake
        ("2 2", 0, 2),
        ("6 5", 1, 5),
        ("5 5 0 0", 0, 0),  # restarted by torchrun
        ("5 5", 0, 0),
        ("", 1, 1),  # killed
        ("", 0, 0),
    ],
)
def test_the_processes_tell_the_exit_code(launch, ranks, torchruns, ours):
    assert launch(CONFIG, "--out", launch.out, FAKE_RANKS=ranks, FAKE_CODE=torchruns)[0] == ours


def test_a_failure_has_the_last_word(launch):
    """Where to look and how to go on, below torchrun's tracebacks; nothing where the run itself says how it ended."""
    nodes = {"NNODES": "1:2", "MASTER_ADDR": "127.0.0.1"}
    line = "torchrun.sh: exit code {}: why is in the line above that begins with largebatch:"
    more = f"; once that is mended, the same command continues from the newest checkpoint in {launch.out}"
    elsewhere = " (on each node; with another's MASTER_ADDR where 127.0.0.1 is lost)"
    killed = "torchrun.sh: exit code 1: no process of this node came to say why: see above, and the other nodes' logs"
    for words, variables, expected in (
        ([CONFIG], {}, line.format(1)),
        ([CONFIG, "--out", launch.out], {"FAKE_RANKS": "6"}, line.format(6) + more),
        ([CONFIG, "--out", launch.out], {"FAKE_RANKS": "5"} | nodes, line.format(5) + more + elsewhere),
        ([CONFIG, "--out", launch.out], nodes, killed + more + elsewhere),
    ):
        assert launch(*words, FAKE_CODE=1, **variables)[2].splitlines()[-1] == expected
    before = launch(CONFIG)[2]
    assert launch(CONFIG, "--out", launch.out, FAKE_RANKS="3", FAKE_CODE=1)[2] == before


@pytest.mark.parametrize(
    ("ranks", "code", "starts"),
    [
        ("5 5", 1, 3),
        ("", 1, 3),
        ("4", 1, 3),
        ("2 2", 0, 1),
        ("5 2", 1, 1),
        ("3 3", 0, 1),
        ("75", 0, 1),
        ("75", 1, 3),
        ("130", 1, 1),
    ],
)
def test_what_would_end_alike_is_not_started_again(launch, ranks, code, starts):
    printed = launch(CONFIG, "--out", launch.out, FAKE_RANKS=ranks, FAKE_CODE=code, MAX_STARTS=3, PAUSE_SECONDS=0)[2]
    assert printed.count("of at most 3") == starts - 1


@pytest.mark.parametrize("name", ["TERM", "USR1", "INT"])
def test_signals_are_passed_on(launch, name):
    ranks = "130" if name == "INT" else "75"
    number = getattr(signal, f"SIG{name}")
    code, said, _ = launch(CONFIG, "--out", launch.out, number=number, FAKE_WAIT=1, FAKE_CODE=1, FAKE_RANKS=ranks)
    assert said[-1] == f"signal {name}" and code == (130 if name == "INT" else 75)
    assert "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" in said


def test_nohup_is_not_undone(launch, tmp_path):
    """Torchrun would stop at a SIGHUP that it was told to ignore; and where nobody reads, the exit code stays."""
    script = tmp_path / "nohup"
    script.write_text("trap '' HUP\nlaunch/torchrun.sh configs/digits.yaml")
    given = {"TORCHRUN": tmp_path / "fake", "FAKE_LOG": tmp_path / "said", "FAKE_OUT": launch.out, "FAKE_CODE": 7}
    assert Job(["bash", script], tmp_path / "printed", **given).wait(30) == 7
    assert "--signals-to-handle=SIGTERM,SIGINT,SIGQUIT,SIGUSR1" in (tmp_path / "said").read_text().splitlines()
    for redirect in (">&- 2>&-", ">/dev/full 2>&1", "2>&1 | true"):
        script.write_text(f"set -o pipefail; launch/torchrun.sh configs/digits.yaml {redirect}")
        assert Job(["bash", script], tmp_path / "printed", **given).wait(30) == 7


def test_a_signal_before_anything_ran_is_a_pre_emption_too(launch):
    assert launch(CONFIG, "--out", launch.out, number=signal.SIGTERM, FAKE_WAIT=1, FAKE_CODE=1)[0] == 75


def test_a_signal_after_the_end_is_none(launch):
    given = {"FAKE_WAIT": 1, "FAKE_CODE": 1, "FAKE_RANKS": "0"}
    assert launch(CONFIG, "--out", launch.out, number=signal.SIGTERM, **given)[0] == 0


def test_nodes(launch):
    given = {"NNODES": "1:3", "MASTER_ADDR": "localhost", "MASTER_PORT": "1234", "JOB_ID": "job"}
    _, said, _ = launch(CONFIG, "--out", launch.out, **given)
    expected = [
        "--nnodes=1:3",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:1234",
        "--rdzv-id=job",
        "--max-restarts=10",
    ]
    assert set(expected) <= set(said) and "--standalone" not in said
    code, _, printed = launch(CONFIG, NNODES=2)
    assert code == 2 and "MASTER_ADDR must name" in printed
    code, _, printed = launch(CONFIG, NNODES=2, MASTER_ADDR="localhost")
    assert code == 2 and "--out must name the run folder (or JOB_ID the job)" in printed
    for name in ("MAX_RESTARTS", "MAX_STARTS"):
        code, _, printed = launch(CONFIG, **{name: 2})
        assert code == 2 and "--out must name the run folder" in printed


def test_a_job_on_several_nodes_has_a_name_and_a_port_of_its_own(launch, tmp_path):
    """The same on each of its nodes, and no other's: a second run does not join the first as one more node."""

    def place(*words, **given):
        code, said, printed = launch(CONFIG, *words, NNODES="1:2", MASTER_ADDR="localhost", **given)
        assert code == 0, printed
        found = dict(word.split("=", 1) for word in said if word.startswith("--rdzv-"))
        return found["--rdzv-endpoint"], found["--rdzv-id"]

    first, again, other = (place("--out", name) for name in ("runs/a", "runs/a", "runs/b"))
    assert first == again and first[0] != other[0] and first[1] != other[1]
    assert (
        place("--out", ROOT / "runs/a") == place("--out=./runs/a/") == place("--out", "runs/a", "--seed", "3") == first
    )
    assert place("--out", tmp_path / "runs/a")[1] != first[1]
    assert place("--out", "runs/a", JOB_ID="job")[1] == "job" and place("--out", "runs/a", JOB_ID="job")[0] != first[0]
    assert place("--out", "runs/a", MASTER_PORT=7)[0] == "localhost:7"
    assert 20000 <= int(first[0].split(":")[1]) < 30000


def test_a_nodes_name_that_is_not_known_is_one_line(launch):
    given = {"NNODES": 2, "MASTER_ADDR": "no-such-host.invalid", "PATIENCE_SECONDS": 0}
    code, said, printed = launch(CONFIG, "--out", launch.out, **given)
    assert code == 2 and said == [] and printed.count("\n") == 1
    assert printed.startswith("torchrun.sh: MASTER_ADDR: no-such-host.invalid cannot be found from this node (")


@pytest.mark.parametrize("port", ["abc", "99999", "0", "-1", "1e3"])
def test_a_port_that_is_none_is_one_line(launch, port):
    given = {"NNODES": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    code, said, printed = launch(CONFIG, "--out", launch.out, **given)
    assert code == 2 and not said
    assert printed == f"torchrun.sh: MASTER_PORT: expected a port, 1 to 65535, got '{port}'\n"


def test_nodes_that_do_not_come_together_are_said(launch):
    """Torchrun waits for them in silence: one was not started, or with another run folder."""
    given = {"NNODES": 2, "MASTER_ADDR": "localhost", "PATIENCE_SECONDS": 0.3, "FAKE_WAIT": 1}
    job = Job(["launch/torchrun.sh", CONFIG, "--out", launch.out], launch.out / "said", **launch.given | given)
    line = "has waited 0.3 s for the others: NNODES is 2, they meet at localhost:2"
    wait_until(lambda: line in job.printed(), 20)
    job.send(signal.SIGTERM)
    assert job.wait(20) == 75 and not job.family()


def test_no_torchrun_is_one_line(launch):
    code, _, printed = launch(CONFIG, TORCHRUN="no-such-torchrun")
    assert code == 2 and printed.startswith("torchrun.sh: there is no 'no-such-torchrun' on this node (")
    assert printed.count("\n") == 1


def test_slurms_tasks_do_not_each_train_alone(launch):
    """As where srun was given no environment: NNODES is not set, and a task knows of the others."""
    code, said, printed = launch(CONFIG, SLURM_STEP_NUM_TASKS=2)
    assert code == 2 and said == [] and "one of 2 tasks of Slurm and NNODES is not set" in printed
    assert launch(CONFIG, SLURM_STEP_NUM_TASKS=2, NNODES=1)[0] == 0
    assert launch(CONFIG, SLURM_STEP_NUM_TASKS=1)[0] == 0


def test_what_kubeflow_sets_is_left_to_torchrun(launch):
    _, said, _ = launch(CONFIG, "--out", launch.out, PET_NNODES=2, PET_NPROC_PER_NODE=1)
    assert not [word for word in said if word.startswith(("--nnodes", "--nproc", "--standalone", "--rdzv"))]

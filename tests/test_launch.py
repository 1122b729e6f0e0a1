"""The launchers: what they pass on, and what they make of what comes back."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from jobs import ROOT, Job, free_port, no_job_left, rows, summary, wait_until, write_config, write_torchrun  # noqa: F401

# Stands in for torchrun: says what it was given, then does what the test asks of it.
FAKE = r"""#!/usr/bin/env bash
printf '%s\n' "$@" >"$FAKE_LOG"
env >>"$FAKE_LOG"
finish() {
    echo "signal $1" >>"$FAKE_LOG"
    echo begun >>"$LARGEBATCH_EXIT_CODES"
    for code in ${FAKE_RANKS:-}; do echo "$code" >>"$LARGEBATCH_EXIT_CODES"; done
    exit "${FAKE_CODE:-0}"
}
for name in TERM USR1 INT; do trap "finish $name" "$name"; done
if [[ -n ${FAKE_WAIT:-} ]]; then
    touch "$FAKE_OUT/ready"
    while :; do sleep 0.05; done
fi
finish none
"""
CONFIG = "configs/digits.yaml"


@pytest.fixture
def launch(tmp_path):
    """``launch(words, **variables)`` runs torchrun.sh with the stand-in; returns exit code, its words and its environment."""
    fake, log = tmp_path / "fake", tmp_path / "said"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    out = tmp_path / "run"
    out.mkdir()

    given = {"TORCHRUN": fake, "FAKE_LOG": log, "FAKE_OUT": out}

    def run(*words, number=None, **variables):
        log.unlink(missing_ok=True)
        variables = given | variables
        job = Job(["launch/torchrun.sh", *words], tmp_path / "printed", **variables)
        if number is not None:
            wait_until((out / "ready").exists, 20)
            job.send(number)
        code = job.wait(30)
        return code, log.read_text().splitlines() if log.exists() else [], job.printed()

    run.out, run.given = out, given
    return run


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


def test_every_launcher_keeps_the_store_of_the_workers_apart(launch):
    """Without this variable torch 2.13 hangs for a minute, then fails, when a node is replaced."""
    name = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
    assert f"{name}=1" in launch(CONFIG)[1]
    assert f"{name}=1" in (ROOT / "docker/Dockerfile").read_text()
    compose = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
    assert all(node["environment"][name] == "1" for node in compose["services"].values())
    (job,) = (d for d in _manifest() if d["kind"] == "TrainJob")
    assert {"name": name, "value": "1"} in job["spec"]["trainer"]["env"]
    launchers = [p for p in (ROOT / "launch").rglob("*") if p.is_file()]
    for path in launchers:
        text = path.read_text()
        assert name in text or "launch/torchrun.sh" in text, path
        assert path.name == "torchrun.sh" or not re.search(r"^\s*(srun )?torchrun\b", text, re.M), path


def test_launchers_pass_shellcheck():
    shellcheck = shutil.which("shellcheck", path=f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    scripts = [ROOT / "launch/torchrun.sh", ROOT / "launch/slurm.sbatch"]
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def submit(tmp_path):
    """``submit(code, **variables)`` runs slurm.sbatch with an srun that ends with that code; returns code and what was called."""
    called = tmp_path / "called"
    for name, line in {
        "srun": 'exit "$SRUN_CODE"',
        "scontrol": 'if [[ $1 == show ]]; then printf "node%s\\n" 7 8; fi',
    }.items():
        (tmp_path / name).write_text(f'#!/usr/bin/env bash\necho {name} "$@" "$MASTER_ADDR" >>{called}\n{line}\n')
        (tmp_path / name).chmod(0o755)

    def run(code, *words, **variables):
        called.unlink(missing_ok=True)
        variables = {
            "SLURM_JOB_ID": 42,
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_NNODES": 2,
            "SLURM_CPUS_ON_NODE": 6,
            "MASTER_ADDR": "",
        } | variables
        path = f"{tmp_path}:{os.environ['PATH']}"
        job = Job(["launch/slurm.sbatch", *words], tmp_path / "printed", PATH=path, SRUN_CODE=code, **variables)
        return job.wait(30), called.read_text() if called.exists() else ""

    return run


def test_slurm_requeues_what_is_not_finished(submit):
    code, called = submit(0, CONFIG, "--seed", "3")
    assert code == 0 and "requeue" not in called
    assert f"launch/torchrun.sh {CONFIG} --seed 3 --out runs/slurm-42 node7" in called
    assert "srun --export=ALL --cpus-per-task=6 " in called
    code, called = submit(75, CONFIG, OUT="shared/run")
    assert code == 75 and "scontrol requeue 42" in called and "--out shared/run" in called
    code, called = submit(75, CONFIG, SLURM_RESTART_COUNT=2, MAX_REQUEUES=2)
    assert code == 75 and "requeue" not in called
    for failed in (1, 2, 3, 5):
        code, called = submit(failed, CONFIG)
        assert code == failed and "requeue" not in called
    assert submit(0)[0] == 2


def test_nothing_that_is_shipped_tries_a_mistake_or_a_divergence_again():
    """Exit codes 2 and 3: the processes hand them over (`test_launched.py`), torchrun.sh and slurm.sbatch as above."""
    compose = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
    assert all(node["restart"] == "no" for node in compose["services"].values())  # docker's policies ask for no code
    (runtime,) = (d for d in _manifest() if d["kind"] == "TrainingRuntime")
    template = runtime["spec"]["template"]["spec"]
    (job,) = template["replicatedJobs"]
    (rule,) = job["template"]["spec"]["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2, 3]
    assert template["failurePolicy"]["rules"][0]["action"] == "FailJobSet"


def _manifest():
    return list(yaml.safe_load_all((ROOT / "launch/kubernetes/trainjob.yaml").read_text()))


def test_trainjob_has_only_known_fields():
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="kubeflow-trainer-api is not installed")
    kinds = {"TrainJob": models.TrainerV1alpha1TrainJob, "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime}

    def lost(given, known, at=""):
        """Yield the keys that the models have dropped."""
        if isinstance(given, dict):
            for key, value in given.items():
                if not isinstance(known, dict) or key not in known:
                    if value not in (None, {}, []):
                        yield f"{at}.{key}"
                else:
                    yield from lost(value, known[key], f"{at}.{key}")
        elif isinstance(given, list):
            for i, value in enumerate(given):
                yield from lost(value, known[i] if isinstance(known, list) and i < len(known) else None, f"{at}[{i}]")

    for document in _manifest():
        known = kinds[document["kind"]].from_dict(document).to_dict()
        assert list(lost(document, known)) == []


@pytest.mark.slow
def test_the_trainjobs_command_runs(tmp_path):
    """Its own command, arguments and variables, in two processes with what Trainer's torch plugin would add."""
    (job,) = (d for d in _manifest() if d["kind"] == "TrainJob")
    trainer, port = job["spec"]["trainer"], free_port()
    words = [str(tmp_path / "run") if word == "/runs/digits" else word for word in trainer["args"]]
    pods = []
    for pod in range(trainer["numNodes"]):
        given = {e["name"]: e["value"] for e in trainer["env"]} | {
            "PET_NNODES": trainer["numNodes"],
            "PET_NPROC_PER_NODE": trainer["numProcPerNode"],
            "PET_NODE_RANK": pod,
            "PET_MASTER_ADDR": "127.0.0.1",
            "PET_MASTER_PORT": port,
            "TORCHRUN": write_torchrun(tmp_path),
        }
        pods.append(Job([*trainer["command"], *words], tmp_path / f"pod{pod}", **given))
    assert [pod.wait() for pod in pods] == [0, 0], pods[0].printed() + pods[1].printed()
    assert summary(tmp_path / "run")["world_size"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TERM", "USR1", "INT"])
def test_a_signal_ends_a_real_job_with_a_checkpoint(tmp_path, name):
    out = tmp_path / "run"
    given = {"TORCHRUN": write_torchrun(tmp_path), "NPROC_PER_NODE": 2, "LARGEBATCH_TEST_SECONDS": 0.05}
    command = ["launch/torchrun.sh", write_config(tmp_path, schedule={"epochs": 400}), "--out", out]
    job = Job(command, tmp_path / "printed", **given)
    wait_until(lambda: rows(out), 120)
    started = time.monotonic()
    job.send(getattr(signal, f"SIG{name}"))
    code = job.wait(60)
    print(f"SIG{name}: exit {code} after {time.monotonic() - started:.1f} s")
    status, expected = ("interrupted", 130) if name == "INT" else ("preempted", 75)
    assert code == expected and summary(out)["status"] == status
    assert (out / "checkpoints" / f"samples-{summary(out)['samples']:012d}").is_dir()
    assert f"continue with --resume auto --out {out}" in job.printed()


@pytest.mark.slow
def test_the_time_limit_of_a_real_job(tmp_path):
    out = tmp_path / "run"
    given = {"TORCHRUN": write_torchrun(tmp_path), "NPROC_PER_NODE": 2, "LARGEBATCH_TEST_SECONDS": 0.05}
    config = write_config(tmp_path, schedule={"epochs": 400}, checkpoint={"time_limit_minutes": 0.05})
    job = Job(["launch/torchrun.sh", config, "--out", out], tmp_path / "printed", **given)
    assert job.wait() == 75
    assert summary(out)["stopped_by"] == "time_limit"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "code", "line"),
    [
        (
            {"data": {"name": "mnist", "path": "/nowhere"}},
            2,
            "largebatch: error: data.path: nothing lies at '/nowhere'",
        ),
        ({"model": {"name": "jobs:mistaken_mlp"}}, 2, "largebatch: error: rank 1: model.name: "),
        (
            {"model": {"name": "jobs:diverging_mlp"}, "optimizer": {"second_moment": "batch"}},
            3,
            "largebatch: diverged: ",
        ),
    ],
)
def test_a_mistake_is_not_restarted(tmp_path, changes, code, line):
    """Nor a divergence, by torchrun or by torchrun.sh; one rank alone may have met it."""
    given = {"TORCHRUN": write_torchrun(tmp_path), "NPROC_PER_NODE": 2, "MAX_RESTARTS": 2, "MAX_STARTS": 2}
    job = Job(
        ["launch/torchrun.sh", write_config(tmp_path, **changes), "--out", tmp_path / "run"], tmp_path / "said", **given
    )
    assert job.wait() == code, job.printed()
    assert job.printed().count(line) == 1, job.printed()
    assert "resumed from" not in job.printed() and "start 2 of" not in job.printed()

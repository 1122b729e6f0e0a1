"""Slurm, Kubernetes and real jobs by the launchers."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from jobs import (
    ROOT,
    Job,
    free_port,
    no_job_left,  # noqa: F401
    rows,
    summary,
    wait_until,
    write_config,
    write_torchrun,
)
from launching import (
    CONFIG,
    launch,  # noqa: F401
)


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
    assert "srun --export=ALL --ntasks=2 --ntasks-per-node=1 --cpus-per-task=6 " in called
    code, called = submit(75, CONFIG, OUT="shared/run")
    assert code == 75 and "scontrol requeue 42" in called and "--out shared/run" in called
    code, called = submit(75, CONFIG, SLURM_RESTART_COUNT=2, MAX_REQUEUES=2)
    assert code == 75 and "requeue" not in called
    for failed in (1, 2, 3, 5):
        code, called = submit(failed, CONFIG)
        assert code == failed and "requeue" not in called
    assert submit(0)[0] == 2


def test_a_job_submitted_from_elsewhere_is_one_line(tmp_path):
    done = subprocess.run([ROOT / "launch/slurm.sbatch", CONFIG], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(
        f"slurm.sbatch: there is no launch/torchrun.sh in {tmp_path}: submit the job from the repository's root"
    )


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

"""DeepSpeed's own configuration: what passes through, what is refused, and its launcher."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import (
    Job,
    assert_same_run,
    checkpoints,
    no_job_left,  # noqa: F401
    small_gpt,
    wait_until,
    write_config,
    write_torchrun,
)
from zero import _Updates, needs_deepspeed, zero

from largebatch.distributed import BackendConfig, Ranks, create_backend
from largebatch.distributed.ds_config import load_ds_config
from largebatch.errors import UserError
from largebatch.optim import LAMB


def _lamb(rank, world_size):
    with pytest.raises(UserError, match=r"lamb needs whole layers.*zero_stage 0"):
        _Updates(rank, world_size, zero(2), LAMB)


@needs_deepspeed
def test_layerwise_optimizers_need_whole_layers(rank_pool):
    rank_pool(2, _lamb)


@pytest.mark.parametrize(
    ("options", "stage", "message"),
    [
        ({"train_batch_size": 64}, None, "'train_batch_size'.*batch.size"),
        ({"gradient_accumulation_steps": 2}, None, "'gradient_accumulation_steps'.*batch.micro_size"),
        ({"gradient_clipping": 1.0}, None, "'gradient_clipping'.*optimizer.max_grad_norm"),
        ({"optimizer": {"type": "Adam"}}, None, "'optimizer'.*optimizer.name"),
        ({"scheduler": {"type": "WarmupLR"}}, None, "'scheduler'.*schedule.name"),
        ({"bf16": {"enabled": True}}, None, "'bf16'.*precision"),
        ({"zero_optimization": {"stage": 3}}, 2, "stage' is 3, but backend.zero_stage is 2"),
        ({"zero_optimization": {"stage": 4}}, None, "must be 0, 1, 2 or 3, got 4"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, 3, "offload_optimizer.device.*nvme"),
        ({"zero_optimization": {"memory_efficient_linear": True}}, 3, "memory_efficient_linear.*squares"),
        ({"zero_optimization": 2}, None, "expected a JSON object"),
        ([], None, "expected a JSON object"),
    ],
)
def test_what_the_run_decides_is_refused_in_the_file(options, stage, message, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(options))
    with pytest.raises(UserError, match=message) as error:
        load_ds_config(path, stage)
    assert "ds.json" in str(error.value) and "\n" not in str(error.value)


def test_options_may_stand_in_the_config_itself():
    assert load_ds_config({"zero_optimization": {"stage": 1}}, None)["zero_optimization"]["stage"] == 1
    with pytest.raises(UserError, match=r"^backend\.ds_config: 'optimizer' is decided by the run"):
        load_ds_config({"optimizer": {"type": "Adam"}}, None)


def test_what_the_run_does_not_decide_passes_through(tmp_path):
    path = tmp_path / "ds.json"
    zero_options = {"stage": 1, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": "auto"}
    path.write_text(
        json.dumps(
            {
                "fp16": {"enabled": False},
                "train_batch_size": "auto",
                "zero_optimization": zero_options,
                "steps_per_print": 7,
            }
        )
    )
    options = load_ds_config(path, None)
    assert options["steps_per_print"] == 7 and options["gradient_clipping"] == 0.0 and "train_batch_size" not in options
    assert options["zero_optimization"] == {
        "stage": 1,
        "offload_optimizer": {"device": "cpu"},
        "memory_efficient_linear": False,
    }
    assert load_ds_config(None, None)["zero_optimization"]["stage"] == 2
    with pytest.raises(UserError, match="cannot read"):
        load_ds_config(tmp_path / "none.json", None)


def test_missing_packages_are_one_line(monkeypatch):
    from largebatch.distributed import deepspeed

    monkeypatch.setattr(deepspeed, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'largebatch\[deepspeed\]'"):
        create_backend(BackendConfig(name="deepspeed", device="cpu"), "fp32", Ranks())


@needs_deepspeed
def test_nothing_is_compiled(tmp_path):
    """Neither ninja nor a compiler is needed, and a lock that a killed build has left is not waited for."""
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "largebatch", "train", str(root / "configs" / "digits.yaml"), "--out", str(tmp_path / "run"),
               "--schedule.epochs", "0.4", "--backend.name", "deepspeed", "--backend.device", "cpu"]  # fmt: skip
    variables = {**os.environ, "PATH": "/nowhere", "TORCH_EXTENSIONS_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [path.name for path in lock.parent.iterdir()] == ["lock"]


@pytest.mark.parametrize(
    ("keys", "precision", "message"),
    [
        ({"squares_every": 2}, "fp32", "squares_every"),
        ({"squares_dtype": "bfloat16"}, "fp32", "squares_dtype"),
        ({"compile": True}, "fp32", "backend.compile"),
        ({"shard": ["Block"]}, "fp32", "only fsdp"),
        ({}, "fp64", "float64"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused(keys, precision, message):
    with pytest.raises(UserError, match=message):
        create_backend(BackendConfig(name="deepspeed", device="cpu", **keys), precision, Ranks())


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_the_command_runs_under_torchrun(stage, tmp_path):
    """In an environment that is not activated."""
    root = Path(__file__).parents[2]
    variables = {name: value for name, value in os.environ.items() if name != "PATH"} | {
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "largebatch", "train",
               str(root / "configs" / "digits.yaml"), "--out", str(tmp_path / "run"), "--schedule.epochs", "4", "--warmup.epochs", "1",
               "--backend.name", "deepspeed", "--backend.zero_stage", str(stage), "--backend.device", "cpu"]  # fmt: skip
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["val_accuracy"] > 0.8


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("example", ["digits", "gpt_text"])
def test_the_command_runs_under_deepspeeds_launcher(example, tmp_path):
    """Its --local_rank argument is left out: the processes are told by the environment, as torchrun's are."""
    root = Path(__file__).parents[2]
    flags = small_gpt(tmp_path) if example == "gpt_text" else ["--schedule.epochs", "4", "--warmup.epochs", "1"]
    launcher = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_gpus",
        "2",
        "--no_local_rank",
        "--module",
        "largebatch",
    ]
    words = ["train", root / "configs" / f"{example}.yaml", "--out", tmp_path / "run", *flags,
             "--backend.name", "deepspeed", "--backend.device", "cpu"]  # fmt: skip
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *map(str, words)], env=variables, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["world_size"] == 2


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "terminated"])
def test_a_stopped_run_goes_on_under_other_engines(signal_number, tmp_path):
    """Every engine is stopped in its turn, on one rank or two, and the next goes on: the rows and weights of one DDP run."""
    config = write_config(tmp_path)
    torchrun = write_torchrun(tmp_path)
    zero = [("deepspeed", "--backend.zero_stage", stage) for stage in range(4)]
    stages = [(2, ("ddp",)), (1, zero[2]), (2, ("fsdp",)), (2, zero[3]), (1, zero[0]), (2, zero[1]), (2, ("accelerate",)), (1, ("ddp",))]  # fmt: skip

    def start(folder, world_size, engine, name, seconds):
        log = folder.with_name(f"{folder.name}-{name}.log")
        words = [torchrun, "--standalone", "--nproc-per-node", world_size, "-m", "largebatch", "train", config, "--out", folder,
                 "--resume", "auto", "--backend.name", *engine]  # fmt: skip
        return Job(words, log, LARGEBATCH_TEST_SECONDS=seconds)

    whole_run = start(tmp_path / "whole", 2, ("ddp",), "whole", 0)
    assert whole_run.wait() == 0, whole_run.printed()[-3000:]
    folder = tmp_path / "run"
    for number, (world_size, engine) in enumerate(stages):
        is_last = number == len(stages) - 1
        job = start(folder, world_size, engine, number, 0 if is_last else 0.1)
        if is_last:
            assert job.wait() == 0, job.printed()[-3000:]
        else:
            before = samples_saved(folder)
            wait_until(lambda b=before, j=job: samples_saved(folder) > b or j.process.poll() is not None, 120)
            assert job.process.poll() is None, job.printed()[-3000:]
            if signal_number == signal.SIGKILL:
                job.kill()
            else:
                for pid in job.ranks():
                    os.kill(pid, signal_number)
                job.wait()
        assert number == 0 or "resumed from" in job.printed(), job.printed()[-3000:]
    assert_same_run(folder, tmp_path / "whole", 1e-5)


def samples_saved(folder):
    return max((int(name.split("-")[1]) for name in checkpoints(folder)), default=0)

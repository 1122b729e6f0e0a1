"""Accelerate: what `accelerate launch` chose is run by the engine of that name."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from jobs import small_gpt
from zero import needs_deepspeed

from largebatch.distributed import BackendConfig, Ranks, create_backend
from largebatch.distributed.accelerate import launched
from largebatch.errors import UserError

needs_accelerate = pytest.mark.skipif(find_spec("accelerate") is None, reason="not installed: accelerate")
CONFIG = BackendConfig(name="accelerate", squares_dtype="bfloat16")
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}


@pytest.fixture(autouse=True)
def _no_launch(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def launch(monkeypatch):
    """Set what the launcher sets."""

    def set_variables(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


@needs_accelerate
@pytest.mark.parametrize(
    ("variables", "keys"),
    [
        ({}, {"name": "ddp"}),
        ({"ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "no"}, {"name": "ddp", "device": "cpu"}),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {"name": "ddp", "compile": True}),
        (FSDP, {"name": "fsdp", "offload": False}),
        (FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}, {"name": "fsdp", "offload": True}),
        (FSDP | {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "Block,Head"},
         {"name": "fsdp", "offload": False, "shard": ["Block", "Head"]}),
    ],
)  # fmt: skip
def test_the_launchers_choice_becomes_the_backend_section(variables, keys, launch):
    launch(variables)
    assert launched(CONFIG, "fp32") == CONFIG.model_copy(update=keys)


@needs_accelerate
@needs_deepspeed
def test_deepspeeds_options_come_from_the_plugin(launch, tmp_path):
    launch(DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"})
    config = launched(CONFIG, "fp32")
    zero = config.ds_config["zero_optimization"]
    assert config.name == "deepspeed" and zero["stage"] == 3 and zero["offload_optimizer"]["device"] == "cpu"
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1, "reduce_bucket_size": 1000}}))
    launch({"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)})
    zero = launched(CONFIG, "fp32").ds_config["zero_optimization"]
    assert zero["stage"] == 1 and zero["reduce_bucket_size"] == 1000


@needs_accelerate
@pytest.mark.parametrize(
    ("variables", "keys", "precision", "message"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {}, "fp32", "mixed_precision: bf16; use --precision bf16"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, {}, "fp32", "fp8; change it to no, bf16 or fp16"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, {}, "fp32", "gradient_accumulation_steps 4.*batch.micro_size"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, "fp32", "Megatron-LM"),
        ({"ACCELERATE_USE_CPU": "true"}, {"device": "cuda"}, "fp32", "backend.device"),
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "fp32", "fsdp_version: 2"),
        (FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "fp32", "activation_checkpointing"),
        (DEEPSPEED, {"zero_stage": 2}, "fp32", "backend.zero_stage"),
    ],
)  # fmt: skip
def test_a_launch_against_the_run_is_refused(variables, keys, precision, message, launch):
    launch(variables)
    with pytest.raises(UserError, match=message) as error:
        launched(CONFIG.model_copy(update=keys), precision)
    assert "\n" not in str(error.value)


@needs_accelerate
@needs_deepspeed
def test_what_the_run_decides_is_refused_in_accelerates_config(launch):
    launch(DEEPSPEED | {"ACCELERATE_GRADIENT_CLIPPING": "1.0"})
    with pytest.raises(UserError, match=r"'gradient_clipping' is decided by the run.*optimizer.max_grad_norm"):
        create_backend(BackendConfig(name="accelerate", device="cpu"), "fp32", Ranks())


def test_a_missing_package_is_one_line(monkeypatch):
    from largebatch.distributed import accelerate

    monkeypatch.setattr(accelerate, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'largebatch\[accelerate\]'"):
        create_backend(BackendConfig(name="accelerate"), "fp32", Ranks())


COMMON = {
    "compute_environment": "LOCAL_MACHINE",
    "num_machines": 1,
    "num_processes": 2,
    "mixed_precision": "no",
    "use_cpu": False,
}
LAUNCHES = {
    "DistributedDataParallel": COMMON | {"distributed_type": "MULTI_GPU"},
    "FSDP2": COMMON | {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2, "fsdp_offload_params": False}},
    "DeepSpeed ZeRO-2": COMMON | {"distributed_type": "DEEPSPEED",
                                  "deepspeed_config": {"zero_stage": 2, "gradient_accumulation_steps": 1}},
}  # fmt: skip


@needs_accelerate
@pytest.mark.slow
@pytest.mark.parametrize(
    "engine", [pytest.param(name, marks=needs_deepspeed) if "ZeRO" in name else name for name in LAUNCHES]
)
@pytest.mark.parametrize("example", ["digits", "gpt_text"])
def test_accelerate_launch_runs_the_configs(example, engine, tmp_path):
    """Two processes reach what one does. The launcher takes distributed types of GPUs on a CPU too."""
    root, config = Path(__file__).parents[2], tmp_path / "accelerate.yaml"
    config.write_text(json.dumps(LAUNCHES[engine]))
    flags = ["train", str(root / "configs" / f"{example}.yaml"), "--backend.device", "cpu"]
    flags += small_gpt(tmp_path) if example == "gpt_text" else ["--schedule.epochs", "4", "--warmup.epochs", "1"]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    found = {}
    for name, command in {
        "one": [sys.executable, "-m", "largebatch"],
        "two": [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "-m", "largebatch"],
    }.items():
        chosen = ["--backend.name", "accelerate"] if name == "two" else []
        done = subprocess.run(
            [*command, *flags, *chosen, "--out", str(tmp_path / name)],
            env=variables,
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        found[name] = json.loads((tmp_path / name / "summary.json").read_text())
        if name == "two":
            assert engine in done.stdout, done.stdout
    assert found["two"]["world_size"] == 2
    assert found["two"]["loss"] == pytest.approx(found["one"]["loss"], rel=1e-4)

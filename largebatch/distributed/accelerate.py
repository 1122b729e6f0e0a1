"""The engine of this package that matches the configuration of `accelerate launch`.

The launcher passes its configuration in environment variables, which Accelerate's own plugins read. No `Accelerator` is
created: it would open the process group first, it treats a launched CPU process as the only one, and its `accumulate` ends
an update at the wrong micro-batch if the number of micro-batches changes.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

from largebatch.distributed.backend import BackendConfig, Precision
from largebatch.errors import UserError

_PRECISIONS = {"no": ("fp32", "fp64"), "bf16": ("bf16",), "fp16": ("fp16",)}


def launched(config: BackendConfig, precision: Precision) -> BackendConfig:
    """Return the backend section for the engine that `accelerate launch` was configured for; ddp without such a launch.

    Args:
        config: the run's section; keys that Accelerate does not decide are kept.
        precision: the run's precision; Accelerate's must be the same.

    Raises:
        UserError: if Accelerate is not installed, is configured for an engine that does not exist here, or contradicts the run.
    """
    if find_spec("accelerate") is None:
        raise UserError("backend.name: Accelerate is not installed; pip install 'largebatch[accelerate]'")
    _check_run(precision)
    chosen: dict[str, Any] = {"name": "ddp"}
    if _flag("ACCELERATE_USE_DEEPSPEED"):
        chosen = {"name": "deepspeed", **_deepspeed(config)}
    elif _flag("ACCELERATE_USE_FSDP"):
        chosen = {"name": "fsdp", **_fsdp(config)}
    elif _flag("ACCELERATE_USE_MEGATRON_LM"):
        raise UserError("accelerate: expected DDP, FSDP2 or DeepSpeed, got Megatron-LM; run accelerate config anew")
    if _flag("ACCELERATE_USE_CPU"):
        if config.device == "cuda":
            raise UserError("backend.device: accelerate launch chose the CPU, the run a GPU; change one of them")
        chosen["device"] = "cpu"
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() not in ("", "no"):
        chosen["compile"] = True
    return config.model_copy(update=chosen)


def _flag(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def _check_run(precision: Precision) -> None:
    """Raise a `UserError` if the launch contradicts the run."""
    given = os.environ.get("ACCELERATE_MIXED_PRECISION", "")
    fitting = _PRECISIONS.get(given, ())
    if given and precision not in fitting:
        way_out = f"use --precision {fitting[0]}, or change it" if fitting else "change it to no, bf16 or fp16"
        raise UserError(f"precision: the run has {precision}, accelerate's config mixed_precision: {given}; {way_out}")
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", "auto"):
        raise UserError(
            f"accelerate: gradient_accumulation_steps {steps} is decided by the run; remove it and set batch.micro_size"
        )


def _deepspeed(config: BackendConfig) -> dict[str, Any]:
    """Return the keys of the backend section for the DeepSpeed options that Accelerate's plugin assembles."""
    if config.zero_stage is not None or config.ds_config is not None:
        raise UserError("backend.zero_stage, backend.ds_config: accelerate's config decides them; remove them")
    if find_spec("deepspeed") is None:
        return {}  # the engine says how to install it
    from accelerate.utils import DeepSpeedPlugin

    try:
        options = dict(DeepSpeedPlugin().deepspeed_config)
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"accelerate's deepspeed_config: {error}") from error
    for key, written in (("gradient_accumulation_steps", 1), ("steps_per_print", float("inf"))):
        if options.get(key) == written:  # the plugin itself sets these values
            del options[key]
    return {"ds_config": options}


def _fsdp(config: BackendConfig) -> dict[str, Any]:
    """Return the keys of the backend section that Accelerate's FSDP plugin sets.

    Raises:
        UserError: for options that the engine does not support: FSDP1, activation checkpointing.
    """
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import CPUOffloadPolicy

    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("accelerate: FSDP1 is not supported; set fsdp_version: 2 in its config")
    try:
        plugin = FullyShardedDataParallelPlugin()
    except (ValueError, TypeError) as error:
        raise UserError(f"accelerate's fsdp_config: {error}") from error
    if plugin.activation_checkpointing:
        raise UserError("accelerate: fsdp_activation_checkpointing is for the model to do; set it to false")
    keys: dict[str, Any] = {"offload": config.offload or isinstance(plugin.cpu_offload, CPUOffloadPolicy)}
    if config.shard is None and plugin.transformer_cls_names_to_wrap:
        keys["shard"] = list(plugin.transformer_cls_names_to_wrap)
    return keys

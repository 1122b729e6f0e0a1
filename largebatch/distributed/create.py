"""Choice of the engine for a config on this machine, and the checks of the config's keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from largebatch.distributed.arrival import check_interface
from largebatch.distributed.backend import Backend, BackendConfig, Precision, Ranks
from largebatch.errors import UserError


def resolve(config: BackendConfig, precision: Precision) -> BackendConfig:
    """Return the section with the values filled in that Accelerate's launcher, DeepSpeed's file or the machine decide.

    Raises:
        UserError: if Accelerate is configured for an option that a run does not support, or if a file cannot be read.
    """
    if config.name == "accelerate":
        from largebatch.distributed.accelerate import launched

        config = launched(config, precision)
    decided: dict[str, Any] = {}
    if config.name == "auto":
        decided["name"] = "ddp"
    if config.device == "auto":
        decided["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    if config.name == "deepspeed":
        from largebatch.distributed.ds_config import load_ds_config

        decided["ds_config"] = load_ds_config(config.ds_config, config.zero_stage)
        decided["zero_stage"] = None  # ds_config contains it now
    return config.model_copy(update=decided)


def create_backend(config: BackendConfig, precision: Precision, ranks: Ranks) -> Backend:
    """Create the engine of a config for this process.

    Raises:
        UserError: if the device is not available, or a key does not apply to the engine.
    """
    return choose_backend(config, precision, ranks)()


def choose_backend(config: BackendConfig, precision: Precision, ranks: Ranks) -> Callable[[], Backend]:
    """Return a function that creates the engine of a config for this process; the config is checked before.

    Raises:
        UserError: if the device is not available, or a key does not apply to the engine.
    """
    config = resolve(config, precision)
    check_engine(config, precision)
    name, use_cuda = config.name, config.device == "cuda"
    ranks = replace(ranks, timeout_seconds=config.timeout_seconds)
    if use_cuda and not torch.cuda.is_available():
        raise UserError("backend.device: expected a GPU for 'cuda', found none; use --backend.device cpu")
    if use_cuda and ranks.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"torchrun: {ranks.local_rank + 1} processes or more on this node, but {torch.cuda.device_count()} GPUs; "
            f"use --nproc-per-node={torch.cuda.device_count()}"
        )
    if use_cuda and (ranks.world_size > 1 or name != "ddp") and not torch.distributed.is_nccl_available():
        raise UserError("backend.device: GPUs speak through NCCL, which this torch was built without; use cpu")
    if not use_cuda and ranks.world_size > 1:
        check_interface()
    device = torch.device("cuda", ranks.local_rank) if use_cuda else torch.device("cpu")
    if name == "deepspeed":
        from largebatch.distributed.deepspeed import DeepSpeed, require_deepspeed

        require_deepspeed(device)
        assert isinstance(config.ds_config, dict)
        return partial(DeepSpeed, ranks, device, precision, config.ds_config)
    if name == "fsdp":
        from largebatch.distributed.fsdp import FullyShard

        if config.offload and device.type == "cpu":
            raise UserError("backend.offload: it spares a GPU's memory, but the run is on the cpu; remove it")
        return partial(FullyShard, ranks, device, precision, config.compile, config.shard, config.offload)
    from largebatch.distributed.ddp import DataParallel

    dtype = getattr(torch, config.squares_dtype)
    channels_last = config.channels_last
    if channels_last is None:
        channels_last = use_cuda and precision in ("bf16", "fp16")
    return partial(DataParallel, ranks, device, precision, config.compile, dtype, config.squares_every, channels_last)


def check_engine(config: BackendConfig, precision: Precision) -> None:
    """Raise if a key does not apply to the engine, whatever the machine.

    Raises:
        UserError: naming the key.
    """
    name = "ddp" if config.name == "auto" else config.name
    if name == "accelerate":  # its launcher has chosen the engine
        _refuse_keys(config, name, "its own config decides it; remove it", "zero_stage", "ds_config")
        return
    if name != "fsdp":
        _refuse_keys(config, name, "only fsdp has it; remove it", "shard", "offload")
    if name != "ddp":
        _refuse_keys(config, name, "its squares travel with the gradients; use ddp", "squares_dtype", "squares_every")
        _refuse_keys(config, name, "it lays parameters out by itself; use ddp", "channels_last")
    if name != "deepspeed":
        _refuse_keys(config, name, "only deepspeed has it; remove it", "zero_stage", "ds_config")
    else:
        _refuse_keys(config, name, "its hooks are not compiled; use ddp or fsdp", "compile")
        if precision == "fp64":
            raise UserError("precision: DeepSpeed has no float64; use fp32, or --backend.name ddp")
    if config.offload and precision == "fp16":
        raise UserError("backend.offload: the loss scaling of fp16 does not reach the CPU's memory; use bf16 or fp32")


def _refuse_keys(config: BackendConfig, engine: str, why: str, *keys: str) -> None:
    """Raise if a key that an engine does not use differs from its default.

    Raises:
        UserError: naming the first such key.
    """
    for key in keys:
        value = getattr(config, key)
        if value != BackendConfig.model_fields[key].default:
            raise UserError(f"backend.{key}: got {value}, which engine '{engine}' does not take: {why}")

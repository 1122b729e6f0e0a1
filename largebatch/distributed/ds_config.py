"""DeepSpeed's configuration of a run: the user's options, completed by the values that the run itself decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from largebatch.errors import UserError
from largebatch.section import user_path

# Options that the run decides: DeepSpeed's key, and the key in the run's config.
_DECIDED = {
    "train_batch_size": "batch.size",
    "train_micro_batch_size_per_gpu": "batch.micro_size",
    "gradient_accumulation_steps": "batch.micro_size",
    "managed_gradient_accumulation": "batch.micro_size",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer": "optimizer.name",
    "scheduler": "schedule.name",
    "fp16": "precision",
    "bf16": "precision",
    "amp": "precision",
    "torch_autocast": "precision",
    "data_types": "precision",
}
# Options that do not work with tracked squares, and why.
_REFUSED = {
    "zero_optimization.memory_efficient_linear": "true hides linear layers from the tracking of squares",
    "zero_optimization.compute_grad_norm": "a gradient that is not finite is dropped by its norm",
    "zero_optimization.zenflow": "it updates a part of the weights asynchronously",
    "tensor_parallel": "weights must be whole on every rank",
    "pipeline": "the model must be whole on every rank",
    "compression_training": "it replaces modules",
    "curriculum_learning": "the batch is the run's own",
    "data_efficiency": "the batch is the run's own",
}
_HARMLESS = {
    "zero_optimization.memory_efficient_linear": False,
    "zero_optimization.compute_grad_norm": True,
}


def load_ds_config(given: Path | dict[str, Any] | None, zero_stage: int | None) -> dict[str, Any]:
    """Return the configuration for DeepSpeed: the user's options, completed by the run's own decisions.

    Args:
        given: DeepSpeed's options, or a JSON file with them. A value of ``"auto"``, which other trainers fill in, is ignored.
        zero_stage: 0 to 3; None takes the stage in the options, or 2.

    Raises:
        UserError: if the file cannot be read, or sets an option that the run decides; the message names the config key to use.
    """
    where = f"backend.ds_config '{given}'" if isinstance(given, Path) else "backend.ds_config"
    options: Any = given or {}
    if isinstance(given, Path):
        try:
            options = json.loads(user_path(given, "backend.ds_config").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"backend.ds_config: cannot read '{given}' as JSON ({error})") from error
    return _merge(options, zero_stage, where)


def _merge(given: Any, zero_stage: int | None, where: str) -> dict[str, Any]:
    if not isinstance(given, dict) or not isinstance(given.get("zero_optimization", {}), dict):
        raise UserError(f"{where}: expected a JSON object of DeepSpeed's options, got {str(given)[:60]}")
    config = _without_auto(given)
    for key, ours in _DECIDED.items():
        value = config.pop(key, None)
        if value is not None and not (isinstance(value, dict) and value.get("enabled", bool(value)) is False):
            raise UserError(f"{where}: '{key}' is decided by the run; remove it and set {ours}")
    zero: dict[str, Any] = config.setdefault("zero_optimization", {})
    for key, reason in _REFUSED.items():
        section, _, name = key.rpartition(".")
        holder = zero if section else config
        if name in holder and holder[name] != _HARMLESS.get(key):
            raise UserError(f"{where}: '{key}' cannot be used here: {reason}; remove it")
    for name in ("offload_optimizer", "offload_param"):
        if (zero.get(name) or {}).get("device") == "nvme":
            raise UserError(f"{where}: 'zero_optimization.{name}.device' must be cpu or none, got nvme")
    stage = zero.get("stage", zero_stage if zero_stage is not None else 2)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"{where}: 'zero_optimization.stage' must be 0, 1, 2 or 3, got {stage!r}")
    if zero_stage is not None and zero_stage != stage:
        raise UserError(
            f"{where}: 'zero_optimization.stage' is {stage}, but backend.zero_stage is {zero_stage}; remove one of them"
        )
    zero |= {"stage": stage, "memory_efficient_linear": False}
    return config | {
        # The size and number of micro-batches vary: `DeepSpeed.accumulate` tells the engine where an update ends.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # DeepSpeed's default is 1.0, and its norm would include the squares.
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _without_auto(options: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in options.items() if value != "auto"}
    return {key: _without_auto(value) if isinstance(value, dict) else value for key, value in kept.items()}

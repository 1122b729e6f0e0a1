"""Values that follow from several sections of a config: the reference, the tracked squares, and batch sizes."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

from largebatch.config.optimizers import AdaptiveBase, QuenchConfig
from largebatch.config.schema import Config, ScalingConfig
from largebatch.errors import UserError
from largebatch.optim.damping import SHORTEST
from largebatch.scaling.plan import Plan
from largebatch.scaling.rules import Reference

Unit: TypeAlias = Literal["sample", "micro_batch"]
"""Unit whose gradients are squared: a single sample, or a micro-batch."""


def reference(config: Config) -> Reference:
    """Return the tuned hyper-parameters with the rules that scale them to another batch size.

    Raises:
        UserError: if a rule is set for a coefficient that the optimizer does not have, or for an optimizer that takes no rule.
    """
    optimizer, scaling = config.optimizer, config.scaling
    if not optimizer.takes_rule and scaling.rule != "none":
        raise UserError(
            f"scaling.rule: {optimizer.name} finds its own rate per sample, which no rule scales; expected none, "
            f"got {scaling.rule}; remove the key"
        )
    values = optimizer.reference_values()
    uses = {
        "momentum": "momentum" in values,
        "beta1": "betas" in values,
        "beta2": "betas" in values or "alpha" in values,
    }
    for key, used in uses.items():
        if getattr(scaling, key) != ScalingConfig.model_fields[key].default and not used:
            raise UserError(f"scaling.{key}: optimizer '{optimizer.name}' has no such coefficient; remove the key")
    return Reference(
        config.batch.reference_size,
        optimizer.lr,
        **values,
        rule=scaling.rule,
        momentum_rule=scaling.momentum if uses["momentum"] else None,
        beta1_rule=scaling.beta1,
        beta2_rule=scaling.beta2,
        shortest=SHORTEST if optimizer.damping else 0.0,
    )


def grows(config: Config) -> bool:
    """Return whether the batch size changes during the run."""
    return config.schedule.realize != "lr" or config.batch.growth == "adaptive" or config.warmup.grows_batch()


def measures_noise(config: Config) -> bool:
    """Return whether the gradient noise is measured, for the log or because the batch size or the learning rate uses it."""
    return config.noise.measure or config.batch.growth == "adaptive" or config.scaling.rule == "adascale"


def second_moment(config: Config) -> Unit | None:
    """Return the unit of the squares in the second moment (Quench: the variance), or None if it uses no tracked squares.

    Raises:
        UserError: if the scaling rule does not fit optimizer.second_moment.
    """
    optimizer, rule = config.optimizer, config.scaling.rule
    if isinstance(optimizer, QuenchConfig) and optimizer.sigma2 == "sample":
        return "sample"
    if not isinstance(optimizer, AdaptiveBase):
        return None
    wanted = optimizer.second_moment
    if wanted is None:
        is_elsewhere = config.batch.size != config.batch.reference_size or grows(config)
        return "micro_batch" if is_elsewhere and rule == "linear" else None
    if wanted == "batch":
        return None
    if rule == "sqrt":
        raise UserError(
            f"scaling.rule: sqrt is for plain second moments (optimizer.second_moment batch); with '{wanted}' they are "
            "those of the reference batch, which go with linear"
        )
    return wanted


def damps(config: Config) -> bool:
    """Return whether steps are damped; they never are if the batch size always is the reference, which needs no damping."""
    return config.optimizer.damping and (config.batch.size != config.batch.reference_size or grows(config))


def tracked(config: Config) -> Unit | None:
    """Return the unit of the squares that are tracked for the second moment, noise or damping; None if none are."""
    measured = config.noise.per if measures_noise(config) else None
    return second_moment(config) or measured or ("micro_batch" if damps(config) else None)


def clips_reference(config: Config) -> bool:
    """Return whether the clipping threshold bounds the norm of a gradient of the reference batch."""
    optimizer = config.optimizer
    is_known = second_moment(config) is not None and optimizer.takes_rule
    return optimizer.max_grad_norm is not None and is_known and optimizer.max_grad_norm_of == "reference"


def largest_batch(config: Config, plan: Plan) -> int:
    """Return the largest batch size that a run may reach.

    An adaptive batch doubles up to batch.max_size, and never grows past a tenth of the training set (Smith et al. 2018).
    """
    size = config.batch.size
    if config.batch.growth != "adaptive":
        return plan.largest_batch()
    limit = max(size, min(config.batch.max_size or math.inf, plan.samples_per_epoch // 10))
    return size << int(math.log2(limit / size))

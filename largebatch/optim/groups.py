"""Parameter groups, and the one place where a schedule writes into an optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from largebatch.moments import is_shadow, shadows


def param_groups(
    model: nn.Module, weight_decay: float = 0.0, decay_norm_and_bias: bool = False
) -> list[dict[str, Any]]:
    """Return the trained parameters in groups: decayed ones, and norms and biases without weight decay.

    Norm scales, norm offsets and biases are the parameters with at most one dimension (Goyal et al. 2017, section 5.3).
    Of a tracked model, each group is preceded by the group of its parameters' shadows, in the same order, with
    ``role: shadow``; the adaptive optimizers of this package read them, no other optimizer may be given them.

    Args:
        model: the model, tracked or not.
        weight_decay: of the first group, >= 0.
        decay_norm_and_bias: True decays all parameters alike.
    """
    shadow_of = shadows(model)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and not is_shadow(p)]
    groups: list[dict[str, Any]] = []
    all_alike = decay_norm_and_bias or weight_decay == 0.0  # one group is one pass of the optimizer
    for decayed, decay in ((True, weight_decay), (False, 0.0)):
        chosen = [(name, p) for name, p in named if (all_alike or p.dim() > 1) == decayed]
        if not chosen:
            continue
        if shadow_of:
            groups.append({"params": [shadow_of[name] for name, _ in chosen], "weight_decay": 0.0, "role": "shadow"})
        groups.append({"params": [p for _, p in chosen], "weight_decay": decay})
    return groups


def is_shadow_group(group: Mapping[str, Any]) -> bool:
    """Return whether a group holds shadows, which are never updated, clipped or counted."""
    return group.get("role") == "shadow"


def set_hyperparameters(optimizer: torch.optim.Optimizer, values: Mapping[str, Any]) -> None:
    """Write learning rate, momentum, betas and the like into every group of an optimizer.

    Raises:
        KeyError: if the optimizer has no such hyper-parameter.
    """
    for group in optimizer.param_groups:
        for name, value in values.items():
            if name not in group:
                raise KeyError(f"{type(optimizer).__name__} has no hyper-parameter {name!r}")
            group[name] = value

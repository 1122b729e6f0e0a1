"""Parameter groups, and the one place where a schedule writes into an optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def param_groups(
    model: nn.Module, weight_decay: float = 0.0, decay_norm_and_bias: bool = False
) -> list[dict[str, Any]]:
    """Return the trained parameters in two groups: decayed ones, and norms and biases without weight decay.

    Norm scales, norm offsets and biases are the parameters with at most one dimension (Goyal et al. 2017, section 5.3).

    Args:
        model: the model.
        weight_decay: of the first group, >= 0.
        decay_norm_and_bias: True decays all parameters alike.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for _, p in named if decay_norm_and_bias or p.dim() > 1]
    exempt = [p for _, p in named if not decay_norm_and_bias and p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


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

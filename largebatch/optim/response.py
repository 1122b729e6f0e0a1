"""Responses A = -dp/dg, the immediate step of an element per unit of gradient, of the optimizers that can be damped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from largebatch.errors import UserError
from largebatch.optim.adaptive import Adam, AdamW, RMSProp
from largebatch.optim.sgd import SGD

ADAM = (torch.optim.Adam, torch.optim.AdamW, Adam, AdamW)
KNOWN: tuple[type, ...] = (*ADAM, torch.optim.RMSprop, RMSProp, torch.optim.SGD, SGD)


def require_response(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer whose steps cannot be damped.

    Raises:
        UserError: if it is such an optimizer; the message names it.
    """
    if type(optimizer) not in KNOWN:
        raise UserError(
            "damping: expected Adam, AdamW, RMSprop or SGD of torch.optim or of largebatch.optim, got "
            f"{type(optimizer).__module__}.{type(optimizer).__qualname__}; leave damping out"
        )


def momentum_of(group: dict[str, Any]) -> float:
    """Return b, the momentum of a group."""
    return float(group["betas"][0] if "betas" in group else group["momentum"])


def lookahead_of(group: dict[str, Any]) -> float:
    """Return the factor by which the largest stable A h is smaller than 2 (1+b), its value for heavy-ball momentum.

    With Nesterov's momentum the response A is lr (1+b), and the step is stable for lr h < 2 (1+b)/(1+2b).
    """
    b = momentum_of(group)
    return (1.0 + 2.0 * b) / (1.0 + b) if group.get("nesterov") else 1.0


def gain_of(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> float:
    """Return A times the denominator, without the bias correction of the first updates.

    Args:
        optimizer: one of `KNOWN`.
        group: the group, with the values of this update.
    """
    lr = float(group["lr"])
    if isinstance(optimizer, torch.optim.SGD):  # and its subclass in this package, in each of its forms
        gain = (1.0 - float(group.get("dampening", 0.0))) * lr
        return gain * (1.0 + float(group["momentum"])) if group.get("nesterov") else gain
    return lr * (1.0 - float(group["betas"][0])) if isinstance(optimizer, ADAM) else lr


def denominators(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], states: Sequence[dict[str, Any]], updates: Sequence[float]
) -> list[Any]:
    """Return D of each parameter, the denominator of its last step: tensors of the parameter's shape, or 1 for SGD.

    Args:
        optimizer: one of `KNOWN`.
        group: the group, with the values of this update.
        states: the optimizer's state of each parameter.
        updates: number of each parameter's updates, including this one; used only for torch's Adam and AdamW.
    """
    if isinstance(optimizer, torch.optim.SGD):
        return [1.0] * len(states)
    if isinstance(optimizer, ADAM):
        return [_of_adam(group, state, number) for state, number in zip(states, updates, strict=True)]
    return [_of_rmsprop(group, state) for state in states]


def responses(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], states: Sequence[dict[str, Any]], updates: Sequence[float]
) -> list[Any]:
    """Return A of each parameter's last step: numbers, or tensors of its shape; the arguments are those of `denominators`."""
    gain, found = gain_of(optimizer, group), denominators(optimizer, group, states, updates)
    if not isinstance(optimizer, ADAM):
        return [gain / divisor for divisor in found]
    begun = [_first_moment_begun(group, state, number) for state, number in zip(states, updates, strict=True)]
    return [gain / part / divisor for part, divisor in zip(begun, found, strict=True)]


def _first_moment_begun(group: dict[str, Any], state: dict[str, Any], updates: float) -> float:
    """Return c1, by whose inverse the newest gradient weighs more than after many updates."""
    beta1 = float(group["betas"][0])
    if group.get("bias_correction") == "running_mean":
        return (1.0 - beta1) * float(state["first_moment_count"])
    if "bias_correction" in group:  # the count is the product of the coefficients that were used
        return 1.0 - float(state["first_moment_count"])
    return float(1.0 - beta1**updates)


def _of_adam(group: dict[str, Any], state: dict[str, Any], updates: float) -> Tensor:
    divisor = 1.0 - group["betas"][1] ** updates
    if "bias_correction" in group:
        divisor = 1.0 if group["bias_correction"] == "running_mean" else 1.0 - state["second_moment_count"]
    moment: Tensor = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
    root: Tensor = (moment / divisor).sqrt()
    return root.add_(group["eps"])


def _of_rmsprop(group: dict[str, Any], state: dict[str, Any]) -> Tensor:
    moment: Tensor = state["square_avg"] if "square_avg" in state else state["exp_avg_sq"]
    if group["centered"]:
        mean: Tensor = state["grad_avg"] if "grad_avg" in state else state["exp_avg"]
        moment = moment.addcmul(mean, mean, value=-1.0).clamp_min_(0.0)
    root = moment.sqrt() if group.get("exponent", 0.5) == 0.5 else moment
    return root.add(group["eps"])

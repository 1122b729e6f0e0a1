"""Parameter groups, and the function by which a schedule's values are written into an optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from largebatch.errors import UserError
from largebatch.moments import is_shadow, shadows
from largebatch.optim.decay import undecayed


def param_groups(
    model: nn.Module,
    weight_decay: float = 0.0,
    decay_norm_and_bias: bool = False,
    squares: bool = True,
    by_role: bool = False,
) -> list[dict[str, Any]]:
    """Return the trained parameters in groups: those with weight decay, and norms, biases and the like without it.

    `undecayed` selects the latter. If there are two groups, the key ``adapted`` is True for the first, whose layers LARS and
    LAMB scale by a trust ratio. For a tracked model, each group is preceded by a group of its parameters' shadows, in the same
    order, with ``role: shadow``. The adaptive optimizers of this package read these groups, and SGD and LARS skip them; do not
    pass them to any other optimizer. With ``squares=False`` the groups of shadows are marked ``used: False``: the squares are
    then only measured (for a noise scale), and second moments are plain, whatever the optimizer's reference_batch_size.

    Args:
        model: the model, tracked or not.
        weight_decay: weight decay of the first group, >= 0; at 0 there is one group.
        decay_norm_and_bias: whether to decay all parameters, in one group.
        by_role: whether to make two groups in any case.
        squares: whether adaptive optimizers take their second moments from the tracked squares.
    """
    shadow_of = shadows(model)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and not is_shadow(p)]
    groups: list[dict[str, Any]] = []
    all_alike = decay_norm_and_bias or weight_decay == 0.0  # one group is one pass of the optimizer
    apart = by_role or not all_alike
    others = undecayed(model) if apart else {}
    for is_weight, decay in ((True, weight_decay), (False, weight_decay if decay_norm_and_bias else 0.0)):
        chosen = [(name, p) for name, p in named if (name not in others) == is_weight]
        if not chosen:
            continue
        if shadow_of:
            of_shadows = {"weight_decay": 0.0, "role": "shadow", "used": squares}
            groups.append({"params": [shadow_of[name] for name, _ in chosen], **of_shadows})
        role = {"adapted": is_weight} if apart else {}
        groups.append({"params": [p for _, p in chosen], "weight_decay": decay, **role})
    return groups


def is_shadow_group(group: Mapping[str, Any]) -> bool:
    """Return whether a group holds shadows, whose gradients are sums of squares."""
    return group.get("role") == "shadow"


def refuse_stray_shadows(group: Mapping[str, Any]) -> None:
    """Refuse shadows that would be trained as parameters.

    Raises:
        UserError: if a group that is not marked as a group of shadows holds one.
    """
    if not is_shadow_group(group) and any(is_shadow(p) for p in group["params"]):
        raise UserError(
            "the parameters of a tracked model include its shadows, which must not be trained; expected the groups of "
            "largebatch.param_groups(model) in place of model.parameters()"
        )


def gradients_and_squares(optimizer: torch.optim.Optimizer) -> tuple[list[Tensor], list[Tensor]]:
    """Return the gradients of an optimizer's parameters, and the gradients of their shadows, which are sums of squares."""
    gradients: list[Tensor] = []
    squares: list[Tensor] = []
    for group in optimizer.param_groups:
        found = squares if is_shadow_group(group) else gradients
        found += [p.grad for p in group["params"] if p.grad is not None]
    return gradients, squares


@torch.no_grad()
def scale_gradients(gradients: list[Tensor], squares: list[Tensor], factor: float) -> None:
    """Multiply gradients by a factor and sums of squares by its square, in place."""
    if factor == 1.0:
        return
    torch._foreach_mul_(gradients, factor)
    for _ in range(2 if squares else 0):  # twice, because the square of fp16's loss scale may leave float32's range
        torch._foreach_mul_(squares, factor)


def clip_grad_norm_(optimizer: torch.optim.Optimizer, max_norm: float, factor: float = 1.0) -> float:
    """Clip an optimizer's gradients by their global norm, and scale their squares accordingly; return the norm before.

    This is for a training loop of your own: `torch.nn.utils.clip_grad_norm_` over `model.parameters()`, or a framework's own
    clipping, would treat the squares of a tracked model as gradients. Call it after the backward pass and the reduction.

    Args:
        optimizer: an optimizer over `param_groups` of a model, tracked or not; every rank holds whole gradients.
        max_norm: largest norm that is not clipped.
        factor: factor by which gradients are multiplied first, if they are not yet the mean over the batch.
    """
    gradients, squares = gradients_and_squares(optimizer)
    norm = factor * float(torch.nn.utils.get_total_norm(gradients))
    scale_gradients(gradients, squares, factor * min(1.0, max_norm / (norm + 1e-6)))
    return norm


def set_hyperparameters(optimizer: torch.optim.Optimizer, values: Mapping[str, Any]) -> None:
    """Write learning rate, momentum, betas and the like into every group of an optimizer.

    Raises:
        KeyError: if the optimizer has no such hyper-parameter.
        UserError: if groups have different learning rates, which would become the same.
    """
    rates = {float(group["lr"]) for group in optimizer.param_groups if not is_shadow_group(group)}
    if "lr" in values and len(rates) > 1:
        raise UserError(
            f"set_hyperparameters: the groups have rates of their own ({', '.join(f'{lr:g}' for lr in sorted(rates))}), which "
            "would all become one; use largebatch.batch_size_invariant, which scales each"
        )
    for group in optimizer.param_groups:
        for name, value in values.items():
            if name not in group:
                raise KeyError(f"{type(optimizer).__name__} has no hyper-parameter {name!r}")
            group[name] = value


def described(groups: Iterable[dict[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, parameter) of all groups; a parameter without a name is described by its index and shape."""
    for number, group in enumerate(groups):
        names = group.get("param_names") or [""] * len(group["params"])
        for index, (name, parameter) in enumerate(zip(names, group["params"], strict=True)):
            shape = "x".join(map(str, parameter.shape)) or "scalar"
            yield f"'{name}'" if name else f"{index} of group {number} ({shape})", parameter


def check_groups(groups: Iterable[dict[str, Any]], has_moment: bool) -> None:
    """Refuse groups that `batch_size_invariant` cannot take.

    Args:
        groups: groups of the optimizer.
        has_moment: whether the optimizer has a second moment to be estimated.

    Raises:
        UserError: for shadows, for lr_decay other than 0, or for a beta2 or alpha of 0.
    """
    for group in groups:
        if is_shadow_group(group) or any(is_shadow(p) for p in group["params"]):
            raise UserError(
                "batch_size_invariant: the model is tracked, and its shadows are among the parameters; call largebatch.untrack "
                "first: this optimizer does not need a tracked model"
            )
        if group.get("lr_decay"):
            raise UserError(f"lr_decay: expected 0, got {group['lr_decay']}; use a scheduler")
        coefficient = group["betas"][1] if "betas" in group else group.get("alpha", 1.0)
        if has_moment and not coefficient > 0:
            raise UserError(
                "beta2 (alpha): expected more than 0: a second moment that is no average cannot be estimated"
            )

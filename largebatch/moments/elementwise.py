"""Broadcast elementwise operations: position embeddings, LayerScale, class tokens, gates, PReLU.

An operand is expanded to one copy per sample (no memory: stride zero). The operation's own backward then returns the
gradient of each copy, which is the per-sample gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from largebatch.moments.derived import derive, is_slice
from largebatch.moments.scope import WAY_OUT, Scope, rule
from largebatch.section import UserError

_NAMES = [
    "add",
    "sub",
    "subtract",
    "rsub",
    "mul",
    "multiply",
    "div",
    "divide",
    "true_divide",
    "pow",
    "maximum",
    "minimum",
    "fmax",
    "fmin",
    "where",
    "lerp",
    "addcmul",
    "addcdiv",
    "atan2",
    "hypot",
    "copysign",
    "float_power",
    "logaddexp",
    "masked_fill",
    "xlogy",
]
_DUNDERS = [
    "add",
    "radd",
    "iadd",
    "sub",
    "rsub",
    "isub",
    "mul",
    "rmul",
    "imul",
    "truediv",
    "rtruediv",
    "itruediv",
    "pow",
    "rpow",
    "ipow",
]
FUNCTIONS: set[Any] = {getattr(space, name) for name in _NAMES for space in (torch, Tensor) if hasattr(space, name)}
FUNCTIONS |= {getattr(Tensor, f"{name}_") for name in _NAMES if hasattr(Tensor, f"{name}_")}
FUNCTIONS |= {getattr(Tensor, f"__{name}__") for name in _DUNDERS if hasattr(Tensor, f"__{name}__")}
# Not elementwise, but they broadcast over leading dimensions: an attention bias, a learned query.
FUNCTIONS |= {F.scaled_dot_product_attention, F.cosine_similarity, Tensor.copy_}


def run(scope: Scope, func: Any, args: Any, kwargs: Any) -> Any:
    """Run `func` with every operand expanded along the samples."""
    values = (*args, *kwargs.values())
    ndim = max(value.ndim for value in values if isinstance(value, Tensor))
    batched = next(value for value in values if scope.operand(value) is None and scope.is_batched(value))
    if batched.ndim <= scope.batch_dim:
        name = next(operand for value in values if (operand := scope.operand(value))).bases[0].name
        raise UserError(
            f"track: parameter '{name}' meets a tensor of shape {list(batched.shape)} in {func.__name__}, in which the "
            f"samples can no longer be told apart; {WAY_OUT}"
        )
    dim = scope.batch_dim + ndim - batched.ndim
    rows, part = batched.shape[scope.batch_dim], scope.part(batched)

    def expanded(value: Any) -> Any:
        operand = scope.operand(value)
        return value if operand is None else scope.expand(operand, dim, rows, ndim, func.__name__, part)

    return func(*map(expanded, args), **{name: expanded(value) for name, value in kwargs.items()})


@rule(torch.prelu)
def prelu(scope: Scope, input: Tensor, weight: Tensor) -> Tensor:
    """max(0, x) + w * min(0, x); w holds one slope, or one for each channel (dimension 1)."""
    operand = scope.operand(weight)
    assert operand is not None
    if weight.numel() > 1:
        operand = derive(
            scope, Tensor.view, (weight, 1, -1, *[1] * (input.ndim - 2)), {}, [operand]
        )._largebatch_operand
    slope = scope.expand(operand, scope.batch_dim, input.shape[scope.batch_dim], input.ndim, "prelu")
    return input.clamp(min=0) + slope * input.clamp(max=0)


@rule(Tensor.__setitem__)
def assign(scope: Scope, target: Tensor, index: Any, value: Any) -> None:
    """Put a parameter at some places of every sample, as mask tokens are."""
    operand = scope.operand(value)
    if operand is not None and isinstance(index, Tensor) and index.dtype == torch.bool:
        if index.ndim > scope.batch_dim and index.ndim + value.ndim <= target.ndim:
            mask = index.reshape(*index.shape, *[1] * (target.ndim - index.ndim))
            rows = target.shape[scope.batch_dim]
            token = scope.expand(operand, scope.batch_dim, rows, target.ndim, "an assignment")
            target.copy_(torch.where(mask, token.to(target.dtype), target))
            return
    elif operand is not None and is_slice(index):
        first, *_ = index if isinstance(index, tuple) else (index,)
        part = target[index]
        if scope.batch_dim == 0 and first in (Ellipsis, slice(None)) and part.ndim >= value.ndim:
            part._largebatch_batched = True  # type: ignore[attr-defined]
            run(scope, Tensor.copy_, (part, value), {})
            return
    name = next(o for v in (target, value) if (o := scope.operand(v)) is not None).bases[0].name
    raise UserError(
        f"track: parameter '{name}' is assigned in a way that does not show which sample gets what; use torch.where, "
        f"{WAY_OUT}"
    )

"""What a sample owes to the weight and the bias of a convolution."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from largebatch.moments.marks import WHOLE
from largebatch.moments.rules import arguments, check_constant, rows_of, rule, tap, wide
from largebatch.moments.scope import Refusal, Scope
from largebatch.moments.uses import Given, Operand, Product, Use

# Small weight gradients leave a processor's threads idle unless several are made at once (64 -> 128 channels at 16 x 16: 4.2 ms
# for 32 samples by fours, 8.1 ms one by one, two cores); from 256 -> 256 channels of 3 x 3 on a second sample only costs cache.
FOLD_ELEMENTS = 1 << 18


class Convolved(Use):
    """Weight gradients of a convolution: d [samples, rows, o, ..] and x [samples, rows, i, ..]."""

    def __init__(self, d: Tensor, x: Tensor, shape: torch.Size, options: tuple[Any, ...]):
        self.d, self.x, self.shape, self.options = d, x, shape, options

    def gradient(self, number: int) -> Tensor:
        """Return one sample's."""
        return self._gradients(self.d[number], self.x[number], 1)[0]

    def squares(self, weight: float) -> Tensor:
        """Fold some samples into the groups of one convolution at a time."""
        count, rows = self.d.shape[:2]
        step = math.ceil(FOLD_ELEMENTS / math.prod(self.shape)) if rows == 1 else 1
        total = torch.zeros(self.shape, dtype=self.d.dtype, device=self.d.device)
        for first in range(0, count, step):
            d, x = (t[first : first + step].flatten(0, 1) for t in (self.d, self.x))
            for grad in self._gradients(d, x, len(d) if rows == 1 else 1):
                total.addcmul_(grad, grad, value=weight)
        return total

    def _gradients(self, d: Tensor, x: Tensor, folded: int) -> Tensor:
        *options, groups = self.options
        if folded > 1:
            d, x = (t.reshape(1, -1, *t.shape[2:]) for t in (d, x))
        weight = d.new_empty(1).expand(folded * self.shape[0], *self.shape[1:])
        backward = torch.ops.aten.convolution_backward
        _, grad, _ = backward(d, x, weight, None, *options, folded * groups, (False, True, False))
        return grad.reshape(folded, *self.shape)


def _tuple(value: Any, length: int) -> tuple[int, ...]:
    return tuple(value) * (length // len(value)) if isinstance(value, (list, tuple)) else (value,) * length


_TRANSPOSED = {torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d}


@rule(torch.conv1d, torch.conv2d, torch.conv3d, *_TRANSPOSED)
def convolution(scope: Scope, func: Any, args: Any, kwargs: Any) -> Tensor:
    """Convolutions, with zero padding given as numbers or by name, and transposed ones."""
    names = "input weight bias stride padding dilation groups"
    if func in _TRANSPOSED:
        names = "input weight bias stride padding output_padding groups dilation"
    values = dict(zip(names.split(), arguments(names, args, kwargs), strict=True))
    x, weight, bias = values["input"], values["weight"], values["bias"]
    ndim = weight.ndim - 2
    rows, of_weight, of_bias = rows_of(scope, x), scope.operand(weight), scope.operand(bias)
    check_constant(scope, (weight, bias))
    if x.ndim != ndim + 2 or rows.dim not in (0, WHOLE):
        raise Refusal("its samples do not lie along the first dimension")
    default = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0}
    numbers = {key: values.get(key) if values.get(key) is not None else start for key, start in default.items()}
    if numbers["padding"] == "valid":
        numbers["padding"] = 0
    elif numbers["padding"] == "same":
        spare = [d * (k - 1) for d, k in zip(_tuple(numbers["dilation"], ndim), weight.shape[2:], strict=True)]
        if any(s % 2 for s in spare):
            raise Refusal("an even window pads one more on the right than on the left")
        numbers["padding"] = [s // 2 for s in spare]
    stride, padding, dilation, extra = (_tuple(numbers[key], ndim) for key in default)
    options = (stride, padding, dilation, func in _TRANSPOSED, extra, values["groups"] or 1)
    shape = weight.shape
    is_pointwise = weight[0, 0].numel() == 1 and not any(padding) and options[-1] == 1 and func not in _TRANSPOSED
    operands = [operand for operand in (of_weight, of_bias) if operand is not None]

    def positions(t: Tensor) -> Tensor:
        return t.reshape(len(t), -1, *t.shape[-ndim - 1 :])

    def left(grad: Tensor, saved: tuple[Tensor, ...]) -> list[tuple[Operand, Use]]:
        d = wide(positions(scope.batch.take(grad, rows)), grad)
        uses: list[tuple[Operand, Use]] = []
        if of_weight is not None:
            x = wide(positions(saved[0]), grad)
            use: Use = Convolved(d, x, shape, options)
            if is_pointwise:  # a linear map at each position
                for at, step in enumerate(stride):
                    x = x[(slice(None),) * (at + 3) + (slice(None, None, step),)]
                use = Product(*(t.movedim(2, -1).flatten(1, -2) for t in (d, x)))
            uses.append((of_weight, use))
        if of_bias is not None:
            uses.append((of_bias, Given(d.flatten(3).sum((1, 3)))))
        return uses

    saved = [scope.batch.take(x, rows)] if of_weight is not None else []
    return tap(scope, func(*args, **kwargs), rows, operands, left, saved)

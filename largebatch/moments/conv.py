"""Convolutions and transposed convolutions of one to three dimensions.

A sample's weight gradient is a convolution of its input with d. Two ways to form it on a processor: the library's own
weight-gradient kernel on a few samples folded into its groups, which is best while a sample has many output positions;
and im2col, after which it is the matrix product of `linear.product_moments`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from largebatch.moments.linear import BLOCK_ELEMENTS, plain, product_moments
from largebatch.moments.scope import Scope, rule
from largebatch.moments.tap import Operation, statistic_dtype, sums

# Output positions from which on the library's kernel beats im2col (measured: 8 x 8 and less lose, 16 x 16 gains).
NATIVE_POSITIONS = 200

# Elements of the weight gradients that one call of the kernel makes. Small ones leave the threads idle unless several
# are made at once (64 -> 128 channels at 16 x 16: 4.2 ms for 32 samples by fours, 8.1 ms one by one, two cores); from
# 256 -> 256 channels of 3 x 3 on a second sample only costs cache.
FOLD_ELEMENTS = 1 << 18


class Convolution(Operation):
    """Roles "weight" and "bias"; saved tensors: the input and the (detached) weight, whose values are not used."""

    def __init__(
        self,
        num_samples: int,
        roles: tuple[str, ...],
        weight_shape: tuple[int, ...],
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        transposed: bool,
        output_padding: tuple[int, ...],
        groups: int,
    ):
        super().__init__(num_samples, roles)
        self.weight_shape = weight_shape
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.transposed, self.output_padding, self.groups = transposed, output_padding, groups

    def prepare(self, grad: Tensor, saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return d [rows, o, ..] and x [rows, i, ..] in one type; `rows` are samples or several for each."""
        return tuple(t.to(grad.dtype) for t in (grad, *saved))

    def moments(self, role: str, ready: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Choose the cheaper way."""
        if role == "bias":
            return sums(self.per_sample(role, ready, 0, self.num_samples))
        d, x = ready
        has_kernel = d.device.type == "cpu" and not torch.compiler.is_compiling()
        if self.groups == 1 and not self.transposed and d.ndim <= 4:
            is_pointwise = all(k == 1 for k in self.weight_shape[2:]) and not any(self.padding)
            if is_pointwise or not has_kernel or _positions(d) < NATIVE_POSITIONS:
                return self._unfolded_moments(d, x, is_pointwise)
        if not has_kernel:
            return super().moments(role, ready)
        wide = statistic_dtype(d.dtype)
        total = torch.zeros(self.weight_shape, dtype=wide)
        squares = torch.zeros_like(total)
        step = math.ceil(FOLD_ELEMENTS / total.numel())
        for lo in range(0, self.num_samples, step):
            for grad in self.per_sample(role, ready, lo, min(lo + step, self.num_samples)).to(wide):
                total.add_(grad)
                squares.addcmul_(grad, grad)
        return total, squares

    def _unfolded_moments(self, d: Tensor, x: Tensor, is_pointwise: bool) -> tuple[Tensor, Tensor]:
        """im2col, then products over positions, for as many input channels at a time as the cache has room for."""
        d_rows = self._join_rows(d.flatten(2).mT)
        outputs, channels = self.weight_shape[:2]
        blocks = math.ceil(math.prod(self.weight_shape) / BLOCK_ELEMENTS)
        if is_pointwise or d.device.type != "cpu" or torch.compiler.is_compiling():
            blocks = 1
        step = math.ceil(channels / blocks)
        total = squares = torch.empty(0)
        for lo in range(0, channels, step):
            columns = self._columns(x[:, lo : lo + step], d.shape[2:], is_pointwise)
            part, part_squares = product_moments(d_rows, self._join_rows(columns.mT))
            if step >= channels:
                return part.reshape(self.weight_shape), part_squares.reshape(self.weight_shape)
            if lo == 0:
                total, squares = (part.new_empty(self.weight_shape) for _ in range(2))
            # Written where it belongs at once: a concatenation would hold everything twice.
            total[:, lo : lo + step] = part.view(outputs, -1, *self.weight_shape[2:])
            squares[:, lo : lo + step] = part_squares.view(outputs, -1, *self.weight_shape[2:])
        return total, squares

    def _join_rows(self, matrices: Tensor) -> Tensor:
        """Return [rows, positions, features] as [n, t, features]: the rows of a sample are more positions."""
        if len(matrices) == self.num_samples:
            return matrices
        return matrices.reshape(self.num_samples, -1, matrices.shape[2])

    def _columns(self, x: Tensor, size: tuple[int, ...], is_pointwise: bool) -> Tensor:
        """Return the inputs that meet each weight at each position, [rows, channels * window, positions]."""
        window = self.weight_shape[2:]
        if is_pointwise:
            steps = tuple(slice(None, None, step) for step in self.stride)
            return x[(slice(None), slice(None), *steps)].flatten(2)[:, :, : math.prod(size)]
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            return _windows(x, size, window, self.stride, self.padding, self.dilation)
        if x.ndim == 3:
            return F.unfold(x.unsqueeze(2), (1, *window), (1, *self.dilation), (0, *self.padding), (1, *self.stride))
        return F.unfold(x, window, self.dilation, self.padding, self.stride)

    def per_sample(self, role: str, ready: tuple[Tensor, ...], lo: int, hi: int) -> Tensor:
        """Return the gradients from the library's weight-gradient kernel."""
        rows = len(ready[0]) // self.num_samples
        d = ready[0][lo * rows : hi * rows]
        if role == "bias":
            return d.flatten(2).sum(2, dtype=statistic_dtype(d.dtype)).view(hi - lo, rows, -1).sum(1)
        x = ready[1][lo * rows : hi * rows]
        if rows == 1:
            return self._weight_gradient(d, x)
        return torch.cat(
            [self._weight_gradient(a, b, False) for a, b in zip(d.split(rows), x.split(rows), strict=True)]
        )

    def _weight_gradient(self, d: Tensor, x: Tensor, is_per_row: bool = True) -> Tensor:
        """Return the gradient of each row, by folding rows into groups, or of all rows together, [rows or 1, *weight]."""
        rows = len(d) if is_per_row else 1
        if rows > 1:
            d, x = (t.reshape(1, -1, *t.shape[2:]) for t in (d, x))
        shape = (rows * self.weight_shape[0], *self.weight_shape[1:])
        weight = d.new_empty(1).expand(shape) if d.device.type != "meta" else d.new_empty(shape)
        _, grad, _ = torch.ops.aten.convolution_backward(
            d,
            x,
            weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            rows * self.groups,
            (False, True, False),
        )
        return grad.reshape(rows, *self.weight_shape)


def _windows(
    x: Tensor,
    size: tuple[int, ...],
    window: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    """im2col by one strided copy, [n, channels * window, positions]: up to twice as fast as F.unfold."""
    x = F.pad(x, [p for edge in reversed(padding) for p in (edge, edge)]).contiguous()
    steps = x.stride()[2:]
    strides = (
        *x.stride()[:2],
        *(step * d for step, d in zip(steps, dilation, strict=True)),
        *(step * s for step, s in zip(steps, stride, strict=True)),
    )
    return x.as_strided((*x.shape[:2], *window, *size), strides).flatten(1, 1 + len(window)).flatten(2)


def _positions(d: Tensor) -> int:
    return d[0, 0].numel()


def _tuple(value: Any, length: int) -> tuple[int, ...]:
    return tuple(value) * (length // len(value)) if isinstance(value, (list, tuple)) else (value,) * length


def _tap(
    scope: Scope,
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    transposed: bool = False,
    output_padding: Any = 0,
) -> Tensor:
    found = {"weight": scope.operand(weight), "bias": scope.operand(bias)}
    operands = {role: operand for role, operand in found.items() if operand is not None}
    ndim = weight.ndim - 2
    operation = Convolution(
        scope.samples_in(input.shape[0], "convolution"),
        tuple(operands),
        tuple(weight.shape),
        _tuple(stride, ndim),
        _tuple(padding, ndim),
        _tuple(dilation, ndim),
        transposed,
        _tuple(output_padding, ndim),
        groups,
    )
    return scope.tap(operation, output, (input,) if "weight" in operands else (), tuple(operands.values()))


@rule(torch.conv1d, torch.conv2d, torch.conv3d)
def convolution(
    scope: Scope,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution with zero padding, given as numbers or as "same" or "valid"."""
    ndim = weight.ndim - 2
    if padding == "valid":
        padding = 0
    elif padding == "same":
        spare = [d * (k - 1) for d, k in zip(_tuple(dilation, ndim), weight.shape[2:], strict=True)]
        if any(s % 2 for s in spare):
            # An even window pads one more on the right, which a convolution's own padding cannot say.
            input = F.pad(input, [p for s in reversed(spare) for p in (s // 2, s - s // 2)])
            padding = 0
        else:
            padding = [s // 2 for s in spare]
    function = (F.conv1d, F.conv2d, F.conv3d)[ndim - 1]
    params = plain(weight, scope.operand(weight)), plain(bias, scope.operand(bias))
    output = function(input, *params, stride, padding, dilation, groups)
    return _tap(scope, output, input, weight, bias, stride, padding, dilation, groups)


@rule(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
def transposed_convolution(
    scope: Scope,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor:
    """Transposed convolution; weight [i, o / groups, ..]."""
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[weight.ndim - 3]
    params = plain(weight, scope.operand(weight)), plain(bias, scope.operand(bias))
    output = function(input, *params, stride, padding, output_padding, groups, dilation)
    return _tap(scope, output, input, weight, bias, stride, padding, dilation, groups, True, output_padding)

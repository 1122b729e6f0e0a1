"""Each sample's contribution to the gradient of a parameter, operation by operation.

Each rule runs its operation as it was called and puts a tap on the output (`uses`). There are rules for linear maps,
convolutions, lookups, batch norms, and broadcasts such as position embeddings and scales; `again` handles other operations.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from largebatch.moments.operations import POINTWISE, WHOLE, Rows, is_in_place
from largebatch.moments.private import batch_statistics
from largebatch.moments.samples import Batch, mark, mark_of, marks_in, verdicts
from largebatch.moments.scope import Refusal, Scope
from largebatch.moments.uses import Left, Operand, Tap, Use, collectors, given, product, statistic_dtype

Rule = Callable[..., Any]

RULES: dict[Any, Rule] = {}


def rule(*functions: Any) -> Callable[[Rule], Rule]:
    """Register the decorated function, which takes (scope, func, args, kwargs), as the rule of `functions`."""

    def register(handler: Rule) -> Rule:
        RULES.update(dict.fromkeys(functions, handler))
        return handler

    return register


def rows_of(scope: Scope, tensor: Any, *constants: Any) -> Rows:
    """Return where an operation's input holds its samples; its weight and bias must hold none, as a hypernetwork's would."""
    found = mark_of(scope.batch, tensor) if isinstance(tensor, Tensor) else None
    if not isinstance(found, Rows):
        raise Refusal("its input does not come from the batch")
    if any(isinstance(t, Tensor) and mark_of(scope.batch, t) is not None for t in constants):
        raise Refusal("its weight or bias comes from the batch")
    return found


def tap(
    scope: Scope, output: Tensor, rows: Rows, operands: Sequence[Operand], left: Left, saved: Sequence[Tensor]
) -> Tensor:
    """Put a tap on the output of an operation that ran as it was called.

    Args:
        scope: the forward pass.
        output: the operation's output.
        rows: where the output's samples lie.
        operands: the operands that the operation used.
        left: takes the gradient of the output and the saved tensors, and returns a `Use` of each operand.
        saved: the tensors that `left` needs.
    """
    if not output.requires_grad:
        return output
    every = [base for operand in operands for base in operand.bases]
    for base in every:
        base.num_uses += 1
    bases = tuple(dict.fromkeys(every))
    samples = scope.batch.samples_of(rows)
    output = Tap.apply(left, samples, bases, output, len(saved), *[s.detach() for s in saved], *collectors(bases))
    mark(scope.batch, output, rows)
    return output


def wide(tensor: Tensor, grad: Tensor) -> Tensor:
    """Return a tensor in the type of squares, first rounded to the type that the operation used under autocast."""
    dtype = grad.dtype
    return tensor.to(dtype).to(statistic_dtype(dtype)) if tensor.is_floating_point() else tensor


def arguments(names: str, args: Any, kwargs: Any) -> list[Any]:
    """Return the arguments of a call in the order of their names, None for those that were not given."""
    values = dict(zip(names.split(), args, strict=False)) | kwargs
    return [values.get(name) for name in names.split()]


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _flat(tensor: Tensor) -> Tensor:
    """[samples, rows of each, .., features] -> [samples, positions, features]."""
    return tensor if tensor.ndim == 3 else tensor.reshape(tensor.shape[0], -1, tensor.shape[-1])


def _summed(tensor: Tensor) -> Tensor:
    """[samples, rows of each, channels, ..] -> [samples, channels]."""
    return tensor.flatten(3).sum((1, 3)) if tensor.ndim > 3 else tensor.sum(1)


def _layer(
    scope: Scope,
    output: Tensor,
    layer: tuple[Tensor, Any, Any],
    rows: Rows,
    of: Callable[[Tensor, Tensor], Use],
    arrange: Callable[[Tensor], Tensor] = _same,
) -> Tensor:
    """Put a tap on a layer's output: the weight's use is ``of(d, x)``, and the bias's gradients are sums of d by sample."""
    x, weight, bias = layer
    of_weight, of_bias = scope.operand(weight), scope.operand(bias)

    def left(grad: Tensor, saved: tuple[Tensor, ...]) -> list[tuple[Operand, Use]]:
        d = arrange(scope.batch.gradients(grad, rows))
        uses = [] if of_weight is None else [(of_weight, of(d, arrange(wide(saved[0], grad))))]
        return uses if of_bias is None else [*uses, (of_bias, given(_summed(d)))]

    operands = [operand for operand in (of_weight, of_bias) if operand is not None]
    return tap(scope, output, rows, operands, left, [] if of_weight is None else [scope.batch.take(x, rows)])


def _linear(scope: Scope, func: Any, args: Any, kwargs: Any, x: Tensor, weight: Any, bias: Any) -> Tensor:
    """Y = x w^T + b, or x w + b."""
    rows = rows_of(scope, x, weight, bias)
    if weight.ndim != 2 or x.ndim < 2 or rows.dim == x.ndim - 1 or (bias is not None and bias.ndim != 1):
        raise Refusal("its samples, or its weight, have other dimensions than (samples, .., features)")
    output = func(*args, **kwargs)
    if bias is not None and bias.shape != output.shape[-1:]:
        raise Refusal("its bias has other dimensions than (features)")
    of = product if func is torch.nn.functional.linear else lambda d, x: product(x, d)
    return _layer(scope, output, (x, weight, bias), rows, of, _flat)


@rule(torch.nn.functional.linear)
def linear(scope: Scope, func: Any, args: Any, kwargs: Any) -> Tensor:
    """X w^T + b."""
    return _linear(scope, func, args, kwargs, *arguments("input weight bias", args, kwargs))


@rule(torch.addmm, Tensor.addmm)
def addmm(scope: Scope, func: Any, args: Any, kwargs: Any) -> Tensor:
    """B + x w."""
    if set(kwargs) - {"input", "mat1", "mat2"}:
        raise Refusal("it has factors, alpha or beta")
    bias, x, weight = arguments("input mat1 mat2", args, kwargs)
    return _linear(scope, func, args, kwargs, x, weight, bias)


@rule(torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
def matmul(scope: Scope, func: Any, args: Any, kwargs: Any) -> Tensor:
    """X w."""
    x, weight = args if not kwargs else arguments("input other", args, kwargs)
    return _linear(scope, func, args, kwargs, x, weight, None)


@rule(torch.embedding)
def embedding(scope: Scope, func: Any, args: Any, kwargs: Any) -> Tensor:
    """Rows of a table, by indices from the batch."""
    names = "weight indices padding_idx scale_grad_by_freq"
    weight, index, padding, by_frequency = arguments(names, args, kwargs)
    rows, num_rows = rows_of(scope, index), len(weight)
    if by_frequency:
        raise Refusal("it scales gradients by how often rows occur in the batch")

    def of(d: Tensor, index: Tensor) -> Use:
        d, index = _flat(d), index.reshape(len(d), -1)
        if padding is not None and padding >= 0:
            d = d.masked_fill((index == padding).unsqueeze(-1), 0)

        def make(run: slice) -> Tensor:
            tables = d.new_zeros(len(d[run]), num_rows, d.shape[-1])
            return torch.stack([t.index_add_(0, i, g) for t, i, g in zip(tables, index[run], d[run], strict=True)])

        def squares() -> Tensor:
            """Sum each sample's gradients of a row, square the sums, and add the squares of all samples."""
            samples = torch.arange(len(d), device=d.device).unsqueeze(1)
            pairs, where = torch.unique(samples * num_rows + index, return_inverse=True)
            grads = d.new_zeros(len(pairs), d.shape[-1]).index_add_(0, where.flatten(), d.flatten(0, 1))
            return d.new_zeros(num_rows, d.shape[-1]).index_add_(0, pairs % num_rows, grads.square_())

        return Use(make, quick=squares)

    return _layer(scope, func(*args, **kwargs), (index, weight, None), rows, of)


@rule(torch.batch_norm)
def batch_norm(scope: Scope, func: Any, args: Any, kwargs: Any) -> Tensor:
    """Y = xhat w + b, normalised by the statistics of the batch or by the running ones.

    With those of the batch, xhat depends on the other samples too; a sample's gradient is its summand of the batch's.
    """
    names = "input weight bias running_mean running_var training momentum eps"
    x, weight, bias, mean, var, by_batch, _, eps = arguments(names, args, kwargs)
    rows = rows_of(scope, x, weight, bias)
    if rows.dim not in (0, WHOLE):
        raise Refusal("its samples do not lie along the first dimension")
    statistics = None if by_batch else (mean.clone(), (var + eps).rsqrt())  # as they are now
    output = func(*args, **kwargs)
    statistics = statistics or batch_statistics(output)
    if statistics is None:
        variance, average = torch.var_mean(x.detach(), [0, *range(2, x.ndim)], correction=0)
        statistics = average, (variance + eps).rsqrt()
    mean, factor = (t.view(-1, *[1] * (x.ndim - 2)) for t in statistics)
    return _layer(
        scope, output, (x, weight, bias), rows, lambda d, x: given(_summed(((x - mean) * factor).to(d.dtype) * d))
    )


# Small weight gradients leave a CPU's threads idle unless several are computed at once (64 -> 128 channels at 16 x 16: 4.2 ms
# for 32 samples four at a time, 8.1 ms one by one, two cores); with 256 -> 256 channels a second sample only costs cache.
FOLD_ELEMENTS = 1 << 18


@rule(torch.conv1d, torch.conv2d, torch.conv3d)
def convolution(scope: Scope, func: Any, args: Any, kwargs: Any) -> Tensor:
    """Convolutions with zero padding given as numbers."""
    names = "input weight bias stride padding dilation groups"
    x, weight, bias, stride, padding, dilation, groups = arguments(names, args, kwargs)
    shape, ndim, groups = weight.shape, weight.ndim - 2, groups or 1
    rows = rows_of(scope, x, weight, bias)
    if x.ndim != ndim + 2 or rows.dim not in (0, WHOLE) or isinstance(padding, str):
        raise Refusal("its samples do not lie along the first dimension, or its padding has a name")
    stride, padding, dilation = (
        (*value,) * (ndim // len(value))
        if isinstance(value, (list, tuple))
        else (default if value is None else value,) * ndim
        for value, default in ((stride, 1), (padding, 0), (dilation, 1))
    )

    def gradient(d: Tensor, x: Tensor, folded: int) -> Tensor:
        """Return the weight's gradients of several samples, folded into the groups of one convolution."""
        if folded > 1:
            d, x = (t.reshape(1, -1, *t.shape[2:]) for t in (d, x))
        empty = d.new_empty(1).expand(folded * shape[0], *shape[1:])
        options = stride, padding, dilation, False, [0] * ndim, folded * groups, (False, True, False)
        return torch.ops.aten.convolution_backward(d, x, empty, None, *options)[1].reshape(folded, *shape)

    def of(d: Tensor, x: Tensor) -> Use:
        if math.prod(shape[2:]) == 1 and not any(padding) and groups == 1:  # a linear map at each position
            x = x[tuple([slice(None)] * 3 + [slice(None, None, step) for step in stride])]
            return product(*(t.movedim(2, -1).flatten(1, -2) for t in (d, x)))
        step = math.ceil(FOLD_ELEMENTS / shape.numel()) if d.shape[1] == 1 else 1
        several = [slice(first, first + step) for first in range(0, len(d), step)]

        def make(run: slice) -> Tensor:
            """Return the gradients of a run, which holds samples of one row each, or a single sample."""
            return gradient(d[run].flatten(0, 1), x[run].flatten(0, 1), len(d[run]) if step > 1 else 1)

        return Use(make, several)

    return _layer(scope, func(*args, **kwargs), (x, weight, bias), rows, of)


JOINS = {torch.cat, torch.concat, torch.concatenate}
_NOT_BROADCAST = {torch.prelu, Tensor.prelu, torch.masked_fill, Tensor.masked_fill, Tensor.masked_fill_}


@rule(*POINTWISE - _NOT_BROADCAST, *JOINS)
def broadcast(scope: Scope, func: Any, args: Any, kwargs: Any) -> Tensor:
    """An elementwise function that broadcasts a parameter over the batch, or a concatenation with one, as of class tokens.

    The tap is put on the expanded parameter, whose gradient has an element for each element of the output. Autograd then sums
    this gradient as it does for its own broadcasts, with the same bits.
    """
    is_join = func in JOINS
    given = list(args[0] if is_join else args)
    tensors = [t for t in given if isinstance(t, Tensor)]
    if any(isinstance(value, Tensor) for value in kwargs.values()):
        raise Refusal("its parameter is not broadcast")
    if not is_join and len({t.dtype for t in tensors if t.is_floating_point()}) > 1:
        raise Refusal("its arguments differ in type")
    marks = marks_in(scope.batch, tensors)
    shape = marks[0][0].shape if is_join else torch.broadcast_shapes(*(t.shape for t in tensors))
    (rows,) = verdicts(func if is_join else torch.add, args, kwargs, marks, [torch.empty(shape, device="meta")])
    if not isinstance(rows, Rows) or (is_in_place(func) and args[0].shape != shape):
        raise Refusal("its arguments hold their samples differently")
    for place, value in enumerate(given):
        if (operand := scope.operand(value)) is not None:
            dim = rows.dim - len(shape) + value.ndim
            row = operand if dim < 0 or value.shape[dim] == 1 else _one_row(operand, value, dim)
            if row is None:
                raise scope.refuse(func, [operand], "the parameter has a row of its own for each sample")
            # Under ZeRO-3 the shape of a parameter that another module owns is not known before it is read.
            left = functools.partial(
                _broadcast_back, scope.batch, row, rows, value.shape if row is operand else row.shape
            )
            given[place] = tap(scope, value if is_join else value.expand(shape), rows, [row], left, [])
    output = func(given, *args[1:], **kwargs) if is_join else func(*given, **kwargs)
    if isinstance(output, Tensor):
        mark(scope.batch, output, rows)
    return output


def _one_row(operand: Operand, tensor: Tensor, dim: int) -> Operand | None:
    """Return one row of an operand whose row is the same for each sample, such as repeated class tokens; else None.

    Whether all rows depend on the parameters in the same way is decided by gradients, whatever the parameters' values: if the
    rows are weighted by random numbers whose sum is zero, their gradients have to cancel.
    """
    if operand.edge is None:
        return None
    row = Operand(tensor.narrow(dim, 0, 1), operand.bases, False)
    if tensor.stride(dim) == 0:
        return row
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(tensor.shape[dim], generator=generator, dtype=torch.float64)
    weights = (weights - weights.mean()).view(-1, *[1] * (tensor.ndim - dim - 1))
    grad = torch.randn(row.shape, generator=generator, dtype=torch.float64)
    for base in operand.bases:
        both, scale = (operand.pull(base, (grad * w).to(tensor)) for w in (weights, weights.abs()))
        if not float(both.abs().max()) <= 1e3 * torch.finfo(tensor.dtype).eps * float(scale.abs().max()):
            return None
    return row


def _broadcast_back(
    batch: Batch, operand: Operand, rows: Rows, own: torch.Size, grad: Tensor, _: tuple[Tensor, ...]
) -> list[tuple[Operand, Use]]:
    """Sum the gradient of an expanded operand to its own shape, for each sample."""
    shape = (1,) * (grad.ndim - len(own)) + tuple(own)
    g = batch.gradients(grad, rows)
    g = g if rows.dim == WHOLE else g.movedim(1, rows.dim + 1)
    return [(operand, given(g.sum_to_size(len(g), *shape).reshape(len(g), *own)))]

"""What a sample owes to a parameter, operation by operation: the operations under which `per="sample"` knows it.

Each rule runs its operation as it was called and puts a tap on the output (`uses`). Parameters meet the batch in linear maps,
convolutions, lookups, norms, and broadcasts such as position embeddings and scales. Anything else is refused by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from largebatch.moments import operations, provenance
from largebatch.moments.marks import WHOLE, Batch, Rows, mark, mark_of
from largebatch.moments.private import batch_statistics
from largebatch.moments.scope import Refusal, Scope
from largebatch.moments.uses import Given, Left, Looped, Operand, Product, Tap, Use, collectors, statistic_dtype

Rule = Callable[..., Any]

RULES: dict[Any, Rule] = {}


def rule(*functions: Any) -> Callable[[Rule], Rule]:
    """Register the decorated function, which takes (scope, func, args, kwargs), as the rule of `functions`."""

    def register(handler: Rule) -> Rule:
        RULES.update(dict.fromkeys(functions, handler))
        return handler

    return register


def rows_of(scope: Scope, tensor: Any, what: str = "its input") -> Rows:
    """Return where the samples of an operation's input lie."""
    found = mark_of(scope.batch, tensor) if isinstance(tensor, Tensor) else None
    if isinstance(found, Rows):
        return found
    raise Refusal(f"{what} does not come from the batch")


def check_constant(scope: Scope, pair: tuple[Any, Any]) -> None:
    """Raise where a weight or a bias was computed from the batch, as by a hypernetwork."""
    if any(isinstance(t, Tensor) and mark_of(scope.batch, t) is not None for t in pair):
        raise Refusal("its weight or bias comes from the batch")


def tap(
    scope: Scope, output: Tensor, rows: Rows, operands: Sequence[Operand], left: Left, saved: Sequence[Tensor]
) -> Tensor:
    """Put a tap on an operation's output.

    Args:
        scope: the forward pass.
        output: of the operation, which ran as it was called.
        rows: where the output's samples lie.
        operands: those it used.
        left: takes the gradient of the output and the saved tensors, and returns what each operand is owed.
        saved: tensors of the chosen samples.
    """
    if not output.requires_grad:
        return output
    bases = tuple(dict.fromkeys(base for operand in operands for base in operand.bases))
    samples = scope.batch.samples_of(rows)
    output = Tap.apply(left, samples, bases, output, len(saved), *[s.detach() for s in saved], *collectors(bases))
    mark(scope.batch, output, rows)
    return output


def wide(tensor: Tensor, grad: Tensor) -> Tensor:
    """Return a tensor in the type of squares, rounded as the operation took it under autocast."""
    dtype = grad.dtype
    if tensor.dtype == dtype and dtype in (torch.float32, torch.float64):
        return tensor
    return tensor.to(dtype).to(statistic_dtype(dtype))


def _flat(rows: Tensor) -> Tensor:
    """[samples, rows of each, .., features] -> [samples, positions, features]."""
    return rows if rows.ndim == 3 else rows.reshape(rows.shape[0], -1, rows.shape[-1])


def arguments(names: str, args: Any, kwargs: Any) -> list[Any]:
    """Return the arguments of a call in the order of their names, None for those that were not given."""
    given = dict(zip(names.split(), args, strict=False)) | kwargs
    return [given.get(name) for name in names.split()]


def _linear(scope: Scope, output: Tensor, x: Tensor, weight: Any, bias: Any, is_transposed: bool) -> Tensor:
    """Y = x w^T + b, or x w + b."""
    found, of_weight, of_bias = rows_of(scope, x), scope.operand(weight), scope.operand(bias)
    check_constant(scope, (weight, bias))
    is_vector = weight.ndim == 1
    if weight.ndim > 2 or found.dim == x.ndim - 1 or x.ndim < 2:
        raise Refusal("its samples, or its weight, have other dimensions than (samples, .., features)")
    if bias is not None and (is_vector or bias.shape != output.shape[-1:]):
        raise Refusal("its bias has other dimensions than (features)")
    rows = found  # those of the output, in which the last dimension alone is another
    operands = [operand for operand in (of_weight, of_bias) if operand is not None]

    def left(grad: Tensor, saved: tuple[Tensor, ...]) -> list[tuple[Operand, Use]]:
        d = wide(_flat(scope.batch.take(grad.unsqueeze(-1) if is_vector else grad, rows)), grad)
        uses: list[tuple[Operand, Use]] = []
        if of_weight is not None:
            a, b = d, wide(_flat(saved[0]), grad)
            uses.append((of_weight, Product(b, a) if is_transposed else Product(a, b)))
        if of_bias is not None:
            uses.append((of_bias, Given(d.squeeze(1) if d.shape[1] == 1 else d.sum(1))))
        return uses

    return tap(scope, output, rows, operands, left, [scope.batch.take(x, found)] if of_weight is not None else [])


@rule(F.linear)
def linear(scope: Scope, func: Any, args: Any, kwargs: Any) -> Tensor:
    """X w^T + b."""
    x, weight, bias = arguments("input weight bias", args, kwargs)
    return _linear(scope, func(*args, **kwargs), x, weight, bias, False)


@rule(torch.addmm, Tensor.addmm)
def addmm(scope: Scope, func: Any, args: Any, kwargs: Any) -> Tensor:
    """B + x w."""
    if set(kwargs) - {"input", "mat1", "mat2"}:
        raise Refusal("it has factors, alpha or beta")
    bias, x, weight = arguments("input mat1 mat2", args, kwargs)
    return _linear(scope, func(*args, **kwargs), x, weight, bias, True)


@rule(torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
def matmul(scope: Scope, func: Any, args: Any, kwargs: Any) -> Tensor:
    """X w."""
    x, weight = args if not kwargs else arguments("input other", args, kwargs)
    if scope.operand(weight) is None:
        raise Refusal("the parameter stands on the left")
    return _linear(scope, func(*args, **kwargs), x, weight, None, True)


class LookedUp(Use):
    """Rows of a table of v: d [samples, t, features], and which rows they are, [samples, t]."""

    def __init__(self, d: Tensor, index: Tensor, num_rows: int):
        self.d, self.index, self.num_rows = d, index, num_rows

    def gradient(self, number: int) -> Tensor:
        """Return a table."""
        table = self.d.new_zeros(self.num_rows, self.d.shape[-1])
        return table.index_add_(0, self.index[number], self.d[number])

    def squares(self, weight: float) -> Tensor:
        """Add what a sample owes to one row, then square, then add the samples."""
        samples = torch.arange(len(self.d), device=self.d.device).unsqueeze(1)
        pairs, where = torch.unique(samples * self.num_rows + self.index, return_inverse=True)
        grads = self.d.new_zeros(len(pairs), self.d.shape[-1]).index_add_(0, where.flatten(), self.d.flatten(0, 1))
        grads.square_().mul_(weight)
        return self.d.new_zeros(self.num_rows, self.d.shape[-1]).index_add_(0, pairs % self.num_rows, grads)


@rule(torch.embedding)
def embedding(scope: Scope, func: Any, args: Any, kwargs: Any) -> Tensor:
    """Rows of a table by numbers from the batch."""
    names = "weight indices padding_idx scale_grad_by_freq sparse"
    weight, index, padding, by_frequency, _ = arguments(names, args, kwargs)
    operand, rows = scope.operand(weight), rows_of(scope, index)
    if operand is None or by_frequency:
        raise Refusal("it scales gradients by how often rows occur in the batch")
    num_rows = len(weight)

    def left(grad: Tensor, saved: tuple[Tensor, ...]) -> list[tuple[Operand, Use]]:
        d = wide(_flat(scope.batch.take(grad, rows)), grad)
        index = saved[0].reshape(len(d), -1)
        if padding is not None and padding >= 0:
            d = d.masked_fill((index == padding).unsqueeze(-1), 0)
        return [(operand, LookedUp(d, index, num_rows))]

    return tap(scope, func(*args, **kwargs), rows, [operand], left, [scope.batch.take(index, rows)])


def _norm(
    scope: Scope,
    output: Tensor,
    x: Tensor,
    pair: tuple[Any, Any],
    normalize: Callable[[Tensor, tuple[Tensor, ...]], Tensor],
    extra: Sequence[Tensor] = (),
    is_last: bool = False,
) -> Tensor:
    """Y = xhat w + b, with xhat = normalize(rows of x, extra) and w, b for the last dimensions, or else for dimension 1."""
    rows = rows_of(scope, x)
    weight, bias = (scope.operand(value) for value in pair)
    operands = [operand for operand in (weight, bias) if operand is not None]
    check_constant(scope, pair)
    shape = operands[0].tensor.shape
    if rows.dim != WHOLE and (rows.dim >= x.ndim - len(shape) if is_last else rows.dim != 0):
        raise Refusal("its samples lie along a dimension that is normalized, or not along the first")

    def reduced(t: Tensor) -> Tensor:
        if is_last:
            return t.reshape(len(t), -1, *shape).sum(1)
        return t.reshape(len(t), -1, x.shape[1], x.shape[2:].numel()).sum((1, 3))

    def left(grad: Tensor, saved: tuple[Tensor, ...]) -> list[tuple[Operand, Use]]:
        d = wide(scope.batch.take(grad, rows), grad)
        uses: list[tuple[Operand, Use]] = []
        if weight is not None:
            hat = normalize(saved[0] if is_last else saved[0].reshape(-1, *x.shape[1:]), saved[1:])
            uses.append((weight, Given(reduced(hat.to(d.dtype).reshape(d.shape) * d))))
        if bias is not None:
            uses.append((bias, Given(reduced(d))))
        return uses

    saved = [scope.batch.take(x, rows), *extra] if weight is not None else []
    return tap(scope, output, rows, operands, left, saved)


@rule(torch.layer_norm)
def layer_norm(scope: Scope, func: Any, args: Any, kwargs: Any) -> Tensor:
    """Layer norm."""
    x, shape, weight, bias, eps = arguments("input normalized_shape weight bias eps", args, kwargs)
    eps = 1e-5 if eps is None else eps
    output = func(*args, **kwargs)
    return _norm(scope, output, x, (weight, bias), lambda x, _: F.layer_norm(x, shape, None, None, eps), is_last=True)


@rule(torch.rms_norm)
def rms_norm(scope: Scope, func: Any, args: Any, kwargs: Any) -> Tensor:
    """RMS norm."""
    x, shape, weight, eps = arguments("input normalized_shape weight eps", args, kwargs)
    output = func(*args, **kwargs)
    return _norm(scope, output, x, (weight, None), lambda x, _: F.rms_norm(x, shape, None, eps), is_last=True)


@rule(torch.group_norm)
def group_norm(scope: Scope, func: Any, args: Any, kwargs: Any) -> Tensor:
    """Group norm."""
    x, groups, weight, bias, eps = arguments("input num_groups weight bias eps", args, kwargs)
    eps = 1e-5 if eps is None else eps
    output = func(*args, **kwargs)
    return _norm(scope, output, x, (weight, bias), lambda x, _: F.group_norm(x, groups, None, None, eps))


@rule(torch.batch_norm, torch.instance_norm)
def batch_norm(scope: Scope, func: Any, args: Any, kwargs: Any) -> Tensor:
    """Batch and instance norm, by the statistics of the batch or the running ones.

    By those of the batch, xhat depends on the other samples; what a sample owes is its summand of the gradient.
    """
    names = "input weight bias running_mean running_var training momentum eps cudnn_enabled use_input_stats"
    x, weight, bias, mean, var, by_batch, _, eps, _, by_input = arguments(names, args, kwargs)
    by_batch = by_batch if by_input is None else by_input
    if func is torch.instance_norm and by_batch:
        return _norm(scope, func(*args, **kwargs), x, (weight, bias), lambda x, _: F.instance_norm(x, eps=eps))
    running = None if by_batch else (mean.clone(), (var + eps).rsqrt())  # as they are now
    output = func(*args, **kwargs)
    statistics = running or batch_statistics(output)
    if statistics is None:
        deviation, average = torch.var_mean(x.detach(), [0, *range(2, x.ndim)], correction=0)
        statistics = average, (deviation + eps).rsqrt()

    def normalize(x: Tensor, statistics: tuple[Tensor, ...]) -> Tensor:
        mean, factor = (t.view(-1, *[1] * (x.ndim - 2)) for t in statistics)
        return (x - mean) * factor

    return _norm(scope, output, x, (weight, bias), normalize, statistics)


def pointwise(scope: Scope, func: Any, args: Any, kwargs: Any) -> Tensor:
    """A function of single elements in which a parameter is broadcast over the batch.

    The tap stands on the parameter, once it is expanded: there its gradient still has an element for each of the output's.
    Autograd sums them as it does where it broadcasts by itself, and gets the same bits.
    """
    tensors = [t for t in args if isinstance(t, Tensor)]
    if func in _NOT_BROADCAST or any(isinstance(value, Tensor) for value in kwargs.values()):
        raise Refusal("its parameter is not broadcast")
    if len({t.dtype for t in tensors if t.is_floating_point()}) > 1:
        raise Refusal("its arguments differ in type")
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    marks = [(t, m) for t in tensors if (m := mark_of(scope.batch, t))]
    piece = torch.empty(shape, device="meta")
    (rows,) = provenance.verdicts(scope.batch, torch.add, args, {}, marks, [piece])
    if not isinstance(rows, Rows) or (operations.is_in_place(func) and args[0].shape != shape):
        raise Refusal("its arguments hold their samples differently")
    expanded = []
    for value in args:
        operand = scope.operand(value)
        if operand is not None:
            if rows.dim != WHOLE:
                _check_rows(operand, rows.dim - len(shape))
            left = functools.partial(_broadcast_back, scope.batch, operand, rows)
            value = tap(scope, value.expand(shape), rows, [operand], left, [])
        expanded.append(value)
    output = func(*expanded, **kwargs)
    if isinstance(output, Tensor):
        mark(scope.batch, output, rows)
    return output


_NOT_BROADCAST = {
    getattr(home, name)
    for home in (torch, Tensor)
    for name in ("prelu", "masked_fill", "masked_fill_")
    if hasattr(home, name)
}


def _broadcast_back(
    batch: Batch, operand: Operand, rows: Rows, grad: Tensor, _: tuple[Tensor, ...]
) -> list[tuple[Operand, Use]]:
    """Sum the gradient of an expanded operand to its own shape, for each sample."""
    shape = (1,) * (grad.ndim - operand.tensor.ndim) + tuple(operand.tensor.shape)
    g = batch.take(grad, rows)
    g = g.to(statistic_dtype(g.dtype))
    if rows.dim == WHOLE:
        return [(operand, Given(g.squeeze(1).sum_to_size(1, *shape).reshape(1, *operand.tensor.shape)))]
    if shape[rows.dim] > 1:  # it has a row for each of the output's
        others = shape[: rows.dim] + shape[rows.dim + 1 :]
        g = g.sum_to_size(len(g), g.shape[1], *others)
        return [(operand, _rowwise(g, operand, rows, batch, grad.ndim))]
    g = g.movedim(1, rows.dim + 1).sum_to_size(len(g), *shape)
    return [(operand, Given(g.reshape(len(g), *operand.tensor.shape)))]


def _check_rows(operand: Operand, dim: int) -> None:
    """Raise where a parameter has a row of its own for each sample: of a sample alone it would be another.

    Class tokens expanded or repeated, and lookups of positions laid out by sample, have the same row for all, whatever the
    parameter's values are: here random ones.
    """
    tensor = operand.tensor
    if -dim > tensor.ndim or tensor.shape[dim] == 1 or tensor.stride(dim) == 0:
        return
    generator = torch.Generator().manual_seed(0)
    leaves = {}
    for base in operand.bases:
        values = torch.rand(base.parameter.shape, generator=generator, dtype=torch.float64)
        leaves[id(base)] = values.to(base.parameter)
    with torch.no_grad():
        again = operand.again(leaves)
    if not torch.equal(again, again.narrow(dim, 0, 1).expand_as(again)):
        raise Refusal("the parameter has a row of its own for each sample")


def _rowwise(g: Tensor, operand: Operand, rows: Rows, batch: Batch, ndim: int) -> Use:
    """A gradient whose only rows are those of the sample: [samples, rows of each, *others]."""
    shape, dim = operand.tensor.shape, rows.dim - ndim
    numbers = batch.take(torch.arange(shape[dim], device=g.device), rows._replace(dim=0)).reshape(len(g), -1)

    def make(number: int) -> Tensor:
        whole = g.new_zeros(*[1] * (ndim - len(shape)), *shape).movedim(dim, 0)
        return whole.index_copy(0, numbers[number], g[number]).movedim(0, dim).reshape(shape)

    return Looped(make, len(g))


@rule(torch.cat, torch.concat, torch.concatenate)
def cat(scope: Scope, func: Any, args: Any, kwargs: Any) -> Tensor:
    """Tensors of the batch and parameters, such as class tokens, joined along another dimension than the samples'."""
    output = func(*args, **kwargs)
    joined = args[0] if args else kwargs["tensors"]
    marks = [(t, m) for t in joined if (m := mark_of(scope.batch, t)) is not None]
    (rows,) = provenance.verdicts(scope.batch, func, args, kwargs, marks, [output])
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))) % output.ndim
    if not isinstance(rows, Rows) or rows.dim == dim:
        raise Refusal("it joins along the samples, or tensors that hold them differently")
    found, first = [], 0
    for t in joined:
        if (operand := scope.operand(t)) is not None:
            if rows.dim != WHOLE:
                _check_rows(operand, rows.dim - output.ndim)
            found.append((operand, first, t.shape[dim]))
        first += t.shape[dim]

    def left(grad: Tensor, saved: tuple[Tensor, ...]) -> list[tuple[Operand, Use]]:
        uses: list[tuple[Operand, Use]] = []
        for operand, start, length in found:
            g = scope.batch.take(grad.narrow(dim, start, length), rows)
            g = g.to(statistic_dtype(g.dtype))
            whole = rows.dim == WHOLE
            uses.append(
                (operand, Given(g.squeeze(1)) if whole else _rowwise(g, operand, rows, scope.batch, output.ndim))
            )
        return uses

    return tap(scope, output, rows, [operand for operand, *_ in found], left, [])

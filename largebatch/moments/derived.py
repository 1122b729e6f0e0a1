"""Tensors computed from parameters alone: views, casts, position embeddings, reparametrised weights.

Where every element of the result is one element of one parameter and none appears twice, the shadow goes through the
same operation and autograd brings the squares back. Otherwise the result's per-sample gradients are pulled back to
the parameters one by one, which is exact and slow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from largebatch.moments.scope import Scope
from largebatch.moments.tap import Count, Operand

# The output's elements are the input's, each at most once.
_REARRANGING = {
    Tensor.t,
    Tensor.transpose,
    Tensor.permute,
    Tensor.view,
    Tensor.view_as,
    Tensor.reshape,
    Tensor.reshape_as,
    Tensor.flatten,
    torch.unflatten,
    Tensor.unsqueeze,
    Tensor.squeeze,
    Tensor.select,
    Tensor.narrow,
    Tensor.contiguous,
    Tensor.clone,
    Tensor.movedim,
    Tensor.swapaxes,
    Tensor.flip,
    Tensor.roll,
    Tensor.diagonal,
    Tensor.T.__get__,  # type: ignore[attr-defined]
    Tensor.mT.__get__,  # type: ignore[attr-defined]
    torch.t,
    torch.transpose,
    torch.permute,
    torch.reshape,
    torch.flatten,
    torch.unsqueeze,
    torch.squeeze,
    torch.select,
    torch.narrow,
    torch.clone,
    torch.movedim,
    torch.swapaxes,
    torch.flip,
    torch.roll,
    torch.cat,
    torch.concat,
    torch.stack,
    torch.hstack,
    torch.vstack,
}
# The same, in several pieces that share no element.
_SPLITTING = {
    Tensor.chunk,
    Tensor.split,
    Tensor.unbind,
    Tensor.tensor_split,
    Tensor.__iter__,
    torch.chunk,
    torch.split,
    torch.unbind,
    torch.tensor_split,
}
# The same, in another type; the shadow keeps its own.
_CASTING = {Tensor.to, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double, Tensor.type, Tensor.type_as}
_EXPANDING = {Tensor.expand, Tensor.expand_as, Tensor.repeat, Tensor.tile, torch.tile, torch.broadcast_to}
_EXPANDING |= {Tensor.broadcast_to}
_FILLING = {torch.zeros, torch.ones, torch.full, torch.empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full}
_INDEXING = {Tensor.__getitem__}
_SHIFTING = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__}  # by a number, as positions after a cache are


def derive(scope: Scope, func: Any, args: Any, kwargs: Any, operands: list[Operand]) -> Any:
    """Run an operation on operands and constants, and note on its results where they come from."""
    if func in _EXPANDING:
        expanded = _expand_to_samples(scope, func, args, kwargs, operands[0])
        if expanded is not None:
            return expanded
    output = func(*args, **kwargs)
    pieces = output if isinstance(output, (list, tuple)) else (output,)
    if not any(isinstance(piece, Tensor) and piece.requires_grad for piece in pieces):
        return output
    if isinstance(output, Tensor) and scope.operand(output) is not None:
        return output  # contiguous(), float() and the like may return their argument
    shadows = _shadows(scope, func, args, kwargs, operands)
    bases = tuple(dict.fromkeys(base for operand in operands for base in operand.bases))
    counts = tuple(dict.fromkeys(count for operand in operands for count in operand.counts))
    guards = tuple(dict.fromkeys(guard for operand in operands for guard in operand.guards))
    if len(pieces) > 1 and shadows is not None:
        for operand in operands:
            operand.use()
    shadow_pieces = shadows if isinstance(shadows, (list, tuple)) else (shadows,) * len(pieces)
    for piece, shadow in zip(pieces, shadow_pieces, strict=True):
        if not isinstance(piece, Tensor) or not piece.requires_grad:
            continue
        if len(pieces) > 1 and shadow is not None:
            own = Count()  # the pieces share nothing, so that each may be used once
            operand = Operand(piece, shadow, bases, (own,), (*guards, own))
        else:
            operand = Operand(piece, shadow, bases, counts, guards)
        piece._largebatch_operand = operand  # type: ignore[attr-defined]
    return output


def _shadows(scope: Scope, func: Any, args: Any, kwargs: Any, operands: list[Operand]) -> Any:
    """Return the operation applied to the operands' shadows, None if it is not a rearrangement."""
    if any(operand.shadow is None for operand in operands):
        return None
    for operand in operands:
        operand.bases[0].gather()
    if len(operands) > 1 and len({id(count) for operand in operands for count in operand.counts}) < len(operands):
        return None  # cat([w, w])
    if func in _CASTING:
        return operands[0].shadow
    if func in _INDEXING:
        if not is_slice(args[1]):
            return None
    elif func is torch.embedding:
        if not _is_distinct(scope, args[1] if len(args) > 1 else kwargs["indices"]):
            return None
    elif func not in _REARRANGING and func not in _SPLITTING:
        return None
    return func(*_swap(scope, args), **{name: _swap(scope, value) for name, value in kwargs.items()})


def _swap(scope: Scope, value: Any) -> Any:
    """Replace the operands in a (nested) argument by their shadows."""
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return type(value)([_swap(scope, item) for item in value])
    operand = scope.operand(value)
    return value if operand is None else operand.shadow


def is_slice(index: Any) -> bool:
    """Whether an index of a tensor is made of integers and slices alone."""
    items = index if isinstance(index, tuple) else (index,)
    return all(item is None or item is Ellipsis or isinstance(item, (int, slice)) for item in items)


def note_constant(scope: Scope, func: Any, args: Any, output: Any) -> None:
    """Note what a tensor that depends on neither samples nor parameters is good for as an index."""
    if not isinstance(output, Tensor) or output.requires_grad:
        return
    dim = scope.batch_dim
    if func is torch.arange:
        output._largebatch_distinct = True  # type: ignore[attr-defined]
    elif func in _FILLING or func in _EXPANDING:
        # torch.zeros(batch, positions), positions.expand(batch, -1): a row for each sample, if all the same
        if output.ndim >= 2 and output.shape[dim] == scope.num_samples:
            output._largebatch_batched = True  # type: ignore[attr-defined]
    elif (
        func in _REARRANGING
        or func in _CASTING
        or (func in _INDEXING and is_slice(args[1]))
        or (func in _SHIFTING and isinstance(args[1], int))
    ):
        source = args[0]
        if isinstance(source, Tensor) and _is_marked_distinct(scope, source):
            output._largebatch_distinct = True  # type: ignore[attr-defined]


def _is_marked_distinct(scope: Scope, indices: Tensor) -> bool:
    return hasattr(indices, "_largebatch_distinct") or id(indices) in scope.distinct


def _is_distinct(scope: Scope, indices: Tensor) -> bool:
    """Whether no index occurs twice, so that looking up rows only rearranges them."""
    if _is_marked_distinct(scope, indices):
        return True
    # Values cannot be read while tracing.
    return not torch.compiler.is_compiling() and indices.unique().numel() == indices.numel()


def _expand_to_samples(scope: Scope, func: Any, args: Any, kwargs: Any, operand: Operand) -> Tensor | None:
    """Expand an operand along the samples, as class tokens are; None if the operation does something else."""
    tensor, dim, rows = operand.tensor, scope.batch_dim, scope.num_samples
    with torch.no_grad():
        result = func(*[tensor.detach() if a is tensor else a for a in args], **kwargs)
    source = (1,) * (result.ndim - tensor.ndim) + tuple(tensor.shape)
    if rows is None or result.ndim <= dim:
        return None
    is_copying = func in (Tensor.repeat, Tensor.tile, torch.tile)
    if is_copying and source[dim] > 1 and result.shape[dim] == rows * source[dim]:  # several rows a sample
        column = derive(scope, Tensor.reshape, (tensor, *source[:dim], 1, *source[dim:]), {}, [operand])
        shape = (*result.shape[:dim], rows, source[dim], *result.shape[dim + 1 :])
        laid_out = derive(scope, Tensor.expand, (column, shape), {}, [column._largebatch_operand])
        return laid_out.flatten(dim, dim + 1)
    if result.shape[dim] != rows or source[dim] != 1:
        return None
    expanded = scope.expand(operand, dim, rows, result.ndim, func.__name__)
    if expanded.shape == result.shape:
        return expanded
    rest = [size // have for size, have in zip(result.shape, expanded.shape, strict=True)]
    return expanded.repeat(rest) if is_copying else expanded.expand(result.shape)

"""Where the samples lie once a module has permuted dimensions: time first inside a model that is batch first.

A tensor whose samples lie elsewhere than along the module's `batch_dim` is marked with that dimension. Marks begin at
functions that permute, and follow what is computed from the tensor until the samples are back in their place. Rows that
are no longer grouped by sample are marked too: no parameter may meet them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from largebatch.moments.scope import Scope

_PERMUTING = {Tensor.T.__get__, Tensor.mT.__get__}  # type: ignore[attr-defined]
for _name in ("t", "transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis"):
    _PERMUTING |= {getattr(torch, _name), getattr(Tensor, _name)}
_VIEWING = {Tensor.__getitem__, Tensor.__iter__, Tensor.expand}
for _name in ("unsqueeze", "squeeze", "select", "narrow", "unbind", "chunk", "split"):
    _VIEWING |= {getattr(torch, _name), getattr(Tensor, _name)}
_RESHAPING = {Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten, torch.unflatten}
_STACKING = {torch.stack}
_REPEATING = {Tensor.repeat, Tensor.tile, torch.tile}
_GROWING = {Tensor.__getitem__, Tensor.expand, Tensor.unsqueeze, torch.unsqueeze}
_JOINING = {torch.cat, torch.concat, torch.concatenate}
# Where marks can begin.
_BEGINNING = _PERMUTING | _STACKING | _REPEATING | _GROWING | _JOINING
UNGROUPED = -1


def dim_of(scope: Scope, tensor: Tensor) -> int:
    """Return the dimension of a batched tensor's samples."""
    return getattr(tensor, "_largebatch_dim", scope.batch_dim)


def mark(scope: Scope, tensor: Any, dim: int) -> None:
    """Note the dimension of a tensor's samples."""
    if isinstance(tensor, Tensor):
        tensor._largebatch_dim = dim  # type: ignore[attr-defined]
        scope.has_moved = True


def marked_dim(scope: Scope, args: Any, kwargs: Any) -> int | None:
    """Return where the samples lie in the first batched argument, None for where the module has them."""
    if not scope.has_moved:
        return None
    for value in (*args, *kwargs.values()):
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, Tensor) and scope.operand(item) is None and scope.is_batched(item):
                dim = dim_of(scope, item)
                return None if dim == scope.batch_dim else dim
    return None


def follow(scope: Scope, func: Any, args: Any, kwargs: Any, output: Any) -> None:
    """Mark the results of an operation on batched tensors."""
    if not (scope.has_moved or func in _BEGINNING) or scope.width is not None or scope.num_samples in (None, 1):
        return
    values: list[Any] = []
    for value in (*args, *kwargs.values()):
        values.extend(value if isinstance(value, (list, tuple)) else (value,))
    tensors = [value for value in values if isinstance(value, Tensor)]
    found = [tensor for tensor in tensors if hasattr(tensor, "_largebatch_dim")]
    pieces = output if isinstance(output, (list, tuple)) else (output,)
    if _mixes(scope, func, args, kwargs, tensors):
        mark(scope, output, UNGROUPED)
        return
    if not found and func in _PERMUTING and _stays(tensors[0], pieces[0], scope.batch_dim):
        return
    if not found and (func in _PERMUTING or func in _STACKING or func in _REPEATING or _may_begin(func, args, pieces)):
        found = tensors[:1]
    if not found:
        return
    source = next((tensor for tensor in found if tensor.requires_grad), found[0])
    dim = dim_of(scope, source)
    for piece in pieces:
        if not isinstance(piece, Tensor) or piece is source:
            continue
        if any(t.requires_grad and t.shape == piece.shape and not hasattr(t, "_largebatch_dim") for t in tensors):
            continue
        new = UNGROUPED if dim == UNGROUPED else _new_dim(scope, func, args, kwargs, source, dim, piece)
        if new is not None and new != scope.batch_dim:
            mark(scope, piece, new)


def _stays(source: Tensor, piece: Tensor, dim: int) -> bool:
    """Whether a permutation leaves a dimension where it is, as far as its stride and size tell at once."""
    if source.ndim <= dim or piece.ndim <= dim or source.stride(dim) == 0:
        return False
    return source.stride(dim) == piece.stride(dim) and source.shape[dim] == piece.shape[dim]


def _may_begin(func: Any, args: Any, pieces: Any) -> bool:
    """Whether a view has more dimensions than its source, or rows were picked by their numbers."""
    return func in _GROWING and (pieces[0].ndim > args[0].ndim or _picks_rows(func, args))


def _mixes(scope: Scope, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> bool:
    """Whether whole batches are joined along the samples, or rows picked by a mask, as many as there are of each sample."""
    if func is Tensor.__getitem__:
        first = args[1][0] if isinstance(args[1], tuple) and args[1] else args[1]
        is_mask = isinstance(first, Tensor) and first.dtype == torch.bool
        return is_mask and args[0].requires_grad and dim_of(scope, args[0]) == 0
    batched = [tensor for tensor in tensors if tensor.requires_grad]
    if func not in _JOINING or len(batched) < 2:
        return False
    along, dim = kwargs.get("dim", args[1] if len(args) > 1 else 0), dim_of(scope, batched[0])
    is_along = along in (dim, dim - batched[0].ndim)
    return is_along and sum(t.ndim > dim and t.shape[dim] == scope.num_samples for t in batched) > 1


def _picks_rows(func: Any, args: Any) -> bool:
    if func is not Tensor.__getitem__ or torch.compiler.is_compiling() or not args[0].requires_grad:
        return False
    return isinstance(args[1], Tensor) and args[1].ndim == 1 and args[1].dtype == torch.long


def _new_dim(scope: Scope, func: Any, args: Any, kwargs: Any, source: Tensor, dim: int, piece: Tensor) -> int | None:
    """Return where the samples of `source` lie in a result, None if that cannot be told."""
    assert scope.num_samples is not None
    if _picks_rows(func, args):
        return dim if dim else _in_picked_rows(scope.num_samples, source, args[1])
    if func in _REPEATING:
        aligned = dim + piece.ndim - source.ndim
        return aligned if piece.shape[aligned] == source.shape[dim] else UNGROUPED
    if func in _PERMUTING or func in _VIEWING:
        new = _through_view(func, args, kwargs, source, dim)
        return UNGROUPED if new is None and dim != scope.batch_dim else new
    if func in _STACKING:
        along = kwargs.get("dim", args[1] if len(args) > 1 else 0) % piece.ndim
        return dim + (along <= dim)
    if func in _RESHAPING:
        before = source.shape[:dim].numel()
        for candidate in range(piece.ndim):
            if piece.shape[:candidate].numel() == before and piece.shape[candidate] % scope.num_samples == 0:
                return candidate
        return UNGROUPED
    if func is torch.einsum:
        return None if "..." in args[0] or "->" not in args[0] else _in_einsum(args, source, dim)
    if piece.ndim < source.ndim:
        along = kwargs.get("dim", args[1] if len(args) > 1 else None)
        reduced = {d % source.ndim for d in (along if isinstance(along, (list, tuple)) else (along,)) if type(d) is int}
        return None if dim in reduced or not reduced else dim - sum(d < dim for d in reduced)
    aligned = dim + piece.ndim - source.ndim
    for candidate in (aligned, dim):  # broadcasting aligns last dimensions, a lookup keeps the first
        if candidate < piece.ndim and piece.shape[candidate] == source.shape[dim]:
            return candidate
    return None


def _in_picked_rows(num_samples: int, source: Tensor, rows: Tensor) -> int | None:
    """Return 0 if the rows picked are as many for each sample, sample by sample, or are a sample each."""
    if len(source) % num_samples or len(rows) % num_samples:
        return None  # of which the rules complain
    samples = (rows % len(source)) // (len(source) // num_samples)
    each = len(rows) // num_samples
    in_order = torch.arange(num_samples, device=rows.device).repeat_interleave(each)
    return 0 if len(source) == len(rows) == num_samples or torch.equal(samples, in_order) else UNGROUPED


def _through_view(func: Any, args: Any, kwargs: Any, source: Tensor, dim: int) -> int | None:
    """Run the function on a tensor without data in which the samples' dimension alone has a stride; None for no view."""
    strides = [int(d == dim) for d in range(source.ndim)]
    probe = torch.empty_strided(source.shape, strides, device="meta")
    try:
        result = func(*[probe if a is source else a for a in args], **kwargs)
    except (RuntimeError, NotImplementedError):  # an index of tensors makes a copy, which needs the data
        return None
    result = next(iter(result)) if not isinstance(result, Tensor) else result
    found = [d for d, stride in enumerate(result.stride()) if stride and result.shape[d] > 1]
    return found[0] if len(found) == 1 and result.shape[found[0]] == source.shape[dim] else None


def _in_einsum(args: Any, source: Tensor, dim: int) -> int | None:
    left, right = args[0].replace(" ", "").split("->")
    factors = args[1] if isinstance(args[1], (list, tuple)) else args[1:]
    letters = next(names for names, factor in zip(left.split(","), factors, strict=True) if factor is source)
    return right.index(letters[dim]) if letters[dim] in right else None

"""Which rows of a tensor belong to which sample, followed through a forward pass from the batch itself.

Every tensor computed from the batch carries a mark (`marks`). Only the functions listed in `operations` hand `Rows` on;
whatever any other makes of the batch is `Lost`, and no parameter may meet it. So a dimension is never taken for the samples'
because its size happens to be theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from largebatch.moments.marks import WHOLE, Batch, Lost, Rows, mark, mark_of, tensors_in
from largebatch.moments.operations import ADDING, CREATING, FILLING, FOLLOW, LIKE, POINTWISE, RESIZING, SCALING, Call


def follow(batch: Batch, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], output: Any) -> None:
    """Mark the results of a function that was called on tensors of the batch; `tensors` are its arguments'."""
    pieces = output if isinstance(output, (list, tuple)) else (output,)
    marks = [(t, m) for t in tensors if (m := mark_of(batch, t)) is not None]
    if not marks or not any(isinstance(piece, Tensor) for piece in pieces):
        return
    if func in CREATING:
        return
    if len(tensors) == 1 and args and tensors[0] is args[0] and len(pieces) == 1:
        rest = repr((args[1:], kwargs)) if kwargs or len(args) > 1 else ""
        (source, found), (piece,) = marks[0], pieces
        key = (func, source.shape, source.dtype, found, rest, piece.shape, piece.dtype, batch.num_samples)
        if (known := _known.get(key)) is None:
            if len(_known) > 10_000:
                _known.clear()
            (known,) = verdicts(batch, func, args, kwargs, marks, pieces)
            _known[key] = known
        mark(batch, pieces[0], known)
        return
    for piece, found in zip(pieces, verdicts(batch, func, args, kwargs, marks, pieces), strict=True):
        if isinstance(piece, Tensor):
            mark(batch, piece, found)


# What was found for one tensor of such a shape and marks in such a call: the same every time.
_known: dict[Any, Rows | Lost] = {}


def verdicts(
    batch: Batch, func: Any, args: Any, kwargs: Any, marks: Sequence[tuple[Tensor, Rows | Lost]], pieces: Any
) -> list[Rows | Lost]:
    """Return where the samples lie in each result of a function; `marks` are its tensors that have any."""
    if func in LIKE:
        marks = [(t, m) for t, m in marks if args and t is args[0]]
    # Whole numbers that were mixed, such as masks, choose what is computed, and take no sample's gradient to another.
    live = [(t, m) for t, m in marks if isinstance(m, Rows) or t.is_floating_point() or t.is_complex()] or list(marks)
    name = getattr(func, "__name__", str(func))
    lost = [m for _, m in live if isinstance(m, Lost)]
    if not live:
        return [Lost(name)] * len(pieces)
    if lost:
        is_sum = len(lost) == len(live) and all(m.is_sum for m in lost)
        is_sum = is_sum and (func in ADDING or (func in SCALING and len(live) == 1))
        mixed = lost[0] if is_sum or not lost[0].is_sum else Lost(name)
        return [mixed] * len(pieces)
    if batch.num_samples == 1:
        return [Rows(WHOLE, 1, 0, 1)] * len(pieces)
    if func not in FOLLOW:
        return [Lost(name)] * len(pieces)
    call = Call(func, args, kwargs, live)  # type: ignore[arg-type]
    return [_one(call, name, piece, number) for number, piece in enumerate(pieces)]


def _one(call: Call, name: str, piece: Any, number: int) -> Rows | Lost:
    found: Rows | None = None
    for tensor, rows in call.live if isinstance(piece, Tensor) else ():
        new = FOLLOW[call.func](call, piece, number, tensor, rows)
        is_other = found is not None and new != found
        if not isinstance(new, Rows) or is_other or not 0 <= new.dim < piece.ndim or not new.length:
            return Lost(name, new is True)
        size = piece.shape[new.dim]
        if size % (new.outer * new.length) or (call.func not in RESIZING and size != tensor.shape[rows.dim]):
            return Lost(name)
        found = new
    return found or Lost(name)


def assign(batch: Batch, func: Any, args: Any, kwargs: Any) -> Rows | Lost | None:
    """Return where the samples of a tensor lie once an operation in place has written the batch into it, None for a constant.

    Raises:
        ValueError: if the rows of one sample are written over those of another: other views of the tensor would go on under
            marks that are no longer true.
    """
    target, values = args[0], args[1:] if func is not Tensor.__setitem__ else args[2:]
    marks = [(t, m) for t in tensors_in(values, kwargs) if (m := mark_of(batch, t)) is not None]
    before = mark_of(batch, target)
    if func in FILLING:
        return before if target.requires_grad or target._is_view() else None
    if not marks and (before is None or func in POINTWISE or func is Tensor.__setitem__):
        return before
    if func not in POINTWISE and func is not Tensor.__setitem__:
        raise ValueError(f"{func.__name__} changes a tensor of the batch in place")
    if before is None and not target.requires_grad:
        batch.written.append(target.untyped_storage())  # whatever else looks at it holds the batch now
    if batch.num_samples == 1:
        return Rows(WHOLE, 1, 0, 1)
    part = target
    where = before
    if func is Tensor.__setitem__:
        part = target.detach()[args[1]]
        if isinstance(before, Rows):
            (where,) = verdicts(batch, Tensor.__getitem__, args[:2], {}, [(target, before)], [part])
    (after,) = verdicts(batch, torch.add, values, {}, marks, [part])
    if before is None:
        index = (args[1] if isinstance(args[1], tuple) else (args[1],)) if func is Tensor.__setitem__ else ()
        is_sliced = all(item is Ellipsis or isinstance(item, slice) for item in index) and part.ndim == target.ndim
        if isinstance(after, Rows) and is_sliced and part.shape[after.dim] == target.shape[after.dim]:
            return after
        return Lost(func.__name__)
    if isinstance(where, Lost) or after != where:
        raise ValueError(f"{func.__name__} writes rows of other samples into a tensor of the batch")
    return before

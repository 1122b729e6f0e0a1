"""Which rows of a tensor belong to which sample, followed through a forward pass from the batch itself.

Every tensor computed from the batch carries a mark: `Rows` says where its samples lie, and `Lost` says that its rows can no
longer be assigned to single samples. Only the functions listed in `operations` pass `Rows` on; the result of any other function
is `Lost`, and must not be combined with a parameter. So a dimension is never taken for that of the samples because of its size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from largebatch.errors import UserError
from largebatch.moments import operations
from largebatch.moments.operations import WHOLE, Lost, Rows, lies
from largebatch.moments.private import identity_edge
from largebatch.moments.uses import statistic_dtype


class Batch:
    """The samples of one forward pass.

    Args:
        num_samples: n.
        chosen: the samples to square, ascending; None for all.
        weight: weight of each chosen sample's square in the sum, which stands for all n samples.
    """

    def __init__(self, num_samples: int, chosen: list[int] | None = None, weight: float = 1.0):
        self.num_samples, self.chosen, self.weight = num_samples, chosen, weight
        # An engine may pass tensors through identity functions of its own.
        self.under_engine = dist.is_available() and dist.is_initialized()
        self._places: dict[Any, Any] = {}

    def samples_of(self, rows: Rows) -> list[int]:
        """Return the chosen samples among those of a tensor."""
        run = range(rows.first, rows.first + rows.length)
        return list(run) if self.chosen is None else [sample for sample in self.chosen if sample in run]

    def take(self, tensor: Tensor, rows: Rows) -> Tensor:
        """Return the rows of the chosen samples, [samples, rows of each, *other dimensions]."""
        grouped = by_sample(tensor, rows)
        if self.chosen is None:
            return grouped
        key = (rows.first, rows.length, tensor.device)
        if key not in self._places:
            places = [sample - rows.first for sample in self.samples_of(rows)]
            steps = {b - a for a, b in itertools.pairwise(places)} or {1}
            if places and len(steps) == 1:  # without a copy
                self._places[key] = slice(places[0], places[-1] + 1, steps.pop())
            else:
                self._places[key] = torch.tensor(places, dtype=torch.long, device=tensor.device)
        return grouped[self._places[key]]

    def gradients(self, grad: Tensor, rows: Rows) -> Tensor:
        """Return the chosen samples' rows of an output's gradient in the type of squares, times the root of the weight."""
        taken = self.take(grad, rows)
        taken = taken.to(statistic_dtype(taken.dtype))
        return taken if self.weight == 1 else taken * math.sqrt(self.weight)


def by_sample(tensor: Tensor, rows: Rows) -> Tensor:
    """Return [samples, rows of each, *other dimensions]; a single sample's rows are the tensor's first dimension."""
    if rows.dim == WHOLE:
        return tensor[None]
    front = tensor if rows.dim == 0 else tensor.movedim(rows.dim, 0)
    if rows.outer == 1 and rows.length == len(front):
        return front.unsqueeze(1)
    return front.unflatten(0, (rows.outer, rows.length, -1)).movedim(1, 0).flatten(1, 2)


def mark(batch: Batch, tensor: Tensor, found: Rows | Lost) -> None:
    """Record where the samples of a tensor lie."""
    tensor._largebatch_mark = (batch, found, tensor.requires_grad)  # type: ignore[attr-defined]
    if batch.under_engine and tensor.grad_fn is not None:
        tensor.grad_fn.metadata["largebatch", tensor.output_nr] = (batch, found)  # type: ignore[index]


def mark_of(batch: Batch, tensor: Tensor) -> Rows | Lost | None:
    """Return where the samples of a tensor lie, or None for constants, parameters and tensors computed only from these."""
    owner, found, had_grad = getattr(tensor, "_largebatch_mark", (None, None, False))
    if owner is batch and had_grad == tensor.requires_grad:
        return found
    if not tensor.requires_grad or getattr(tensor, "_largebatch_operand", (None,))[0] is batch:
        return None
    owner, found = passed_on(tensor)
    return found if owner is batch else _unseen(tensor)


def passed_on(tensor: Tensor) -> tuple[Batch, Rows | Lost] | tuple[None, None]:
    """Return the batch and the mark of a tensor, which an engine's identity functions may have passed on; or two None."""
    owner, found, had_grad = getattr(tensor, "_largebatch_mark", (None, None, False))
    if owner is not None and had_grad == tensor.requires_grad:
        return owner, found
    edge = identity_edge(tensor)
    return (None, None) if edge is None else edge[0].metadata.get(("largebatch", edge[1]), (None, None))


def _unseen(tensor: Tensor) -> Lost:
    """Return the mark of a tensor that requires a gradient and was not computed by an intercepted operation."""
    if tensor.grad_fn is None:
        return Lost(
            "a parameter that was added or unfrozen since track() (call it again), or a tensor that requires a gradient"
        )
    name = type(tensor.grad_fn).__name__
    if name == "CheckpointFunctionBackward":
        return Lost("re-entrant activation checkpointing (call it with use_reentrant=False)")
    return Lost(f"{name}, a function that PyTorch does not show")


def tensors_in(args: Any, kwargs: Any) -> list[Tensor]:
    """Return the tensors among arguments, and in lists of them."""
    found = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend([item for item in value if isinstance(item, Tensor)])
    return found


Marks = Sequence[tuple[Tensor, "Rows | Lost"]]


def marks_in(batch: Batch, tensors: list[Tensor]) -> list[tuple[Tensor, Rows | Lost]]:
    """Return the tensors that come from the batch, with their marks."""
    return [(t, m) for t in tensors if (m := mark_of(batch, t)) is not None]


def live_in(marks: Marks) -> Marks:
    """Return the marks without those of mixed integers, such as masks, which carry no sample's gradient to another."""
    return [(t, m) for t, m in marks if isinstance(m, Rows) or t.is_floating_point() or t.is_complex()] or marks


def follow(batch: Batch, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], output: Any) -> None:
    """Mark the results of a function that was called on tensors of the batch; `tensors` are all tensors among its arguments."""
    marks = marks_in(batch, tensors)
    if not marks or func in operations.CREATING:
        return
    pieces = output if isinstance(output, (list, tuple)) else (output,)
    if len(tensors) == 1 and args and tensors[0] is args[0] and isinstance(output, Tensor):
        rest = repr((args[1:], kwargs)) if kwargs or len(args) > 1 else ""
        key = (func, tensors[0].shape, tensors[0].dtype, marks[0][1], rest, output.shape, output.dtype)
        if (known := _known.get(key)) is None:
            if len(_known) > 10_000:
                _known.clear()
            (known,) = verdicts(func, args, kwargs, marks, pieces)
            _known[key] = known
        mark(batch, output, known)
        return
    for piece, found in zip(pieces, verdicts(func, args, kwargs, marks, pieces), strict=True):
        if isinstance(piece, Tensor):
            mark(batch, piece, found)


# The marks of results by the call, shape, type and mark of a single tensor, which determine them.
_known: dict[Any, Any] = {}


def verdicts(func: Any, args: Any, kwargs: Any, marks: Marks, pieces: Any) -> list[Rows | Lost]:
    """Return where the samples lie in each result of a function; `marks` are its tensors of the batch, with their marks."""
    live, name = live_in(marks), getattr(func, "__name__", str(func))
    lost = [m for _, m in live if isinstance(m, Lost)]
    if lost:
        is_sum = len(lost) == len(live) and all(m.is_sum for m in lost)
        is_sum = is_sum and (func in operations.ADDING or (func in operations.SCALING and len(live) == 1))
        mixed = lost[0] if is_sum or not lost[0].is_sum else Lost(name)
        return [mixed] * len(pieces)
    if not live or (func not in operations.FOLLOW and live[0][1][0] != WHOLE):
        return [Lost(name)] * len(pieces)
    if live[0][1].dim == WHOLE:  # type: ignore[union-attr]
        return [live[0][1]] * len(pieces)
    return [lies(func, args, kwargs, live, piece, number) for number, piece in enumerate(pieces)]  # type: ignore[arg-type]


def check_in_place(batch: Batch, func: Any, args: Any, kwargs: Any) -> Rows | Lost | None:
    """Return the mark that a tensor keeps while an operation in place changes it, None for a constant.

    Raises:
        UserError: if the batch is written into a constant, or rows of one sample over those of another: other views of the
            tensor would keep marks that no longer hold.
    """
    if not isinstance(args[0], Tensor):
        return None
    target, before = args[0], mark_of(batch, args[0])
    values = marks_in(batch, tensors_in(args[1:], kwargs))
    if before is None and not values:
        return None
    if isinstance(before, Rows) and func in operations.POINTWISE:
        (after,) = verdicts(torch.add, (target,), {}, [(target, before), *values], [target])
        if after == before:
            return before
    raise UserError(
        f"track: {func.__name__} writes rows of the batch in place where they are not followed; use an operation out of place"
    )

"""Which rows of a tensor belong to which sample: the mark that a tensor carries.

`Rows` is the dimension along which its samples lie, `Lost` says that a row can no longer be given to one sample.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from largebatch.moments.private import identity_edge, metadata_of


class Batch:
    """The samples of one forward pass.

    Args:
        num_samples: n.
        chosen: the samples to square, ascending; None for all.
        weight: of each of their squares in the sum that stands for all n.
    """

    def __init__(self, num_samples: int, chosen: list[int] | None = None, weight: float = 1.0):
        self.num_samples = num_samples
        self.chosen = chosen
        self.weight = weight
        self.parameters: set[int] = set()  # ids of the tracked ones, which hold no samples
        self.written: list[torch.UntypedStorage] = []  # of constants into which the batch was written
        self.under_engine = (
            dist.is_available() and dist.is_initialized()
        )  # which may pass tensors on by identities of its own
        self._indices: dict[tuple[int, int, torch.device], Tensor | slice] = {}
        self._chosen: dict[tuple[int, int], list[int]] = {}

    def samples_of(self, rows: Rows) -> list[int]:
        """Return the chosen samples among those of a tensor."""
        key = (rows.first, rows.length)
        if key not in self._chosen:
            run = range(rows.first, rows.first + rows.length)
            self._chosen[key] = (
                list(run) if self.chosen is None else [sample for sample in self.chosen if sample in run]
            )
        return self._chosen[key]

    def take(self, tensor: Tensor, rows: Rows) -> Tensor:
        """Return the rows of the chosen samples, [samples, rows of each, *other dimensions]."""
        if self.chosen is None or rows.dim == WHOLE:
            return by_sample(tensor, rows)
        key = (rows.first, rows.length, tensor.device)
        if key not in self._indices:
            places = [sample - rows.first for sample in self.samples_of(rows)]
            steps = {b - a for a, b in itertools.pairwise(places)} or {1}
            if places and len(steps) == 1:  # without a copy
                self._indices[key] = slice(places[0], places[-1] + 1, steps.pop())
            else:
                self._indices[key] = torch.tensor(places, dtype=torch.long, device=tensor.device)
        if rows.dim == 0 and rows.outer == 1 and rows.length == tensor.shape[0]:
            return tensor[self._indices[key]].unsqueeze(1)
        return by_sample(tensor, rows)[self._indices[key]]


class Rows(NamedTuple):
    """Samples `first` to `first + length` along `dim`, whose size is outer * length * (rows of a sample).

    `outer` is 1 but where (time, batch) were flattened into one dimension; `dim` is WHOLE where the batch is a single sample.
    """

    dim: int
    outer: int
    first: int
    length: int


class Lost(NamedTuple):
    """No dimension of samples; `by` names the function that mixed or moved them, `is_sum` whether it summed over them."""

    by: str
    is_sum: bool = False


WHOLE = -1


def mark(batch: Batch, tensor: Tensor, found: Rows | Lost) -> None:
    """Note where the samples of a tensor lie."""
    tensor._largebatch_mark = (batch, found, tensor.requires_grad)  # type: ignore[attr-defined]
    if batch.under_engine and tensor.grad_fn is not None:
        metadata_of(tensor.grad_fn)["largebatch", tensor.output_nr] = (batch, found)


def mark_of(batch: Batch, tensor: Tensor) -> Rows | Lost | None:
    """Return where the samples of a tensor lie, None for a constant, a parameter and what is computed from these."""
    owner, found, had_grad = getattr(tensor, "_largebatch_mark", (None, None, False))
    if owner is batch and had_grad == tensor.requires_grad:
        return found
    if id(tensor) in batch.parameters or getattr(tensor, "_largebatch_operand", (None,))[0] is batch:
        return None
    if not tensor.requires_grad:
        if batch.written and any(tensor.untyped_storage().data_ptr() == s.data_ptr() for s in batch.written):
            return Lost("a write in place into a tensor that it looks at")
        return None
    owner, found = passed_on(tensor)
    return found if owner is batch else _unseen(tensor)


def passed_on(tensor: Tensor) -> tuple[Batch, Rows | Lost] | tuple[None, None]:
    """Return the batch and the mark of a tensor that an engine passed on as it is."""
    owner, found, had_grad = getattr(tensor, "_largebatch_mark", (None, None, False))
    if owner is not None and had_grad == tensor.requires_grad:
        return owner, found
    edge = identity_edge(tensor)
    return (None, None) if edge is None else metadata_of(edge[0]).get(("largebatch", edge[1]), (None, None))


def _unseen(tensor: Tensor) -> Lost:
    """Return what is said of a tensor with a gradient that no operation in sight has made."""
    if tensor.grad_fn is None:
        return Lost(
            "a parameter that was added or unfrozen since track() (call it again), or a tensor that requires a gradient"
        )
    name = type(tensor.grad_fn).__name__
    if name == "CheckpointFunctionBackward":
        return Lost("re-entrant activation checkpointing (call it with use_reentrant=False)")
    return Lost(f"{name}, a function that PyTorch does not show")


def by_sample(tensor: Tensor, rows: Rows) -> Tensor:
    """Return [samples, rows of each, *other dimensions]."""
    if rows.dim == WHOLE:
        return tensor[None, None]
    front = tensor.movedim(rows.dim, 0)
    if rows.outer * rows.length != len(front) or rows.outer > 1:
        front = front.unflatten(0, (rows.outer, rows.length, -1)).movedim(1, 0).flatten(1, 2)
    else:
        front = front.unsqueeze(1)
    return front


def tensors_in(args: Any, kwargs: Any) -> list[Tensor]:
    """Return the tensors among arguments, and in lists of them."""
    found = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend([item for item in value if isinstance(item, Tensor)])
    return found

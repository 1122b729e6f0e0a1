"""Operations and modules without a rule of their own, which run again in the backward pass for the chosen samples.

An operation through which samples are followed is differentiated for several samples at once by torch.vmap. A module that the
user named in ``fallback`` runs one sample at a time. This is exact if samples do not interact and no random numbers are drawn;
to check it, each sample's output is compared with its rows in the output of the batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten

from largebatch.errors import UserError
from largebatch.moments.operations import WHOLE, Rows
from largebatch.moments.private import with_parameters
from largebatch.moments.rules import tap, wide
from largebatch.moments.samples import by_sample, mark_of, verdicts
from largebatch.moments.scope import Refusal, Scope, notes, state
from largebatch.moments.uses import Operand, Use, own_graph, runs, statistic_dtype

Values = Sequence[Tensor]


class Again:
    """A call that can be made again for the chosen samples.

    Args:
        scope: the forward pass.
        name: name of the operation or module, for messages.
        call: takes the values of the operands and the arguments' leaves, and returns the leaves of the output.
        operands: the parameters that the call uses, and tensors computed from parameters.
        leaves: the flattened arguments, with None in place of operands.
        is_module: whether to run the call for one sample at a time, and to compare its output with that for the batch.

    Raises:
        Refusal: if the arguments do not hold the same samples.
    """

    def __init__(
        self,
        scope: Scope,
        name: str,
        call: Callable[[Values, list[Any]], list[Any]],
        operands: Sequence[Operand],
        leaves: list[Any],
        is_module: bool = False,
    ):
        self.scope, self.name, self.call, self.operands, self.is_module = scope, name, call, operands, is_module
        self.leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.tensors = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        marks = {i: found for i, leaf in self.tensors.items() if (found := mark_of(scope.batch, leaf)) is not None}
        self.rows = {i: found for i, found in marks.items() if isinstance(found, Rows)}
        if len(self.rows) < len(marks) or len({rows[2:] for rows in self.rows.values()}) != 1:
            raise Refusal("its arguments do not hold the same samples, or hold them mixed")
        for i, rows in self.rows.items():
            self.tensors[i] = scope.batch.take(self.tensors[i], rows)

    def outputs(self, values: Values, tensors: Sequence[Tensor], parts: Sequence[Tensor]) -> list[Any]:
        """Return the leaves of the output, given one sample's part of each argument that holds samples."""
        leaves = list(self.leaves)
        for i, tensor in zip(self.tensors, tensors, strict=True):
            leaves[i] = tensor
        for (i, rows), part in zip(self.rows.items(), parts, strict=True):
            leaves[i] = part.movedim(0, max(0, rows.dim))
        return self.call(values, leaves)

    def tapped(self, output: Tensor, rows: Rows, number: int = 0) -> Tensor:
        """Put a tap on one leaf of the output."""
        # A copy: a later operation may change the output in place, and autograd refuses saved tensors that were changed.
        expected = [self.scope.batch.take(output.detach(), rows).clone()] if self.is_module else []

        def left(grad: Tensor, saved: tuple[Tensor, ...]) -> list[tuple[Operand, Use]]:
            d = self.scope.batch.gradients(grad, rows)
            values = [operand.value() for operand in self.operands]
            if not self.is_module:
                values, saved = [wide(value, grad) for value in values], tuple(wide(tensor, grad) for tensor in saved)
            given = [saved[place].contiguous() for place, i in enumerate(self.tensors) if i in self.rows]

            def one(values: Values, parts: Sequence[Tensor]) -> Tensor:
                tensors = saved[: len(self.tensors)]
                return self.outputs(values, tensors, parts)[number].movedim(max(0, rows.dim), 0)

            @functools.lru_cache(1)
            def made(first: int, last: int) -> tuple[Tensor, ...]:
                grads = self._gradients(one, values, d[first:last], [tensor[first:last] for tensor in given])
                if self.is_module and not _agree(grads.pop(), saved[-1][first:last]):
                    raise UserError(
                        f"track: {self.name} has another output for a single sample than within the batch: its samples "
                        "interact, or it draws random numbers; per='micro_batch' works with any model"
                    )
                return tuple(grads)

            def use(place: int) -> Use:
                return Use(lambda run: made(run.start, run.stop)[place], several)

            several = runs(len(d), max(value.numel() for value in values), grad.device)
            if self.is_module:
                several = [slice(index, index + 1) for index in range(len(d))]
            return [(operand, use(place)) for place, operand in enumerate(self.operands)]

        return tap(self.scope, output, rows, self.operands, left, [*self.tensors.values(), *expected])

    def _gradients(self, one: Callable[..., Tensor], values: Values, d: Tensor, parts: list[Tensor]) -> list[Tensor]:
        """Return a run of samples' gradients, [samples, *shape] for each operand; for a module followed by its output."""
        copies = tuple(value.detach().expand(len(d), *value.shape).requires_grad_() for value in values)
        try:
            with torch.enable_grad(), own_graph(), sdpa_kernel(SDPBackend.MATH):  # others have none for masks
                if self.is_module:
                    result = one([copy[0] for copy in copies], [part[0] for part in parts])[None]
                else:
                    result = torch.vmap(one)(copies, tuple(parts))
                if result.shape != d.shape:
                    raise RuntimeError("its output for a single sample has another shape")
                grads = torch.autograd.grad(result, copies, d.to(result.dtype), materialize_grads=True)
        except UserError:
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            raise UserError(
                f"track: {self.name} with parameter '{self.operands[0].bases[0].name}' cannot be taken for single samples: "
                f"{str(error).partition(chr(10))[0]}; per='micro_batch' works with any model"
            ) from error
        return [*(g.to(statistic_dtype(g.dtype)) for g in grads), *([result.detach()] if self.is_module else [])]


def derivative(scope: Scope, func: Any, args: Any, kwargs: Any) -> Tensor:
    """Apply PyTorch's own derivative to an operation that has no rule, but through which samples are followed."""
    output = func(*args, **kwargs)
    leaves, spec = tree_flatten((args, kwargs))
    operands = {i: operand for i, leaf in enumerate(leaves) if (operand := scope.operand(leaf)) is not None}

    def call(values: Values, leaves: list[Any]) -> list[Any]:
        for i, value in zip(operands, values, strict=True):
            leaves[i] = value
        args, kwargs = tree_unflatten(leaves, spec)
        return [func(*args, **kwargs)]

    others = [None if i in operands else leaf for i, leaf in enumerate(leaves)]
    again = Again(scope, getattr(func, "__name__", str(func)), call, list(operands.values()), others)
    marks = [(leaves[i], rows) for i, rows in again.rows.items()]
    (rows,) = verdicts(func, args, kwargs, marks, [output]) if isinstance(output, Tensor) else (None,)
    if not isinstance(rows, Rows):
        raise Refusal("there is no rule for it")
    return again.tapped(output, rows)


def run_module(scope: Scope, module: nn.Module, original: Any, args: Any, kwargs: Any) -> Any:
    """Run a module as one operation on its parameters and arguments.

    Raises:
        Refusal: if its arguments do not hold the samples, or if an output's shape does not show where its samples lie.
    """
    # Read by name, by which ZeRO-3 gathers them.
    named = {name: module.get_parameter(name) for name, _ in module.named_parameters()}
    operands = {name: operand for name, p in named.items() if (operand := scope.operand(p)) is not None}
    fixed: dict[str, Tensor] = {name: p for name, p in named.items() if not p.requires_grad}
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    leaves, spec = tree_flatten((args, kwargs))

    def call(values: Values, leaves: list[Any]) -> list[Any]:
        args, kwargs = tree_unflatten(leaves, spec)
        tensors = fixed | {name: buffer.clone() for name, buffer in buffers.items()}
        tensors |= dict(zip(operands, values, strict=True))
        devices = {value.device for value in values if value.is_cuda}
        with _alone(scope, set()), torch.random.fork_rng(devices), with_parameters(module, tensors):
            return tree_flatten(original(*args, **kwargs))[0]

    with _alone(scope, {id(named[name]) for name in (*fixed, *operands)}):
        output = original(*args, **kwargs)
    if any(scope.operand(leaf) is not None for leaf in leaves):
        raise Refusal("a parameter, or a tensor computed from parameters, is among its arguments")
    again = Again(scope, f"module '{notes(module).path}'", call, list(operands.values()), leaves, is_module=True)
    try:
        with torch.no_grad():
            values, parts = (
                [operand.value() for operand in operands.values()],
                [by_sample(leaves[i], rows)[0] for i, rows in again.rows.items()],
            )
            single = again.outputs(values, list(again.tensors.values()), parts)
    except UserError:
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        raise Refusal(f"it does not run on a single sample: {str(error).partition(chr(10))[0]}") from error
    results, spec_of_results = tree_flatten(output)
    for number, result in enumerate(results):
        if isinstance(result, Tensor) and result.requires_grad:
            rows = _rows_like(result, single[number], next(iter(again.rows.values())))
            results[number] = again.tapped(result, rows, number)
    return tree_unflatten(results, spec_of_results)


def _rows_like(result: Tensor, single: Any, rows: Rows) -> Rows:
    """Return where the samples of an output lie: in the one dimension that is longer than for a single sample."""
    if rows.dim == WHOLE:
        return rows
    sizes = zip(result.shape, single.shape, strict=True) if result.ndim == getattr(single, "ndim", -1) else ()
    longer = [(dim, own, size) for dim, (own, size) in enumerate(sizes) if own != size]
    if len(longer) != 1 or longer[0][1] != longer[0][2] * rows.length:
        raise Refusal("the shape of its output does not show where each sample lies")
    return Rows(longer[0][0], 1, rows.first, rows.length)


@contextmanager
def _alone(scope: Scope, allowed: set[int]) -> Iterator[None]:
    """Neither follow nor tap the operations within this context, which may use only the parameters with ids in ``allowed``."""
    before = state.is_replaying, scope.allowed
    state.is_replaying, scope.allowed = True, allowed
    try:
        yield
    finally:
        state.is_replaying, scope.allowed = before


def _agree(a: Tensor, b: Tensor) -> bool:
    """Whether two results agree up to rounding: the tolerance admits another order of sums, but not another sample's data."""
    scale = float(b.abs().max()) if b.numel() else 0.0
    return bool(((a - b).abs() <= 1e3 * torch.finfo(a.dtype).eps * scale).all())

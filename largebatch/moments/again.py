"""What has no rule of its own, run again in the backward pass for the chosen samples.

An operation that is followed: PyTorch's own derivative of it, taken for all of them at once. A module that the user has named:
one sample at a time, exact where samples do not interact and nothing is drawn at random, which is checked by what comes out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
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
from largebatch.moments.samples import by_sample, mark_of, marks_in, verdicts
from largebatch.moments.scope import Refusal, Scope, notes, state
from largebatch.moments.uses import Made, Operand, Use, own_graph, runs, statistic_dtype


def derivative(scope: Scope, func: Any, args: Any, kwargs: Any) -> Tensor:
    """Any other operation that is followed: PyTorch's own derivative of it, taken for the chosen samples at once."""
    output = func(*args, **kwargs)
    name = getattr(func, "__name__", str(func))
    if not isinstance(output, Tensor):
        raise Refusal("there is no rule for it")
    leaves, spec = tree_flatten((args, kwargs))
    operands = {i: operand for i, leaf in enumerate(leaves) if (operand := scope.operand(leaf)) is not None}
    marks = marks_in(scope.batch, [leaf for leaf in leaves if isinstance(leaf, Tensor)])
    (rows,) = verdicts(func, args, kwargs, marks, [output])
    at = {id(t): m for t, m in marks if isinstance(m, Rows)}
    inputs = {i: at[id(leaf)] for i, leaf in enumerate(leaves) if id(leaf) in at}
    if not isinstance(rows, Rows) or len(inputs) < len(marks):
        raise Refusal("there is no rule for it")
    if len({m[2:] for m in inputs.values()}) > 1:
        raise Refusal("its arguments do not hold the same samples")
    constants = [None if i in operands or i in inputs else leaf for i, leaf in enumerate(leaves)]
    versions = [(x.detach(), x._version) for x in constants if isinstance(x, Tensor)]

    def left(grad: Tensor, saved: tuple[Tensor, ...]) -> list[tuple[Operand, Use]]:
        if any(x._version != version for x, version in versions):
            raise UserError(f"track: a constant that {name} was given was changed in place since; use another tensor")
        given = [t.contiguous() for t in (scope.batch.take(grad, rows), *saved)]
        given = [wide(t, grad) if t.is_floating_point() else t for t in given]
        values = [wide(operand.value(), grad) for operand in operands.values()]

        filled = [wide(x, grad) if isinstance(x, Tensor) and x.is_floating_point() else x for x in constants]

        def one(values: tuple[Tensor, ...], parts: tuple[Tensor, ...]) -> Tensor:
            for i, value in zip(operands, values, strict=True):
                filled[i] = value
            for i, part in zip(inputs, parts, strict=True):
                filled[i] = part.movedim(0, max(0, inputs[i].dim))
            args, kwargs = tree_unflatten(filled, spec)
            return func(*args, **kwargs).movedim(max(0, rows.dim), 0)

        @functools.lru_cache(1)
        def made(first: int, last: int) -> tuple[Tensor, ...]:
            d, *parts = (t[first:last] for t in given)
            copies = tuple(value.expand(len(d), *value.shape).detach().requires_grad_() for value in values)
            try:
                with torch.enable_grad(), own_graph(), sdpa_kernel(SDPBackend.MATH):  # no other knows masks' gradients
                    result = torch.vmap(one)(copies, tuple(parts))
                    if result.shape != d.shape:
                        raise RuntimeError("it gives a sample alone an output of another shape")
                    return torch.autograd.grad(result, copies, d, materialize_grads=True)
            except RuntimeError as error:
                raise UserError(
                    f"track: {name} with parameter '{next(iter(operands.values())).bases[0].name}' cannot be taken for single "
                    f"samples: {str(error).splitlines()[0]}; per='micro_batch' takes any model"
                ) from error

        def maker(place: int) -> Callable[[slice], Tensor]:
            return lambda run: made(run.start, run.stop)[place]

        numel = max(value.numel() for value in values)
        several = runs(len(given[0]), numel, grad.device)
        return [(operand, Made(maker(place), several)) for place, operand in enumerate(operands.values())]

    saved = [scope.batch.take(leaves[i], m) for i, m in inputs.items()]
    return tap(scope, output, rows, list(operands.values()), left, saved)


def run_module(scope: Scope, module: nn.Module, original: Any, args: Any, kwargs: Any) -> Any:
    """Run a module as one operation on its parameters and arguments.

    Raises:
        Refusal: if its arguments do not hold the samples, or an output does not show which part of it belongs to one.
    """
    # By name, which makes them whole under ZeRO-3.
    named = [(name, module.get_parameter(name)) for name, _ in module.named_parameters()]
    parameters: dict[str, Tensor] = {name: p for name, p in named if not p.requires_grad or scope.operand(p)}
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with _alone(scope, {id(p) for p in parameters.values()}):
        output = original(*args, **kwargs)
    again = _Again(scope, original, parameters, buffers, module, args, kwargs)
    results, spec = tree_flatten(output)
    shapes = again.shapes()
    for number, result in enumerate(results):
        if isinstance(result, Tensor) and result.requires_grad:
            results[number] = again.tapped(number, result, again.rows_like(result, shapes[number]))
    return tree_unflatten(results, spec)


@contextmanager
def _alone(scope: Scope, allowed: set[int]) -> Iterator[None]:
    """Neither follow nor tap what runs within, which may use these parameters alone."""
    before = state.scope, state.is_replaying, scope.allowed
    state.scope, state.is_replaying, scope.allowed = None, True, allowed
    try:
        yield
    finally:
        state.scope, state.is_replaying, scope.allowed = before


class _Again:
    """A module's call that can be made again for one sample."""

    def __init__(
        self,
        scope: Scope,
        original: Any,
        parameters: dict[str, Tensor],
        buffers: dict[str, Tensor],
        module: nn.Module,
        args: Any,
        kwargs: Any,
    ):
        self.scope, self.original, self.module, self.buffers = scope, original, module, buffers
        self.name = f"module '{notes(module).path}'"
        self.operands = {name: operand for name, p in parameters.items() if (operand := scope.operand(p)) is not None}
        self.frozen = {name: p for name, p in parameters.items() if name not in self.operands}
        self.leaves, self.spec = tree_flatten((args, kwargs))
        found = {i: mark_of(scope.batch, x) for i, x in enumerate(self.leaves) if isinstance(x, Tensor)}
        self.rows = {i: m for i, m in found.items() if isinstance(m, Rows)}
        if any(m is not None and i not in self.rows for i, m in found.items()):
            raise Refusal("the samples of an argument are mixed")
        if len({(m.first, m.length) for m in self.rows.values()}) != 1:
            raise Refusal("its arguments do not hold the same samples")
        dim, _, self.first, self.count = next(iter(self.rows.values()))
        self.is_whole = dim == WHOLE
        # Its arguments without their graphs.
        self.plain = [x.detach() if isinstance(x, Tensor) else x for x in self.leaves]
        self.versions = [x._version if isinstance(x, Tensor) else 0 for x in self.plain]

    def outputs(self, sample: int, parameters: dict[str, Tensor]) -> list[Any]:
        """Return the leaves of what it returns for one sample."""
        leaves = list(self.plain)
        for i, rows in self.rows.items():
            leaves[i] = by_sample(self.plain[i], rows)[sample - self.first].movedim(0, max(0, rows.dim))
        args, kwargs = tree_unflatten(leaves, self.spec)
        buffers = {name: buffer.clone() for name, buffer in self.buffers.items()}
        devices = {p.device for p in parameters.values() if p.is_cuda}
        with _alone(self.scope, set()), torch.random.fork_rng(devices):
            before = torch.get_rng_state()
            with with_parameters(self.module, {**self.frozen, **parameters, **buffers}):
                results = tree_flatten(self.original(*args, **kwargs))[0]
            if not torch.equal(torch.get_rng_state(), before):
                raise UserError(f"track: {self.name} draws random numbers; per='micro_batch' takes any model")
        return results

    def shapes(self) -> list[Any]:
        """Return the shapes of its outputs for one sample."""
        parameters = {name: operand.value() for name, operand in self.operands.items()}
        try:
            with torch.no_grad():
                return [getattr(result, "shape", None) for result in self.outputs(self.first, parameters)]
        except (RuntimeError, ValueError, IndexError) as error:
            if isinstance(error, UserError):
                raise
            raise Refusal(f"it does not run on a sample alone: {str(error).splitlines()[0]}") from error

    def rows_like(self, result: Tensor, other: torch.Size) -> Rows:
        """Return where an output has its samples: the one dimension in which it is longer than for one."""
        if self.is_whole:
            return Rows(WHOLE, 1, 0, 1)
        pairs = list(zip(result.shape, other, strict=True)) if result.ndim == len(other) else []
        dims = [dim for dim, (own, size) in enumerate(pairs) if own != size]
        if len(dims) != 1 or pairs[dims[0]][0] != pairs[dims[0]][1] * self.count:
            raise Refusal("its output does not show which part of it is one sample's")
        return Rows(dims[0], 1, self.first, self.count)

    def tapped(self, number: int, result: Tensor, rows: Rows) -> Tensor:
        """Put a tap on one output."""
        samples = self.scope.batch.samples_of(rows)
        expected = self.scope.batch.take(result.detach(), rows).clone()  # a later operation may change it in place

        def left(grad: Tensor, _: tuple[Tensor, ...]) -> list[tuple[Operand, Use]]:
            d = self.scope.batch.take(grad, rows)
            if any(isinstance(x, Tensor) and x._version != v for x, v in zip(self.plain, self.versions, strict=True)):
                raise UserError(
                    f"track: what {self.name} was given was changed in place since; use operations out of place"
                )

            @functools.lru_cache(1)
            def gradients(index: int) -> tuple[Tensor, ...]:
                return self._gradients(number, rows, samples[index], d[index], expected[index])

            def maker(place: int) -> Callable[[slice], Tensor]:
                return lambda run: gradients(run.start)[place].clone()[None]

            one_by_one = [slice(index, index + 1) for index in range(len(samples))]
            return [(operand, Made(maker(place), one_by_one)) for place, operand in enumerate(self.operands.values())]

        return tap(self.scope, result, rows, list(self.operands.values()), left, [])

    def _gradients(self, number: int, rows: Rows, sample: int, d: Tensor, expected: Tensor) -> tuple[Tensor, ...]:
        copies = {name: operand.value().clone().requires_grad_() for name, operand in self.operands.items()}
        try:
            with torch.enable_grad(), own_graph():
                result = self.outputs(sample, copies)[number].movedim(max(0, rows.dim), 0)
        except (RuntimeError, ValueError, IndexError) as error:
            if isinstance(error, UserError):
                raise
            why = str(error).splitlines()[0]
            raise UserError(f"track: {self.name} does not run on a sample alone: {why}") from error
        if result.shape != d.shape or not _same(result.detach(), expected):
            raise UserError(
                f"track: {self.name} gives a sample another output alone than among the others: its samples interact, or it "
                "draws random numbers; per='micro_batch' takes any model"
            )
        grads = torch.autograd.grad(result, list(copies.values()), d.to(result.dtype), allow_unused=True)
        filled = (torch.zeros_like(c) if g is None else g for g, c in zip(grads, copies.values(), strict=True))
        return tuple(g.to(statistic_dtype(g.dtype)) for g in filled)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two results agree but for rounding: sums in another order do by far, another sample's data do not."""
    scale = float(b.abs().max()) if b.numel() else 0.0
    return bool(((a - b).abs() <= 1e3 * torch.finfo(a.dtype).eps * scale).all()) if a.is_floating_point() else True

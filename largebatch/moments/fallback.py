"""The slow way: an operation, or a module named by the user, run again for one sample at a time.

Exact where samples do not interact and nothing is drawn at random, which is checked by what comes out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from largebatch.errors import UserError
from largebatch.moments.marks import WHOLE, Rows, by_sample, mark_of
from largebatch.moments.operations import FOLLOW
from largebatch.moments.private import with_parameters
from largebatch.moments.provenance import verdicts
from largebatch.moments.rules import tap
from largebatch.moments.scope import Refusal, Scope, notes, state
from largebatch.moments.uses import Looped, Operand, Use, statistic_dtype

_warned: set[str] = set()


def run(scope: Scope, func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation whose samples are followed, but which has no rule for what a parameter is owed.

    Raises:
        Refusal: if they are not.
    """
    name = getattr(func, "__name__", str(func))
    output = func(*args, **kwargs)
    again = Again(scope, func, args, kwargs, name)
    again.name = f"{name} with parameter '{next(iter(again.operands.values())).bases[0].name}'"
    marks = [(again.leaves[i], found) for i, found in again.rows.items()]
    (rows,) = verdicts(scope.batch, func, args, kwargs, marks, [output]) if func in FOLLOW else (None,)
    if not isinstance(rows, Rows):
        raise Refusal("there is no rule for it")
    if name not in _warned:
        _warned.add(name)
        warnings.warn(
            f"{name} has no rule for squares of samples: each backward pass runs it again for every sample that is squared",
            stacklevel=2,
        )
    return again.tapped(0, output, rows)


def run_module(scope: Scope, module: nn.Module, original: Any, args: Any, kwargs: Any) -> Any:
    """Run a module as one operation on its parameters and arguments.

    Raises:
        Refusal: if an output does not show which part of it belongs to one sample.
    """
    # By name, which makes them whole under ZeRO-3.
    named = {
        name: p
        for name, _ in module.named_parameters()
        if not (p := module.get_parameter(name)).requires_grad or scope.operand(p)
    }
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}

    def call(parameters: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        copies = {name: buffer.clone() for name, buffer in buffers.items()}
        with with_parameters(module, {**parameters, **copies}):
            return original(*args, **kwargs)

    with _paused(scope, {id(p) for p in named.values()}):
        output = original(*args, **kwargs)
        again = Again(scope, call, (named, *args), kwargs, f"module '{notes(module).path}'")
        single = again.outputs(again.first)
    results, spec = tree_flatten(output)
    for number, result in enumerate(results):
        if isinstance(result, Tensor) and result.requires_grad:
            results[number] = again.tapped(number, result, again.rows_like(result, single[number]))
    return tree_unflatten(results, spec)


@contextmanager
def _paused(scope: Scope, allowed: set[int] | None = None) -> Iterator[None]:
    """Neither follow nor tap what runs within, which may use these parameters alone."""
    before = state.scope, state.is_replaying, scope.is_paused, scope.allowed
    state.scope, state.is_replaying, scope.is_paused, scope.allowed = None, True, True, allowed
    try:
        yield
    finally:
        state.scope, state.is_replaying, scope.is_paused, scope.allowed = before


class Again:
    """A call that can be made again for one sample.

    Raises:
        Refusal: if none of its arguments holds samples, or some are mixed or not the same.
    """

    def __init__(self, scope: Scope, func: Any, args: Any, kwargs: Any, name: str):
        self.scope, self.func, self.name = scope, func, name
        self.leaves, self.spec = tree_flatten((args, kwargs))
        self.operands = {i: o for i, leaf in enumerate(self.leaves) if (o := scope.operand(leaf)) is not None}
        found = {i: mark_of(scope.batch, x) for i, x in enumerate(self.leaves) if isinstance(x, Tensor)}
        self.rows = {i: m for i, m in found.items() if isinstance(m, Rows) and i not in self.operands}
        if any(not isinstance(m, Rows) for i, m in found.items() if m is not None and i not in self.operands):
            raise Refusal("the samples of an argument are mixed")
        if len({(m.first, m.length) for m in self.rows.values()}) != 1:
            raise Refusal("its arguments do not hold the same samples")
        one = next(iter(self.rows.values()))
        self.first, self.count, self.is_whole = one.first, one.length, one.dim == WHOLE
        self.plain = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        self.versions = [leaf._version if isinstance(leaf, Tensor) else 0 for leaf in self.plain]

    def outputs(self, sample: int, operands: dict[int, Tensor] | None = None) -> list[Any]:
        """Return the leaves of what it returns for one sample."""
        again = list(self.plain)
        for i, rows in self.rows.items() if not self.is_whole else ():
            again[i] = by_sample(again[i], rows)[sample - rows.first].movedim(0, rows.dim)
        for i, tensor in (operands or {}).items():
            again[i] = tensor
        args, kwargs = tree_unflatten(again, self.spec)
        devices = {leaf.device for leaf in self.plain if isinstance(leaf, Tensor) and leaf.is_cuda}
        with _paused(self.scope), torch.random.fork_rng(devices):
            before = torch.get_rng_state()
            results = tree_flatten(self.func(*args, **kwargs))[0]
            if not torch.equal(torch.get_rng_state(), before):
                raise UserError(f"track: {self.name} draws random numbers; per='micro_batch' takes any model")
            return results

    def rows_like(self, result: Tensor, single: Tensor) -> Rows:
        """Return where a module's output has its samples: the one dimension in which it is longer than for one."""
        if self.is_whole:
            return Rows(WHOLE, 1, 0, 1)
        pairs = list(zip(result.shape, single.shape, strict=True)) if result.ndim == single.ndim else []
        dims = [dim for dim, (whole, one) in enumerate(pairs) if whole != one]
        if len(dims) != 1 or pairs[dims[0]][0] != pairs[dims[0]][1] * self.count:
            raise Refusal("its output does not show which part of it is one sample's")
        return Rows(dims[0], 1, self.first, self.count)

    def tapped(self, number: int, result: Tensor, rows: Rows) -> Tensor:
        """Put a tap on one output."""
        samples = self.scope.batch.samples_of(rows)
        expected = self.scope.batch.take(result.detach(), rows).clone()  # a later operation may change it in place
        used = list(self.operands.items())

        def left(grad: Tensor, _: tuple[Tensor, ...]) -> list[tuple[Operand, Use]]:
            d = self.scope.batch.take(grad, rows)
            if any(isinstance(x, Tensor) and x._version != v for x, v in zip(self.plain, self.versions, strict=True)):
                raise UserError(
                    f"track: what {self.name} was given was changed in place since; use operations out of place"
                )
            made: dict[int, tuple[Tensor, ...]] = {}

            def gradients(index: int) -> tuple[Tensor, ...]:
                if index not in made:
                    made.clear()  # of one sample at a time
                    made[index] = self._gradients(number, rows, samples[index], d[index], expected[index])
                return made[index]

            def maker(place: int) -> Callable[[int], Tensor]:
                return lambda index: gradients(index)[place].clone()

            return [(operand, Looped(maker(place), len(samples))) for place, (_, operand) in enumerate(used)]

        return tap(self.scope, result, rows, [operand for _, operand in used], left, [])

    def _gradients(self, number: int, rows: Rows, sample: int, d: Tensor, expected: Tensor) -> tuple[Tensor, ...]:
        copies = {i: self.plain[i].clone().requires_grad_() for i in self.operands}
        try:
            with torch.enable_grad():
                result = self.outputs(sample, copies)[number]
                result = result[None] if self.is_whole else result.movedim(rows.dim, 0)
        except (RuntimeError, ValueError, IndexError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"track: {self.name} does not run on a sample alone: {str(error).splitlines()[0]}"
            ) from error
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

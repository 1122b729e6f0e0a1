"""Seeing every operation of a tracked model's forward pass, and what takes the place of its modules' forwards.

The outermost tracked module opens a scope and enters the mode. Inner ones only add their parameters: FSDP2 swaps parameters per
module, and activation checkpointing runs a module again during the backward pass.
"""

from __future__ import annotations

import functools
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from largebatch.errors import UserError
from largebatch.moments import again, operations, rules
from largebatch.moments.aliasing import forward_squared
from largebatch.moments.operations import WHOLE, Lost, Rows
from largebatch.moments.private import BODIES, backward_pass, inside_function_transform, is_transformed, unwrapped
from largebatch.moments.samples import Batch, check_in_place, follow, live_in, mark, marks_in, passed_on, tensors_in
from largebatch.moments.scope import WAY_OUT, Refusal, Scope, Tracked, notes, state, why_lost
from largebatch.moments.uses import Operand


class Interception(TorchFunctionMode):
    """Follow the samples, and put taps where they meet parameters."""

    def __init__(self, scope: Scope):
        super().__init__()
        self.scope = scope

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`."""
        kwargs = kwargs or {}
        scope = self.scope
        if func in operations.WITHOUT_TENSORS:
            return func(*args, **kwargs)
        if scope.allowed is not None:
            for t in tensors_in(args, kwargs):
                if (operand := scope.operand(t)) is not None and id(t) not in scope.allowed:
                    raise Refusal(f"it uses parameter '{operand.bases[0].name}', which is not its own")
            return func(*args, **kwargs)
        body = BODIES.get(func)
        if body is not None:
            with self:
                return body(*args, **kwargs)
        tensors = tensors_in(args, kwargs)
        if operations.is_unseen(func) or kwargs.get("out") is not None or inside_function_transform():
            self._check_seen(func, kwargs, tensors)
        operands = [operand for t in tensors if (operand := scope.operand(t)) is not None]
        if not operands or not torch.is_grad_enabled():
            return self._plain(func, args, kwargs, tensors)
        try:
            return self._with_operands(func, args, kwargs, tensors, operands)
        except Refusal as refusal:
            raise scope.refuse(func, operands, str(refusal)) from None

    def _with_operands(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], operands: list[Operand]) -> Any:
        """Run a function that parameters are seen by."""
        scope = self.scope
        if func is Tensor.register_hook:
            raise Refusal("a hook may change its gradient, which squares of samples would not see")
        is_in_place = operations.is_in_place(func)
        if is_in_place and scope.operand(args[0]) is not None:
            raise Refusal("it changes the parameter, or what was computed from it, in place")
        is_like = func in operations.LIKE and scope.operand(args[0]) is not None  # of another it takes the shape alone
        marks = marks_in(scope.batch, tensors)
        if (is_like and len(operands) == 1) or not marks:
            return scope.derive(func, args, kwargs, operands)
        for _, found in live_in(marks):
            if isinstance(found, Lost):
                raise Refusal(why_lost(found))
        if any(operand.dtype.is_complex for operand in operands):
            raise Refusal("it takes the parameter as complex numbers")
        is_broadcast = func in operations.POINTWISE or func in rules.JOINS
        rule = rules.RULES.get(func, rules.broadcast if is_broadcast else None)
        try:
            return (rule or again.derivative)(scope, func, args, kwargs)
        except Refusal as refusal:
            if rule is None or is_in_place:
                raise
            with suppress(Refusal):
                return again.derivative(scope, func, args, kwargs)
            raise refusal

    def _check_seen(self, func: Any, kwargs: Any, tensors: list[Tensor]) -> None:
        """Raise where values of the batch go to where they are not followed.

        Raises:
            UserError: with the function's name.
        """
        name = getattr(func, "__name__", "")
        wrapped = [t for t in tensors if is_transformed(t)]
        is_get = name == "__set__" and len(tensors) < 2
        if not (wrapped or kwargs.get("out") is not None or (operations.is_unseen(func) and not is_get)):
            return
        batch = self.scope.batch
        if any(passed_on(unwrapped(t))[0] is batch for t in tensors):
            what = "torch.func" if wrapped else f"{name} with out=" if kwargs.get("out") is not None else name
            raise UserError(
                f"track: the values of the batch go through {what}, where its samples cannot be followed. {WAY_OUT}"
            )

    def _plain(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """Run a function that no parameter is seen by."""
        batch = self.scope.batch
        if not operations.is_in_place(func):
            output = func(*args, **kwargs)
            follow(batch, func, args, kwargs, tensors, output)
            return output
        target = args[0]
        try:
            found = check_in_place(batch, func, args, kwargs) if isinstance(target, Tensor) else None
        except ValueError as error:
            raise UserError(
                f"track: {error}, so that the samples cannot be followed; use an operation out of place"
            ) from None
        output = func(*args, **kwargs)
        if found is not None and isinstance(target, Tensor):
            mark(batch, target, found)
        return output


class Intercepted(functools.partial[Any]):
    """`forward` bound to a module: a partial of a named function, which deepcopy and pickle bind to the copy."""

    @property
    def __wrapped__(self) -> Any:
        """The user's own forward, whose signature `inspect.signature` shows."""
        return _own_forward(self.args[0])


def _own_forward(module: nn.Module) -> Any:
    replaced = module.__dict__.get("_largebatch_forward")
    return functools.partial(type(module).forward, module) if replaced is None else replaced


def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Take the place of a tracked module's forward."""
    original = _own_forward(self)
    if not torch.compiler.is_compiling() and inside_function_transform():
        return original(*args, **kwargs)
    if state.is_replaying or not torch.is_grad_enabled():
        return original(*args, **kwargs)
    tracked = notes(self)
    run = forward_squared if tracked.per == "micro_batch" else _forward_tapped
    return run(self, tracked, original, args, kwargs)


@torch.compiler.disable
def _forward_tapped(module: nn.Module, tracked: Tracked, original: Any, args: Any, kwargs: Any) -> Any:
    if state.scope is not None:
        state.scope.enter(module)
        return _run(state.scope, module, tracked, original, args, kwargs)
    scope = state.scope = _outermost(module, tracked, args, kwargs)
    try:
        with Interception(scope):
            output = _run(scope, module, tracked, original, args, kwargs)
        if backward_pass() < 0:
            scope.check_outputs(_tensors_of(output))
    finally:
        state.scope = None
        for operand in scope.operands.values():
            operand.bases[0].token = None  # which would keep its own graph alive
    return output


def _tensors_of(output: Any, depth: int = 3) -> list[Tensor]:
    """Return the tensors in an output: in containers, and in the attributes of objects."""
    found = []
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif depth and hasattr(leaf, "__dict__") and not isinstance(leaf, (type, nn.Module)):
            found += _tensors_of(list(vars(leaf).values()), depth - 1)
    return found


def _run(scope: Scope, module: nn.Module, tracked: Tracked, original: Any, args: Any, kwargs: Any) -> Any:
    if not tracked.use_fallback:
        return original(*args, **kwargs)
    try:
        return again.run_module(scope, module, original, args, kwargs)
    except Refusal as refusal:
        raise UserError(
            f"track: fallback module '{tracked.path}' cannot be run sample by sample: {refusal}; "
            "per='micro_batch' takes any model"
        ) from None


def _outermost(module: nn.Module, tracked: Tracked, args: Any, kwargs: Any) -> Scope:
    """Return the scope of a forward pass that starts here; its first tensor argument tells the number of samples."""
    dim = tracked.batch_dim
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if backward_pass() >= 0:  # activation checkpointing runs a part of the model again, on what it was run on before
        batches = [batch for tensor in tensors if (batch := passed_on(tensor)[0]) is not None]
        if not batches:
            raise UserError(
                f"track: '{tracked.path}' runs again in activation checkpointing, on other tensors than before: call "
                "torch.utils.checkpoint on modules as they are, with use_reentrant=False, or use per='micro_batch'"
            )
        scope = Scope(batches[0])
        scope.enter(module)
        scope.is_open = True
        return scope
    if tracked.path:
        raise UserError(
            f"track: '{tracked.path}' is called from outside of the model that was tracked, so that nothing tells its samples; "
            "call the model, or track what is called"
        )
    if len(tensors) > 1 and tracked.inputs is None:
        raise UserError(
            f"track: the model is called with {len(tensors)} tensors: say track(model, inputs='all') if each holds samples, or "
            "inputs='first' if the others are the same for all samples"
        )
    held = [tensor for tensor in tensors if tensor.ndim > dim]
    if not held:
        raise UserError(f"track: the model is called without a tensor of samples along dimension {dim}")
    num_samples = held[0].shape[dim]
    if num_samples == 0:
        raise UserError("track: the model is called with a batch without samples; skip an empty batch")
    scope = Scope(_batch(num_samples, tracked.samples))
    for tensor in held if tracked.inputs == "all" else held[:1]:
        if tensor.shape[dim] != num_samples:
            raise UserError(
                f"track: an argument of the model has {tensor.shape[dim]} rows along dimension {dim}, where the first has "
                f"{num_samples} samples; inputs='first' takes the others for constants"
            )
        mark(scope.batch, tensor, Rows(WHOLE if num_samples == 1 else dim, 1, 0, num_samples))
    scope.enter(module)
    scope.is_open = True
    return scope


def _batch(num_samples: int, most: int | None) -> Batch:
    """Return the samples of a pass: those somebody chose, or so many of them at even distances."""
    if state.choice is not None:
        chosen, weight = state.choice
        return Batch(num_samples, chosen if len(chosen) < num_samples else None, weight)
    if most is None or most >= num_samples:
        return Batch(num_samples)
    chosen = [(2 * i + 1) * num_samples // (2 * most) for i in range(most)]
    return Batch(num_samples, chosen, num_samples / most)

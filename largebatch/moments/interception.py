"""Interception of every operation in a tracked model's forward pass, and the function that replaces its modules' forwards.

The outermost tracked module opens a scope and enters the mode. Inner modules only add their parameters to the scope, because
FSDP2 swaps parameters module by module, and activation checkpointing runs a module again during the backward pass.
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
    """Follow the samples through all operations, and put taps on the operations that combine them with parameters."""

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
        if func in operations.LIKE:
            tensors = tensors[:1]
        operands = [operand for t in tensors if (operand := scope.operand(t)) is not None]
        if not operands or not torch.is_grad_enabled():
            return self._plain(func, args, kwargs, tensors)
        try:
            return self._with_operands(func, args, kwargs, tensors, operands)
        except Refusal as refusal:
            raise scope.refuse(func, operands, str(refusal)) from None

    def _with_operands(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], operands: list[Operand]) -> Any:
        """Run a function that has parameters, or tensors computed from them, among its arguments."""
        scope = self.scope
        if func is Tensor.register_hook:
            raise Refusal("a hook may change its gradient, which squares of samples would not see")
        is_in_place = operations.is_in_place(func)
        if is_in_place and scope.operand(args[0]) is not None:
            raise Refusal("it changes the parameter, or a tensor computed from it, in place")
        marks = marks_in(scope.batch, tensors)
        if not marks:
            return scope.derive(func, args, kwargs, operands)
        for _, found in live_in(marks):
            if isinstance(found, Lost):
                raise Refusal(why_lost(found))
        if any(operand.dtype.is_complex for operand in operands):
            raise Refusal("it takes the parameter as complex numbers")
        rule = rules.RULES.get(func, again.derivative)
        if is_in_place and rule is again.derivative:
            raise Refusal("there is no rule for it")
        try:
            return rule(scope, func, args, kwargs)
        except Refusal as refusal:
            if not is_in_place and rule is not again.derivative:
                with suppress(Refusal):
                    return again.derivative(scope, func, args, kwargs)
            raise refusal

    def _check_seen(self, func: Any, kwargs: Any, tensors: list[Tensor]) -> None:
        """Raise an error that names the function if it takes values of the batch where they cannot be followed."""
        what, name = "", getattr(func, "__name__", "")
        if any(map(is_transformed, tensors)):
            what = "torch.func"
        elif kwargs.get("out") is not None:
            what = f"{name} with out="
        elif operations.is_unseen(func) and (name != "__set__" or len(tensors) > 1):
            what = name
        if what and any(passed_on(unwrapped(t))[0] is self.scope.batch for t in tensors):
            raise UserError(
                f"track: the values of the batch go through {what}, where its samples cannot be followed. {WAY_OUT}"
            )

    def _plain(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """Run a function that needs no tap."""
        batch, is_in_place = self.scope.batch, operations.is_in_place(func)
        found = check_in_place(batch, func, args, kwargs) if is_in_place else None
        output = func(*args, **kwargs)
        if found is not None:
            mark(batch, args[0], found)
        elif not is_in_place:
            follow(batch, func, args, kwargs, tensors, output)
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
    """Run in place of a tracked module's own ``forward``."""
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
    scope = state.scope = Scope(_outermost(module, tracked, args, kwargs), module)
    try:
        with Interception(scope):
            output = _run(scope, module, tracked, original, args, kwargs)
        if backward_pass() < 0:
            scope.check_outputs(_tensors_of(output))
    finally:
        state.scope = None
        scope.leave()
    return output


def _tensors_of(output: Any, depth: int = 3) -> list[Tensor]:
    """Return the tensors in an output, including those in containers and in attributes of objects."""
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
            "per='micro_batch' works with any model"
        ) from None


def _outermost(module: nn.Module, tracked: Tracked, args: Any, kwargs: Any) -> Batch:
    """Return the samples of a forward pass that starts here, and mark its arguments; the first tensor sets their number."""
    dim = tracked.batch_dim
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if backward_pass() >= 0:  # activation checkpointing runs a part of the model again, on the same tensors as before
        batches = [batch for tensor in tensors if (batch := passed_on(tensor)[0]) is not None]
        if not batches:
            raise UserError(
                f"track: '{tracked.path}' runs again in activation checkpointing, on other tensors than before: call "
                "torch.utils.checkpoint on modules as they are, with use_reentrant=False, or use per='micro_batch'"
            )
        return batches[0]
    if tracked.path:
        raise UserError(
            f"track: '{tracked.path}' is called from outside of the model that was tracked, so that its samples are not known; "
            "call the model, or track the module that is called"
        )
    if len(tensors) > 1 and tracked.inputs is None:
        raise UserError(
            f"track: the model is called with {len(tensors)} tensors: use track(model, inputs='all') if each holds samples, or "
            "inputs='first' if the others are the same for all samples"
        )
    held = [tensor for tensor in tensors if tensor.ndim > dim]
    if not held:
        raise UserError(f"track: the model is called without a tensor of samples along dimension {dim}")
    num_samples = held[0].shape[dim]
    if num_samples == 0:
        raise UserError("track: the model is called with a batch without samples; skip an empty batch")
    chosen, weight, most = None, 1.0, tracked.samples
    if state.choice is not None:
        chosen, weight = state.choice
        chosen = chosen if len(chosen) < num_samples else None
    elif most is not None and most < num_samples:
        chosen, weight = [(2 * i + 1) * num_samples // (2 * most) for i in range(most)], num_samples / most
    batch = Batch(num_samples, chosen, weight)
    for tensor in held if tracked.inputs == "all" else held[:1]:
        if tensor.shape[dim] != num_samples:
            raise UserError(
                f"track: an argument of the model has {tensor.shape[dim]} rows along dimension {dim}, where the first has "
                f"{num_samples} samples; with inputs='first' the other arguments are constants"
            )
        mark(batch, tensor, Rows(WHOLE if num_samples == 1 else dim, 1, 0, num_samples))
    return batch

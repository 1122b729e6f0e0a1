"""Seeing every operation of a tracked module's forward pass.

The mode is entered in each module's own forward, not once around the model: FSDP2 swaps parameters per module, and
activation checkpointing runs a module again during the backward pass. Inside an outer tracked forward the inner ones
only add their parameters to its scope.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from largebatch.moments import derived, elementwise, fallback
from largebatch.moments.scope import RULES, Scope, Tracked, notes, state
from largebatch.moments.tap import Operand, Square


class Interception(TorchFunctionMode):
    """Send operations between operands and batched tensors to their rules."""

    def __init__(self, scope: Scope):
        super().__init__()
        self.scope = scope

    def __torch_function__(self, func: Any, types_: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`, with a tap where it uses a tracked parameter."""
        kwargs = kwargs or {}
        scope = self.scope
        if func is Tensor.unflatten or getattr(func, "__name__", "") == "unflatten":
            func = torch.unflatten  # the method is written around super(), which the compiler cannot trace in here
        operands, is_batched = _inspect(scope, args, kwargs)
        if not operands or not torch.is_grad_enabled():
            output = func(*args, **kwargs)
            if is_batched:
                _mark(output)
            return output
        if isinstance(func, types.FunctionType) and func in _BODIES:
            with self:
                return attention(scope, func, args, kwargs) if func in _ATTENTION else _BODIES[func](*args, **kwargs)
        if not is_batched:
            return derived.derive(scope, func, args, kwargs, operands)
        rule = RULES.get(func)
        if rule is not None:
            return rule(scope, *args, **kwargs)
        if func in elementwise.FUNCTIONS:
            return elementwise.run(scope, func, args, kwargs)
        return fallback.run(scope, func, args, kwargs)


def _inspect(scope: Scope, args: Any, kwargs: Any) -> tuple[list[Operand], bool]:
    operands: list[Operand] = []
    is_batched = False
    for value in (*args, *kwargs.values()):
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, Tensor):
                operand = scope.operand(item)
                if operand is not None:
                    operands.append(operand)
                elif not is_batched:
                    is_batched = scope.is_batched(item)
    return operands, is_batched


def _mark(output: Any) -> None:
    """Mark the results that would not be known as batched by requiring a gradient."""
    for item in output if isinstance(output, (list, tuple)) else (output,):
        if isinstance(item, Tensor) and not item.requires_grad:
            item._largebatch_batched = True  # type: ignore[attr-defined]


def attention(scope: Scope, func: Any, args: Any, kwargs: Any) -> Any:
    """Run the body of `F.multi_head_attention_forward`, whose tensors are [time, batch, width] or flattened from it."""
    outer = scope.batch_dim, scope.width
    query = args[0] if args else kwargs["query"]
    if query.ndim == 3:
        scope.batch_dim, scope.width = 1, query.shape[1]
    try:
        return _BODIES[func](*args, **kwargs)
    finally:
        scope.batch_dim, scope.width = outer


def _never(*_: Any) -> bool:
    return False


def _body(function: types.FunctionType) -> types.FunctionType:
    """Return a copy of a function of torch.nn.functional that goes straight to its body.

    The original hands itself to the mode before it does anything else; the mode wants the operations inside.
    """
    skip = dict.fromkeys(("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"), _never)
    names = {**function.__globals__, **skip}
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_BODIES = {
    function: _body(function)
    for function in vars(F).values()
    if isinstance(function, types.FunctionType) and "has_torch_function" in " ".join(function.__code__.co_names)
}
_ATTENTION = {F.multi_head_attention_forward}


def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Take the place of a tracked module's forward."""
    replaced = self.__dict__.get("_largebatch_forward")
    original = functools.partial(type(self).forward, self) if replaced is None else replaced
    if state.is_replaying or not torch.is_grad_enabled():
        return original(*args, **kwargs)
    tracked = notes(self)
    run = _forward_squared if tracked.per == "micro_batch" else _forward_tapped
    return run(self, tracked, original, args, kwargs)


forward.__name__ = "forward"


def _forward_tapped(module: nn.Module, tracked: Tracked, original: Any, args: Any, kwargs: Any) -> Any:
    scope = state.scope
    if scope is not None:
        scope.enter(module)
        outer = scope.batch_dim, scope.width
        scope.batch_dim, scope.width = tracked.batch_dim, None
        try:
            if tracked.use_fallback:
                return fallback.run_module(scope, module, original, args, kwargs)
            return original(*args, **kwargs)
        finally:
            scope.batch_dim, scope.width = outer
    scope = _outermost(module, tracked, args, kwargs)
    state.scope = scope
    try:
        if tracked.use_fallback:
            return fallback.run_module(scope, module, original, args, kwargs)
        with Interception(scope):
            return original(*args, **kwargs)
    finally:
        state.scope = None
        if not torch.compiler.is_compiling():
            scope.leave(module)


def _outermost(module: nn.Module, tracked: Tracked, args: Any, kwargs: Any) -> Scope:
    """Return the scope of a forward pass that starts here; its first tensor argument tells the number of samples."""
    dim = tracked.batch_dim
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim > dim]
    rows = tensors[0].shape[dim] if tensors else None
    scope = Scope(num_samples=rows, batch_dim=dim)
    for tensor in tensors:
        if tensor.shape[dim] == rows:
            scope.inputs.add(id(tensor))
            scope.keep.append(tensor)
    scope.enter(module)
    return scope


def _forward_squared(module: nn.Module, tracked: Tracked, original: Any, args: Any, kwargs: Any) -> Any:
    """Run forward with every parameter of the subtree replaced by an alias whose backward squares."""
    is_outermost = state.aliases is None
    if is_outermost:
        state.aliases = {}
    aliases = state.aliases
    assert aliases is not None
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for owner in tracked.owners:
            values = owner.__dict__
            for name, shadow_name in notes(owner).names.items():
                parameter = owner._parameters[name]
                if parameter is None or not parameter.requires_grad:
                    continue
                if id(parameter) not in aliases:
                    alias = Square.apply(parameter, owner._parameters[shadow_name])
                    aliases[id(parameter)] = (parameter, alias)
                alias = aliases[id(parameter)][1]
                if values.get(name) is not alias:  # FSDP2 puts another tensor there than an outer module saw
                    replaced.append((values, name, values.get(name)))
                    values[name] = alias  # found before _parameters
            if isinstance(owner, nn.RNNBase):
                replaced.append((values, "_flat_weights", values["_flat_weights"]))
                values["_flat_weights"] = [getattr(owner, name) for name in owner._flat_weights_names]
        return original(*args, **kwargs)
    finally:
        for values, name, value in reversed(replaced):
            if value is None:
                del values[name]
            else:
                values[name] = value
        if is_outermost:
            state.aliases = None

"""Seeing every operation of a tracked module's forward pass.

The mode is entered in each module's own forward, not once around the model: FSDP2 swaps parameters per module, and
activation checkpointing runs a module again during the backward pass. Inside an outer tracked forward the inner ones
only add their parameters to its scope.
"""

from __future__ import annotations

import functools
import sys
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.torch_version import TorchVersion
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import CheckpointFunction

from largebatch.moments import derived, elementwise, fallback, layout
from largebatch.moments.scope import FALLBACK, RULES, WAY_OUT, Scope, Tracked, notes, state
from largebatch.moments.tap import Operand, Square
from largebatch.section import UserError

# Before, the compiler could not tell parameters apart.
COMPILES = TorchVersion(torch.__version__) >= "2.13"


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
                _note_parts(scope, func, args, kwargs, output)
                layout.follow(scope, func, args, kwargs, output)
            elif not operands:
                derived.note_constant(scope, func, args, output)
            return output
        if isinstance(func, types.FunctionType) and func in _BODIES:
            with self:
                return attention(scope, func, args, kwargs) if func in _ATTENTION else _BODIES[func](*args, **kwargs)
        if not is_batched:
            return derived.derive(scope, func, args, kwargs, operands)
        if any(operand.tensor.is_complex() for operand in operands):
            raise UserError(
                f"track: {func.__name__} uses parameter '{operands[0].bases[0].name}' as complex numbers, for which there are "
                f"no rules; {WAY_OUT}"
            )
        home, dim = scope.batch_dim, layout.marked_dim(scope, args, kwargs)
        if dim is not None:
            _check_layout(func, dim, operands)
            scope.batch_dim = dim
        try:
            output = _apply(scope, func, args, kwargs)
        finally:
            scope.batch_dim = home
        layout.follow(scope, func, args, kwargs, output)
        if scope.parts:
            scope.hand_on_part((*args, *kwargs.values()), output)
        return output


def _apply(scope: Scope, func: Any, args: Any, kwargs: Any) -> Any:
    rule = RULES.get(func)
    if rule is not None:
        return rule(scope, *args, **kwargs)
    run = elementwise.run if func in elementwise.FUNCTIONS else fallback.run
    return run(scope, func, args, kwargs)


def _check_layout(func: Any, dim: int, operands: list[Operand]) -> None:
    """Raise where no rule can tell the samples apart."""
    if dim == layout.UNGROUPED:
        raise UserError(
            f"track: parameter '{operands[0].bases[0].name}' meets rows in {func.__name__} that are not grouped by sample "
            "(they were joined along the samples, repeated, flattened behind another dimension, or picked by number or "
            f"mask); name its module, or the one around it that does so, in {FALLBACK}, or use per='micro_batch'"
        )
    if func in _ROWS_FIRST:  # these have the samples along dimension 0, whatever the module's batch_dim
        raise UserError(
            f"track: {func.__name__} with parameter '{operands[0].bases[0].name}' has the samples along dimension {dim}; "
            f"permute them to the front, {WAY_OUT}"
        )


_ROWS_FIRST = {torch.batch_norm, torch.group_norm, torch.instance_norm, torch.embedding_bag, torch.prelu}
_ROWS_FIRST |= {getattr(torch, f"conv{kind}{n}d") for kind in ("", "_transpose") for n in (1, 2, 3)}


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


_SPLITTING = {Tensor.split, Tensor.chunk, Tensor.tensor_split, torch.split, torch.chunk, torch.tensor_split}


def _note_parts(scope: Scope, func: Any, args: Any, kwargs: Any, output: Any) -> None:
    """Follow runs of samples that the batch is split into."""
    if func in _SPLITTING:
        source = args[0] if args else kwargs.get("tensor", kwargs.get("input"))
        scope.note_split(source, kwargs.get("dim", args[2] if len(args) > 2 else 0), output)
    elif scope.parts:
        scope.hand_on_part((*args, *kwargs.values()), output)


def attention(scope: Scope, func: Any, args: Any, kwargs: Any) -> Any:
    """Run the body of `F.multi_head_attention_forward`, whose tensors are [time, batch, width] or flattened from it."""
    outer = scope.batch_dim, scope.width
    query = args[0] if args else kwargs["query"]
    if query.ndim == 3:
        scope.batch_dim, scope.width = 1, query.shape[1]
    try:
        output = _BODIES[func](*args, **kwargs)
    finally:
        scope.batch_dim, scope.width = outer
    if query.ndim == 3 and scope.batch_dim != 1:
        layout.mark(scope, output[0], 1)
    return output


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
    original = _own_forward(self)
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        return original(*args, **kwargs)  # torch.func's gradients do not go to .grad, and squares have no place to go
    if state.is_replaying or not torch.is_grad_enabled():
        if state.scope is not None and not torch.compiler.is_compiling():
            _note_segment(state.scope, self)
        elif state.aliases is not None and not torch.compiler.is_compiling():
            _refuse_further_segment(self)
        elif state.is_aliasing and _checkpoint_frame() is not None:
            raise UserError(
                "track: under ZeRO-3, per='micro_batch' does not go with the re-entrant checkpoint around "
                f"'{notes(self).path}'; call torch.utils.checkpoint with use_reentrant=False"
            )
        return original(*args, **kwargs)
    tracked = notes(self)
    run = _forward_squared if tracked.per == "micro_batch" else _forward_tapped
    return run(self, tracked, original, args, kwargs)


class Intercepted(functools.partial[Any]):
    """`forward` bound to a module: a partial of a named function, which deepcopy and pickle bind to the copy."""

    @property
    def __wrapped__(self) -> Any:
        """The user's own forward, whose signature `inspect.signature` shows."""
        return _own_forward(self.args[0])


def _own_forward(module: nn.Module) -> Any:
    replaced = module.__dict__.get("_largebatch_forward")
    return functools.partial(type(module).forward, module) if replaced is None else replaced


def _forward_tapped(module: nn.Module, tracked: Tracked, original: Any, args: Any, kwargs: Any) -> Any:
    scope = state.scope
    if scope is not None:
        scope.enter(module)
        outer = scope.batch_dim, scope.width
        scope.batch_dim, scope.width = tracked.batch_dim, None
        try:
            if tracked.use_fallback:
                return fallback.run_module(scope, module, original, args, kwargs)
            output = original(*args, **kwargs)
        finally:
            scope.batch_dim, scope.width = outer
        if tracked.batch_dim != scope.batch_dim and scope.width is None:
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor) and not hasattr(leaf, "_largebatch_dim"):
                    layout.mark(scope, leaf, tracked.batch_dim)
        return output
    scope = _outermost(module, tracked, args, kwargs)
    state.scope = scope
    try:
        if tracked.use_fallback:
            return fallback.run_module(scope, module, original, args, kwargs)
        with Interception(scope):
            output = original(*args, **kwargs)
    finally:
        state.scope = None
    if not torch.compiler.is_compiling():
        scope.leave(module)
    return output


if not COMPILES:
    _forward_tapped = torch.compiler.disable(_forward_tapped)  # what it traced was wrong, without a word


def _checkpoint_frame() -> types.FrameType | None:
    """Return the frame of the re-entrant checkpoint that runs."""
    frame: types.FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not CheckpointFunction.forward.__code__:
        frame = frame.f_back
    return frame


def _note_segment(scope: Scope, module: nn.Module) -> None:
    """Note the parameters of a re-entrant checkpoint, which runs now without gradients and again in the backward pass.

    Its second run is a forward pass of its own, whose gradients cannot be added to those of other uses per sample.
    """
    frame = _checkpoint_frame()
    if frame is not None:
        used = scope.segments.setdefault(id(frame.f_locals["ctx"]), set())
        for owner in notes(module).owners:
            used.update(id(owner._parameters.get(name)) for name in notes(owner).names)


def _refuse_further_segment(module: nn.Module) -> None:
    """Refuse a parameter in two re-entrant checkpoints, or in one and outside: each would square its own part of a gradient."""
    segment = 0
    if not torch.is_grad_enabled():
        frame = _checkpoint_frame()
        if frame is None:
            return  # nothing is differentiated
        segment = id(frame.f_locals["ctx"])
    for name in notes(module).names:
        if state.segments.setdefault(id(module._parameters[name]), segment) != segment:
            raise UserError(
                f"track: per='micro_batch': '{notes(module).path}.{name}' is used by several re-entrant checkpoints, or by one "
                "and outside of it; call torch.utils.checkpoint with use_reentrant=False"
            )


def _outermost(module: nn.Module, tracked: Tracked, args: Any, kwargs: Any) -> Scope:
    """Return the scope of a forward pass that starts here; its first tensor argument tells the number of samples."""
    dim = tracked.batch_dim
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim > dim]
    rows = tensors[0].shape[dim] if tensors else None
    scope = Scope(num_samples=rows, batch_dim=dim)
    scope.has_moved = any(hasattr(tensor, "_largebatch_dim") for tensor in tensors)  # a checkpoint's, run again
    for tensor in tensors:
        if tensor.shape[dim] == rows:
            scope.inputs.append(tensor)
    scope.enter(module)
    return scope


def _forward_squared(module: nn.Module, tracked: Tracked, original: Any, args: Any, kwargs: Any) -> Any:
    """Run forward with every parameter of the subtree replaced by an alias whose backward squares."""
    if state.is_aliasing:
        return original(*args, **kwargs)
    is_outermost = state.aliases is None
    if not is_outermost and not torch.compiler.is_compiling():
        _refuse_further_segment(module)
    if is_outermost and _is_cut_up(tracked):
        with Aliasing(tracked):
            return original(*args, **kwargs)
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
            state.segments.clear()


def _is_cut_up(tracked: Tracked) -> bool:
    """Whether parameters of the subtree are whole only while they are used, as under ZeRO-3."""
    for owner in tracked.owners:
        for name in notes(owner).names:
            parameter = owner._parameters.get(name)
            if parameter is not None and parameter.numel() == 0:
                return True
    return False


class Aliasing(TorchFunctionMode):
    """Replace parameters by aliases whose backward squares, each when an operation first uses it."""

    def __init__(self, tracked: Tracked):
        super().__init__()
        self.homes: dict[int, tuple[nn.Module, str]] = {}
        self.aliases: dict[int, Tensor] = {}
        for owner in tracked.owners:
            for name, shadow_name in notes(owner).names.items():
                parameter = owner._parameters.get(name)
                if parameter is not None and parameter.requires_grad:
                    self.homes[id(parameter)] = owner, shadow_name

    def __enter__(self) -> Any:
        """Take over from the aliases that modules would put into their places."""
        state.is_aliasing = True
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Leave them to it again."""
        state.is_aliasing = False
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types_: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` on aliases."""
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if getattr(func, "__name__", "") in ("__get__", "__set__"):
            output = func(*args, **kwargs)
            if not (isinstance(output, Tensor) and output.grad_fn is not None):
                return output  # .data, which the engine sets, .shape, .grad; but not .T
        args, kwargs = tree_map(self._alias, (args, kwargs))
        return func(*args, **kwargs)

    def _alias(self, value: Any) -> Any:
        if id(value) not in self.homes:
            return value
        if id(value) not in self.aliases:
            owner, shadow_name = self.homes[id(value)]
            # Read with [], by which ZeRO-3 makes it whole.
            self.aliases[id(value)] = Square.apply(value, owner._parameters[shadow_name])
        return self.aliases[id(value)]

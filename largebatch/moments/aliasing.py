"""The squares of whole backward passes as gradients of shadows, for engines that cut parameters up (FSDP2, ZeRO).

Every parameter of a module is replaced, while its forward runs, by an alias whose backward returns (g, g^2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from largebatch.errors import UserError
from largebatch.moments.private import checkpoint_frame
from largebatch.moments.scope import Tracked, notes, state


class Square(torch.autograd.Function):
    """Identity on a parameter; backward returns (g, g^2): the statistic of whole micro-batches."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, shadow: Tensor) -> Tensor:
        """Return `parameter`."""
        ctx.dtype = shadow.dtype
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient and its square."""
        return grad, grad.to(ctx.dtype).square()


def refuse_further_segment(module: nn.Module) -> None:
    """Refuse a parameter in two re-entrant checkpoints, or in one and outside: each would square its own part of a gradient."""
    segment = 0
    if not torch.is_grad_enabled():
        frame = checkpoint_frame()
        if frame is None:
            return  # nothing is differentiated
        segment = id(frame.f_locals["ctx"])
    for name in notes(module).names:
        if state.segments.setdefault(id(module._parameters[name]), segment) != segment:
            raise UserError(
                f"track: per='micro_batch': '{notes(module).path}.{name}' is used by several re-entrant checkpoints, or by one "
                "and outside of it; call torch.utils.checkpoint with use_reentrant=False"
            )


def forward_squared(module: nn.Module, tracked: Tracked, original: Any, args: Any, kwargs: Any) -> Any:
    """Run forward with every parameter of the subtree replaced by an alias whose backward squares."""
    if state.is_aliasing:
        return original(*args, **kwargs)
    is_outermost = state.aliases is None
    if not is_outermost and not torch.compiler.is_compiling():
        refuse_further_segment(module)
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

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
from largebatch.moments.private import backward_pass, inside_reentrant_checkpoint
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


def forward_squared(module: nn.Module, tracked: Tracked, original: Any, args: Any, kwargs: Any) -> Any:
    """Run forward with every parameter of the subtree replaced by an alias whose backward squares."""
    if not torch.compiler.is_compiling() and backward_pass() >= 0 and inside_reentrant_checkpoint():
        raise UserError(  # each would square its own part of a gradient
            "track: per='micro_batch' does not go with the re-entrant activation checkpoint around "
            f"'{tracked.path}'; call torch.utils.checkpoint with use_reentrant=False"
        )
    if state.is_aliasing:
        return original(*args, **kwargs)
    is_outermost = state.aliases is None
    if is_outermost and _is_cut_up(tracked):
        with Aliasing(tracked):
            return original(*args, **kwargs)
    aliases = state.aliases = {} if state.aliases is None else state.aliases
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

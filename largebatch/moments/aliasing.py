"""The squares of whole backward passes as gradients of shadows, for engines that shard parameters (FSDP2, ZeRO).

During a forward pass, reading a parameter from its module returns an alias, whose backward returns (g, g^2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

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


class Aliased(dict[str, Any]):
    """Replaces a module's ``_parameters``: reading by name returns an alias, iterating yields the parameters themselves.

    Args:
        owner: the module. FSDP2 replaces its parameters during the pass, and ZeRO-3 gathers a parameter that is read with [].
    """

    def __init__(self, owner: nn.Module):
        super().__init__(owner._parameters.items())
        self.held, self.names = owner._parameters, notes(owner).names

    def __getitem__(self, name: str) -> Any:
        """Return the alias of a parameter, the same for all modules and uses in this pass."""
        parameter, aliases = self.held[name], state.aliases
        if name not in self.names or parameter is None or not parameter.requires_grad or not torch.is_grad_enabled():
            return parameter
        if parameter.grad_fn is not None:  # computed from aliases and put in its place by functional_call
            return parameter
        assert aliases is not None
        if id(parameter) not in aliases:
            alias = Square.apply(parameter, self.held[self.names[name]])
            alias._largebatch_parameter = parameter
            aliases[id(parameter)] = parameter, alias
        return aliases[id(parameter)][1]

    def __setitem__(self, name: str, value: Any) -> None:
        """Put a parameter into the module; an alias is replaced by its parameter."""
        self.held[name] = getattr(value, "_largebatch_parameter", value)
        super().__setitem__(name, self.held[name])

    def __delitem__(self, name: str) -> None:
        """Take a parameter out of the module."""
        super().__delitem__(name)
        del self.held[name]

    def __getattr__(self, name: str) -> Any:
        """Return an attribute that an engine keeps on the dict of parameters."""
        return getattr(self.held, name)


@torch.compiler.disable
def forward_squared(module: nn.Module, tracked: Tracked, original: Any, args: Any, kwargs: Any) -> Any:
    """Run ``forward`` with aliases in place of the parameters of the module and its children."""
    if backward_pass() >= 0 and inside_reentrant_checkpoint():
        raise UserError(  # each of its backward passes would square only its own part of a gradient
            "track: per='micro_batch' does not work with the re-entrant activation checkpoint around "
            f"'{tracked.path}'; call torch.utils.checkpoint with use_reentrant=False"
        )
    before, flat = state.aliases, None
    state.aliases = {} if before is None else before
    owners = [owner for owner in tracked.owners if not isinstance(owner._parameters, Aliased)]
    try:
        for owner in owners:
            owner.__dict__["_parameters"] = Aliased(owner)
        if isinstance(module, nn.RNNBase):
            flat = module.__dict__["_flat_weights"]
            module.__dict__["_flat_weights"] = [getattr(module, name) for name in module._flat_weights_names]
        return original(*args, **kwargs)
    finally:
        for owner in owners:
            if isinstance(owner._parameters, Aliased):
                owner.__dict__["_parameters"] = owner._parameters.held
        if flat is not None:
            module.__dict__["_flat_weights"] = flat
        state.aliases = before

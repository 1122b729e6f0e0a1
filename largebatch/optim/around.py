"""The base class of an optimizer that wraps another one, and which optimizers may be wrapped."""

from __future__ import annotations

from typing import Any

import torch

from largebatch.errors import UserError
from largebatch.optim.adaptive import AdaptiveOptimizer
from largebatch.optim.layerwise import LARS
from largebatch.optim.sgd import SGD

# The names of the second moment in the state of torch's optimizers.
SECOND_MOMENTS: dict[type, str | None] = {
    torch.optim.Adam: "exp_avg_sq",
    torch.optim.AdamW: "exp_avg_sq",
    torch.optim.RMSprop: "square_avg",
    torch.optim.Adagrad: "sum",
    torch.optim.SGD: None,
}
OURS = (AdaptiveOptimizer, LARS, SGD)
STATE_DICT_HOOKS = tuple(
    f"_optimizer_{what}_{when}_hooks" for what in ("state_dict", "load_state_dict") for when in ("pre", "post")
)


class Around(torch.optim.Optimizer):
    """Base class of an optimizer that wraps another one and shares its groups, state and hooks.

    Args:
        base: the wrapped optimizer.
    """

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base = base
        super().__setstate__({})  # hooks and profiling; groups and state are those of the base
        for name in STATE_DICT_HOOKS:
            setattr(self, name, getattr(base, name))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's groups, with the values of the reference."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:
        """The base's state by parameter."""
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The base's defaults."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base.defaults = defaults


def second_moment_name(optimizer: torch.optim.Optimizer) -> str | None:
    """Return the name of the second moment to shift in an optimizer's state; None if there is nothing to shift.

    Raises:
        UserError: for an optimizer that cannot be wrapped.
    """
    for cls, name in SECOND_MOMENTS.items():
        if type(optimizer) is cls:
            return name
    if isinstance(optimizer, OURS):
        return None
    known = ", ".join(cls.__name__ for cls in SECOND_MOMENTS)
    raise UserError(
        f"batch_size_invariant: expected {known} of torch.optim or an optimizer of largebatch.optim, got "
        f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    )


def is_decoupled(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """Return whether a group's weight decay is decoupled, that is, not added to the gradient."""
    whole = isinstance(optimizer, torch.optim.AdamW) or getattr(optimizer, "decoupled_weight_decay", False)
    return bool(whole or group.get("decoupled_weight_decay"))

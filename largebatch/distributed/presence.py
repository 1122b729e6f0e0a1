"""Detection of parameters that have a gradient but no squares, because tracking did not intercept an operation."""

from __future__ import annotations

from collections.abc import Callable, Container

import torch
from torch import nn

from largebatch.errors import UserError
from largebatch.moments import is_shadow, shadows
from largebatch.moments.scope import FALLBACK


def largest_gradient(parameter: nn.Parameter) -> float | None:
    """Return the largest absolute element of a parameter's gradient; None without a gradient."""
    gradient = parameter.grad
    if gradient is None:
        return None
    if gradient.layout is torch.sparse_coo:
        gradient = gradient.coalesce().values()
    return float(gradient.abs().max()) if gradient.numel() else 0.0


def check_statistics(
    model: nn.Module,
    num_units: float = 1.0,
    names: Container[str] | None = None,
    largest: Callable[[nn.Parameter], float | None] = largest_gradient,
) -> list[str]:
    """Raise if a parameter has a gradient but no squares.

    If all squares are zero but the gradient is not, the squares are either missing or too small for their data type. Those of
    n units underflow if each unit's gradient is below sqrt(tiny), where tiny is the smallest normal number; the sum of the
    gradients is then below n * sqrt(tiny) (n * 1e-19 in float32). Such a gradient, or one of zero, decides nothing yet.

    Args:
        model: a tracked model, after a backward pass.
        num_units: n, the number of samples or micro-batches whose gradients were added up, over all ranks.
        names: names of the parameters to check; None for all.
        largest: function that returns the largest absolute element of the gradient of a parameter or shadow, over all ranks if
            they are sharded; None without a gradient. A shadow without a gradient has no squares, however small the gradient.

    Returns:
        The names of the parameters whose gradient was too small to decide.

    Raises:
        UserError: naming the parameters without squares (at most eight), and the remedies.
    """
    tracked = shadows(model)
    missing, unknown = [], []
    for name, parameter in model.named_parameters():
        if is_shadow(parameter) or (names is not None and name not in names):
            continue
        gradient, shadow = largest(parameter), tracked.get(name)
        squares = None if shadow is None else largest(shadow)
        if not gradient:
            if parameter.requires_grad:
                unknown.append(name)
        elif shadow is None or squares is None:
            missing.append(name)
        elif squares == 0.0:
            is_told = gradient >= num_units * torch.finfo(shadow.dtype).tiny ** 0.5
            (missing if is_told else unknown).append(name)
    if missing:
        listed = "', '".join(missing[:8]) + ("', ..." if len(missing) > 8 else "'")
        raise UserError(
            f"no second-moment statistic for '{listed}, which got a gradient. Either the parameter was added or unfrozen "
            "after track() (call it again), or it is used outside the tracked module's forward or by an operation that "
            "PyTorch does not show (a custom autograd function, a fused kernel of an engine): name its module in "
            f"{FALLBACK}, or use track(model, per='micro_batch')"
        )
    return unknown


class FirstUpdates:
    """The check of a run: each parameter is checked until an update in which its gradient is large enough to decide.

    Undecided parameters are checked again in updates 2, 4, 8 and so on, which costs little in a long run.
    """

    def __init__(self) -> None:
        self.names: list[str] | None = None
        self._updates, self._next = 0, 1

    def __call__(self, check: Callable[[list[str] | None], list[str]]) -> None:
        """Count an update, and check the undecided parameters if a check is due.

        Args:
            check: takes the names to check, None for all, and returns the undecided ones, the same on every rank.
        """
        if self.names == []:
            return
        self._updates += 1
        if self._updates >= self._next:
            self.names, self._next = check(self.names), 2 * self._updates

"""Finding parameters that have a gradient and no statistic: an operation that used them was not seen."""

from __future__ import annotations

from collections.abc import Callable, Container

import torch
from torch import nn

from largebatch.errors import UserError
from largebatch.moments import is_shadow, shadows
from largebatch.moments.scope import FALLBACK


def largest_gradient(parameter: nn.Parameter) -> float | None:
    """Return the largest absolute element of a parameter's gradient; None where it has none."""
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
    """Raise if a parameter has a gradient and no statistic.

    Squares that are all zero beside a gradient that is not are missing, or too small for their type: those of n units
    vanish where each unit's gradient is below sqrt(tiny), so that their sum is below n * sqrt(tiny), tiny being the smallest
    normal number (n * 1e-19 in float32). Such a gradient says nothing yet, nor does one of zero.

    Args:
        model: tracked, after a backward pass.
        num_units: n, samples or micro-batches whose gradients have been added up, over all ranks.
        names: of the parameters to look at; None for all.
        largest: the largest absolute element of the gradient of a parameter or a shadow, over all ranks where each holds a
            part; None where there is no gradient, which of a shadow is an absence whatever the size of the parameter's.

    Returns:
        The names of those whose gradient was too small to say.

    Raises:
        UserError: naming every parameter without a statistic, and the way out.
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
    """The check of a run: of every parameter once, in the first update whose gradient is large enough to say.

    Those that are left are looked at again in its updates 2, 4, 8 and so on, which costs next to nothing in the end.
    """

    def __init__(self) -> None:
        self.names: list[str] | None = None
        self._updates, self._next = 0, 1

    def __call__(self, check: Callable[[list[str] | None], list[str]]) -> None:
        """Count an update, and check where it is time to.

        Args:
            check: takes the names to look at, None for all, and returns those that are left, on every rank alike.
        """
        if self.names == []:
            return
        self._updates += 1
        if self._updates >= self._next:
            self.names, self._next = check(self.names), 2 * self._updates

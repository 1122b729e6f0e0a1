"""The parameters used in an update: those that received a gradient in the backward pass of a micro-batch on any rank.

On a single process a parameter without a gradient has ``grad`` None, and optimizers skip it: they apply no weight decay, and
change neither its averages nor its count of updates. Engines that reduce gradients fill in zeros instead, with which an
optimizer would change the parameter. The record kept here tells them which of these gradients to remove.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from largebatch.moments import is_shadow


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that a run trains, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad and not is_shadow(p)}


@dataclass(frozen=True)
class Used:
    """The use of parameters in an update.

    Args:
        unused: names of the parameters that no rank used.
        parted: names of the parameters that some ranks reached and others did not.
        early: names of the parameters that a rank reached in an earlier pass but not in its last one.
    """

    unused: list[str]
    parted: list[str]
    early: list[str]


class Usage:
    """The parameters that backward passes reached.

    Args:
        names: names of the trained parameters, the same on all ranks.

    Attributes:
        reached: indices of the parameters that the current backward pass has reached.
        counts: whether the current pass is one of real samples, not of a placeholder for missing ones.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.numbers = {name: number for number, name in enumerate(names)}
        self.reached: set[int] = set()
        self.counts = True
        self._used: set[int] = set()
        self._touched: set[int] = set()
        self._handles: dict[str, Any] = {}

    def watch(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Record when the given leaves receive gradients; only the first leaf of each name is registered."""
        for name, leaf in named:
            if name in self.numbers and name not in self._handles:
                self._handles[name] = leaf.register_hook(self._hook(self.numbers[name]))

    def _hook(self, number: int) -> Callable[[Tensor | None], None]:
        def hook(gradient: Tensor | None) -> None:
            self.reached.add(number)
            self._touched.add(number)
            if gradient is not None and self.counts:  # a custom function may return None
                self._used.add(number)

        hook.__torch_unserializable__ = True  # type: ignore[attr-defined]  # the hook is not pickled
        hook.only_looks = True  # type: ignore[attr-defined]  # squares of samples refuse those that may change a gradient
        return hook

    def begin_pass(self, counts: bool) -> None:
        """Start to record a pass; ``counts`` tells whether it is one of real samples."""
        self.reached.clear()
        self.counts = counts

    def collect(self, over_ranks: Callable[[Tensor], Tensor], device: torch.device) -> Used:
        """Return the parameters that the passes of all ranks used since the last call; a collective.

        Args:
            over_ranks: returns a tensor's sum over ranks.
            device: device of the tensors for `over_ranks`.
        """
        sets = self._used, self._touched, self._touched - self.reached
        rows = [[number in found for number in range(len(self.numbers))] for found in sets]
        ranks = torch.ones(1, len(self.numbers), device=device)
        totals = over_ranks(torch.cat([torch.tensor(rows, device=device).float(), ranks])).tolist()
        self.forget()
        places = list(zip(self.numbers, *totals, strict=True))
        return Used(
            unused=[name for name, used, _, _, _ in places if used == 0],
            parted=[name for name, _, touched, _, of in places if 0 < touched < of],
            early=[name for name, _, _, early, _ in places if early > 0],
        )

    def forget(self) -> None:
        """Start the record of the next update, without communication."""
        self._used.clear()
        self._touched.clear()

    def close(self) -> None:
        """Remove the hooks from the parameters."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

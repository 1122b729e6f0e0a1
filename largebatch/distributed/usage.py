"""Which parameters took part in an update: those that a backward pass of any micro-batch, on any rank, gave a gradient.

On one process a parameter without a gradient has ``grad`` None, and optimizers leave it alone: its weight decay, its
averages and its count of updates too. Engines that reduce gradients fill in zeros instead, by which an optimizer would move
it. They are told by this which ones to take out again.
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
    """What an update has used.

    Args:
        unused: names of the parameters that no rank has used.
        parted: of those that some ranks reached and others did not.
        early: of those that a rank reached before its last pass and not in that.
    """

    unused: list[str]
    parted: list[str]
    early: list[str]


class Usage:
    """The parameters that backward passes reached.

    Args:
        names: of the trained parameters, alike on all ranks.

    Attributes:
        reached: numbers of the parameters that the pass under way has come by.
        counts: whether the pass under way is one of samples, and not of a stand-in for them.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.numbers = {name: number for number, name in enumerate(names)}
        self.reached: set[int] = set()
        self.counts = True
        self._used: set[int] = set()
        self._touched: set[int] = set()
        self._handles: dict[str, Any] = {}

    def watch(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Take note of the gradients of some leaves; of a name only the first."""
        for name, leaf in named:
            if name in self.numbers and name not in self._handles:
                self._handles[name] = leaf.register_hook(self._hook(self.numbers[name]))

    def _hook(self, number: int) -> Callable[[Tensor | None], None]:
        def hook(gradient: Tensor | None) -> None:
            self.reached.add(number)
            self._touched.add(number)
            if gradient is not None and self.counts:  # a custom function may come by without one
                self._used.add(number)

        hook.__torch_unserializable__ = True  # type: ignore[attr-defined]  # it belongs to this run
        hook.only_looks = True  # type: ignore[attr-defined]  # squares of samples refuse those that may change a gradient
        return hook

    def begin_pass(self, counts: bool) -> None:
        """Say that a pass begins, and whether it is one of samples."""
        self.reached.clear()
        self.counts = counts

    def collect(self, over_ranks: Callable[[Tensor], Tensor], device: torch.device) -> Used:
        """Return what the passes since the last call, of all ranks, have used; every rank takes part.

        Args:
            over_ranks: returns a tensor's sum over ranks.
            device: that it works on.
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
        """Begin the notes of the next update, without a word to other ranks."""
        self._used.clear()
        self._touched.clear()

    def close(self) -> None:
        """Let go of the parameters."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

"""The modules that a forward pass runs, which must be the same on all ranks if an engine shards the model.

Collectives gather each module's weights, and reduce its gradients, in the order in which the modules run. Ranks that run
different modules would take part in collectives of different parameters: with different sizes a process ends without an
error message, with equal sizes weights are silently mixed. Therefore the ranks compare their routes before the backward pass,
where gradients would be mixed. A rank whose route deviates from that of its previous pass announces it immediately, so that
the other ranks can name the cause if a process ends.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from largebatch.errors import SharedError

ADVICE = "every rank has to run the same modules in each pass; use --backend.name ddp"


class Route:
    """The modules that forward passes run, in order.

    Args:
        named: (name, module) of the modules to record.
        announce: publishes a line that the other ranks can read.
        engine: name of the engine, for messages.
        advice: advice to the user if ranks differ, for messages.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Module]],
        announce: Callable[[str], None],
        engine: str,
        advice: str = ADVICE,
    ) -> None:
        self.announce, self.engine, self.advice = announce, engine, advice
        self._recording = False
        self._passes = 0
        self._route: list[str] = []
        self._before: list[str] = []
        self._left = ""
        # prepend=True runs the hook before the engine's hook that gathers weights.
        self._handles: list[Any] = [m.register_forward_pre_hook(self._hook(name), prepend=True) for name, m in named]

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            if self._recording:
                self._take(name)

        return hook

    def _take(self, name: str) -> None:
        place = len(self._route)
        self._route.append(name)
        expected = self._before[place] if place < len(self._before) else "none"
        if self._passes > 1 and not self._left and name != expected:
            self._left = f"ran module '{name}', in the pass before '{expected}'"
            self.announce(f"{self._passes} {self._left}")

    def begin_pass(self) -> None:
        """Start to record a forward pass."""
        self._before, self._route = self._route, []
        self._passes += 1
        self._left, self._recording = "", True

    def where(self) -> str:
        """Return a description of the current forward pass, if it may be why another rank is gone; else an empty string."""
        if not self._recording or not self._route or not (self._left or self._passes == 1):
            return ""
        at = self._left or f"was at module '{self._route[-1]}' of its first"
        return (
            f"; in a forward pass, this rank {at}: {self.engine} ends so where ranks run other modules ({self.advice})"
        )

    def agree(
        self, over_ranks: Callable[[Tensor], Tensor], share: Callable[[Any], list[Any]], device: torch.device
    ) -> None:
        """Compare the routes of all ranks, before the backward pass; a collective.

        Args:
            over_ranks: returns a tensor's sum over ranks.
            share: returns the values of all ranks.
            device: device of the tensors for `over_ranks`.

        Raises:
            SharedError: on every rank, naming the first modules that differ.
        """
        self._recording = False
        # The digests d are equal if W * sum(d^2) = sum(d)^2; with 16 bits each, this is exact in float64.
        digest = zlib.crc32("\n".join(self._route).encode())
        halves = [float(digest & 0xFFFF), float(digest >> 16)]
        values = [1.0, *halves, *(half**2 for half in halves)]
        count, *sums = over_ranks(torch.tensor(values, dtype=torch.float64, device=device)).tolist()
        if all(count * squares == total**2 for total, squares in zip(sums[:2], sums[2:], strict=True)):
            return
        routes = share(self._route)
        first = routes[0]
        other = next(rank for rank, route in enumerate(routes) if route != first)
        place = next(
            i for i in range(max(len(first), len(routes[other]))) if first[i : i + 1] != routes[other][i : i + 1]
        )
        here, there = (f"'{route[place]}'" if place < len(route) else "none" for route in (first, routes[other]))
        raise SharedError(
            f"model: in one pass rank 0 ran module {here} where rank {other} ran {there}, which {self.engine} cannot do: "
            f"{self.advice}"
        )

    def close(self) -> None:
        """Remove the hooks from the modules."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

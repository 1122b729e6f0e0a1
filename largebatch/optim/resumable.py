"""State dicts and copies of `largebatch.optim.invariant`."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from largebatch.errors import UserError
from largebatch.moments.micro_batches import MicroBatchSquares
from largebatch.noise.estimator import NoiseScale
from largebatch.optim.around import Around
from largebatch.optim.damping import Damping, forget_damping
from largebatch.optim.limit import LimitWatch
from largebatch.optim.progress import Progress, stretch

KEY = "batch_size_invariant"  # in the first group of a state dict


class Resumable(Around):
    """The methods of `BatchSizeInvariant` that save, load and copy it."""

    reference_batch_size: int
    micro_batch_size: int
    loss: Literal["mean", "sum"]
    _moment_name: str | None
    _progress: Progress
    _noise: NoiseScale
    _squares: MicroBatchSquares
    _damping: Damping | None
    _watch: LimitWatch

    @abstractmethod
    def _parameters(self) -> Iterator[tuple[str, Tensor]]: ...

    def to_torch(self) -> torch.optim.Optimizer:
        """Return the plain optimizer with its groups and state, for the reference batch size; this one can no longer step."""
        self._squares.require_idle()
        for group in self.param_groups:
            for p in group["params"]:
                count = self._progress.counts.get(p)
                if count is not None and count.updates:
                    stretch(self.state[p], count.at(float(group["betas"][1])) / count.stretch)
        forget_damping(list(self.state.values()))
        self.param_groups[0].pop(KEY, None)
        self._squares.close()
        return self.base

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state dict; its first group has a key ``batch_size_invariant`` with all else that a resume needs.

        It is in a group because torch.distributed.checkpoint saves only groups and the state of parameters. What it saves lacks
        the last gradient: if updates have a single backward pass, the first estimate after a resume is less accurate.
        """
        if self._damping is not None:
            self._damping.make_templates()
        state = self.base.state_dict()
        first, *others = state["param_groups"]
        return {**state, "param_groups": [{**first, KEY: self._own_state()}, *others]}

    def _own_state(self) -> dict[str, Any]:
        parameters = [p for _, p in self._parameters()]
        slots = [self._squares.slots[p] for p in parameters]
        return {
            "reference_batch_size": self.reference_batch_size,
            **self._progress.state_dict(parameters),
            "noise": self._noise.state_dict(),
            "limit": self._watch.meter.state_dict(),
            # If updates have one backward pass: the previous gradient, from which the next change is computed.
            "previous": {index: slot.region for index, slot in enumerate(slots) if slot.holds == "previous"},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned, or that of a plain optimizer which was trained at the reference.

        Raises:
            UserError: if the state was saved with another reference batch size.
        """
        first, *others = state_dict["param_groups"]
        own = first.get(KEY)
        if own:
            self._require_reference(own)
        self.base.load_state_dict({**state_dict, "param_groups": [{**first, KEY: {}}, *others]})
        if not own:
            sizes = {
                "reference_batch_size": self.reference_batch_size,
                "micro_batch_size": self.micro_batch_size,
            }
            own = type(self)(self.base, **sizes)._own_state()
        self._load_own_state(own)

    def _require_reference(self, own: dict[str, Any]) -> None:
        if own["reference_batch_size"] != self.reference_batch_size:
            raise UserError(
                f"reference_batch_size: the state was saved with {own['reference_batch_size']}, this optimizer has "
                f"{self.reference_batch_size}; expected the same"
            )

    def _load_own_state(self, own: dict[str, Any]) -> None:
        parameters = [p for _, p in self._parameters()]
        self._progress.load_state_dict(own, parameters, self._moment_name)
        if self._damping is not None:
            self._damping.loaded()
        else:
            forget_damping(list(self.state.values()))
        self._noise.load_state_dict(own["noise"])
        if "limit" in own:  # missing in states of earlier versions
            self._watch.meter.load_state_dict(own["limit"])
        self._squares.take_previous({parameters[index]: tensor for index, tensor in own["previous"].items()})

    def __getstate__(self) -> dict[str, Any]:
        arguments = {
            "reference_batch_size": self.reference_batch_size,
            "micro_batch_size": self.micro_batch_size,
            "loss": self.loss,
            "process_group": self._squares.process_group,
            "damping": self._damping is not None,
        }
        own = self._own_state() | {"announced": self._progress.announced}
        return {"base": self.base, "arguments": arguments, "own": own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["base"], **state["arguments"])  # type: ignore[misc]
        self._load_own_state(state["own"])
        self._progress.announced = state["own"]["announced"]

    def __deepcopy__(self, memo: dict[int, Any]) -> Resumable:
        state = self.__getstate__()
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        base, own = copy.deepcopy((state["base"], state["own"]), memo)
        copied.__setstate__({"base": base, "arguments": state["arguments"], "own": own})
        return copied

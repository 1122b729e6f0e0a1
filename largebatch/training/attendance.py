"""Which samples of an update came: some may turn out to be unreadable, and all ranks have to know before its last pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from largebatch.data.workers import MicroBatch
from largebatch.distributed import Backend
from largebatch.errors import SharedError, UnreadableError, first_few


@dataclass
class Attendance:
    """The samples of an update: how many came, and which did not.

    Args:
        num_samples: samples announced, over all ranks; after `call` those that came.
        num_units: units of the squares, as announced; after `call` those of the samples that came.
        of_samples: whether each sample is a unit; else each micro-batch.
    """

    num_samples: int
    num_units: float
    of_samples: bool
    sizes: list[int] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def add(self, micro_batch: MicroBatch) -> None:
        """Count a micro-batch of this rank."""
        self.sizes.append(micro_batch.num_samples)
        self.missing += filter(None, micro_batch.missing.values())

    def call(self, backend: Backend) -> list[str]:
        """Count the micro-batches of all ranks, before the last pass of an update; return what is missing, and why.

        Every rank takes part, and comes to the same.

        Raises:
            UnreadableError: if nothing is left of the update.
            SharedError: if nothing of it has a target.
        """
        mine = [sum(self.sizes), sum(size**2 for size in self.sizes)]
        num_samples, of_squares = map(int, backend.sum(torch.tensor(mine, dtype=torch.float64)).tolist())
        if num_samples == self.num_samples:
            return []
        missing = everyones(self.missing, backend)
        if num_samples == 0:
            if not missing:
                raise SharedError("data: every target of an update is ignored (-100); there is nothing to learn from")
            raise UnreadableError(f"data.path: nothing is left of an update: {first_few(missing)}")
        self.num_samples = num_samples
        self.num_units = float(num_samples) if self.of_samples else num_samples**2 / of_squares
        backend.shrink_update(num_samples, self.num_units)
        return missing


def everyones(missing: Iterable[str], backend: Backend) -> list[str]:
    """Return what any rank says is missing, each once. A collective."""
    return sorted({line for lines in backend.gather(list(missing)) for line in lines})


def note(missing: Sequence[str], known: list[str], stops: bool) -> str | None:
    """Return what to tell of samples that are left out, None where it was told before; ``known`` takes them in.

    Raises:
        UnreadableError: where the run stops at the first.
    """
    if missing and stops:
        raise UnreadableError(f"data.path: {first_few(missing)}")
    new = [line for line in missing if line not in known]
    if not new:
        return None
    known += new
    return f"left out, {len(known):,} in all: {first_few(new)}"

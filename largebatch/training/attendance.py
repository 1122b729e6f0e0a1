"""Count of the samples of an update that could be read, on which all ranks agree before the last pass of the update."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from largebatch.data.workers import MicroBatch
from largebatch.distributed import Backend
from largebatch.errors import SharedError, UnreadableError, first_few


@dataclass
class Attendance:
    """The samples of an update: how many could be read, and which could not.

    Args:
        num_samples: number of samples announced, over all ranks; after `call`, number of samples that could be read.
        num_units: number of units of the squares, as announced; after `call`, that of the samples that could be read.
        of_samples: whether each sample is a unit; if False, each micro-batch is one.
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
        """Count the micro-batches of all ranks before the last pass of an update; return a line for each missing sample.

        Every rank calls it and gets the same result.

        Raises:
            UnreadableError: if no sample of the update could be read.
            SharedError: if every target of the update is ignored.
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
    """Return the lines of all ranks about missing samples, each line once. This is a collective."""
    return sorted({line for lines in backend.gather(list(missing)) for line in lines})


def note(missing: Sequence[str], known: list[str], stops: bool) -> str | None:
    """Return the message about missing samples, or None if all of them are in ``known``; add the new ones to ``known``.

    Raises:
        UnreadableError: if samples are missing and ``stops`` is true.
    """
    if missing and stops:
        raise UnreadableError(f"data.path: {first_few(missing)}")
    new = [line for line in missing if line not in known]
    if not new:
        return None
    known += new
    return f"left out, {len(known):,} in all: {first_few(new)}"

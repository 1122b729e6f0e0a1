"""A batch on its way from a worker process to its rank."""

from __future__ import annotations

import pickle
from multiprocessing.reduction import ForkingPickler
from typing import Any

from largebatch.data.source import Batch


class Parcel:
    """A batch on its way from a worker: in memory that it shares with the rank, or as bytes where there is none to share.

    It is packed before it is queued: what fails in the queue's own thread is dropped there, and waited for in vain.

    Args:
        batch: the batch.
    """

    def __init__(self, batch: Batch) -> None:
        self.batch: Batch | None = None
        self.shortage: str | None = None
        try:
            self.data = bytes(ForkingPickler.dumps(batch))
        except (OSError, RuntimeError) as error:  # /dev/shm is full or missing, or there is no folder for a socket
            self.data, self.shortage = pickle.dumps(batch), str(error)

    def open(self) -> Batch:
        """Return the batch; once, as the worker hands its memory over."""
        return pickle.loads(self.data) if self.batch is None else self.batch

    def pin_memory(self) -> Parcel:
        """Open it in pinned memory, as a DataLoader's thread for that asks."""
        inputs, targets, *missing = self.open()
        pinned: Any = (inputs.pin_memory(), targets.pin_memory(), *missing)
        self.batch = pinned
        return self

"""Transfer of a batch from a worker process to its rank."""

from __future__ import annotations

import pickle
from multiprocessing.reduction import ForkingPickler
from typing import Any

from largebatch.data.source import Batch


class Parcel:
    """A batch that a worker sends to its rank in shared memory, or as bytes if no shared memory is available.

    It is pickled before it is queued: the queue's own thread would drop a batch that fails there, and the rank would wait for
    it forever.

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
        """Return the batch; call it only once, because the worker's memory is handed over."""
        return pickle.loads(self.data) if self.batch is None else self.batch

    def pin_memory(self) -> Parcel:
        """Open the batch and copy it to pinned memory; called by the DataLoader's pin_memory thread."""
        inputs, targets, *missing = self.open()
        pinned: Any = (inputs.pin_memory(), targets.pin_memory(), *missing)
        self.batch = pinned
        return self

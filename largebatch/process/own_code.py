"""Protection of the run's process against side effects of user code that runs in it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from largebatch.process.output import to_be_spoilt


@contextmanager
def process_kept() -> Iterator[None]:
    """Restore standard output and error, the working directory and torch's default device at the end of the context.

    Code that closes or replaces the standard streams would end or silence the run. The run folder may be relative to the
    working directory, and the run's own tensors are created on the default device.
    """
    streams, device = (sys.stdout, sys.stderr), _default_device()
    descriptors = {number: os.dup(number) for number in (1, 2) if _is_open(number)}
    sys.stdout, sys.stderr = map(to_be_spoilt, streams)
    try:
        with folder_kept():
            yield
    finally:
        sys.stdout, sys.stderr = streams
        for number, copy in descriptors.items():
            os.dup2(copy, number)
            os.close(copy)
        if _default_device() != device:
            torch.set_default_device(device)


@contextmanager
def folder_kept() -> Iterator[None]:
    """Restore the working directory, to which a run folder may be relative, at the end of the context."""
    folder = os.open(".", os.O_RDONLY)
    try:
        yield
    finally:
        with suppress(OSError):  # the directory has been removed
            os.fchdir(folder)
        os.close(folder)


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _default_device() -> torch.device | None:
    """Return the device set by torch.set_default_device, regardless of device contexts; None if none is set."""
    context = getattr(getattr(torch, "_GLOBAL_DEVICE_CONTEXT", None), "device_context", None)
    return None if context is None else context.device

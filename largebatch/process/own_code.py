"""Code of the user's that runs in the run's own process: what it may leave behind there."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from largebatch.process.output import to_be_spoilt


@contextmanager
def process_kept() -> Iterator[None]:
    """Put back what a run needs as it was: standard output and error, the working directory, torch's default device.

    Code that closes or replaces the first would end the run or silence it; a run folder is relative to the second; and
    the run's own tensors are made on the third.
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
    """Come back to the working directory, to which a run folder may be relative."""
    folder = os.open(".", os.O_RDONLY)
    try:
        yield
    finally:
        with suppress(OSError):  # it is gone
            os.fchdir(folder)
        os.close(folder)


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _default_device() -> torch.device | None:
    """Return what torch.set_default_device has set, whatever device a context chooses; None for nothing."""
    context = getattr(getattr(torch, "_GLOBAL_DEVICE_CONTEXT", None), "device_context", None)
    return None if context is None else context.device

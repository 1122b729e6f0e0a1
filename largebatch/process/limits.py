"""Limits of the operating system on a process, and what to do about them."""

from __future__ import annotations

import errno

OPEN_FILES_ADVICE = "raise the limit of open files (ulimit -n)"


def is_out_of_files(error: BaseException) -> bool:
    """Return whether a process, or the machine, has as many open files as it may."""
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)

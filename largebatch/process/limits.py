"""Limits of the operating system on a process, and advice for users."""

from __future__ import annotations

import errno

OPEN_FILES_ADVICE = "raise the limit of open files (ulimit -n)"


def is_out_of_files(error: BaseException) -> bool:
    """Return whether the process or the machine has reached its limit of open files."""
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)

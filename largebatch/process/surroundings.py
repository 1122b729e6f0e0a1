"""Settings that libraries require and a container may lack: a folder for temporary files, a user name, a home directory."""

from __future__ import annotations

import getpass
import os
import tempfile
from pathlib import Path


def settle(out: Path | None) -> None:
    """Provide the settings that libraries read when they are imported; call it before the first of them is imported.

    Args:
        out: the run folder; it, or a parent of it, is used for temporary files if the system has no folder for them.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):  # the user id has no password entry, as in containers
        os.environ["LOGNAME"] = f"uid{os.getuid()}"
    if "HOME" not in os.environ:
        try:
            Path.home()
        except RuntimeError:
            os.environ["HOME"] = "/"
    try:
        tempfile.gettempdir()
    except FileNotFoundError:  # the file system is read-only except for one folder
        places = [] if out is None else [out.absolute(), *out.absolute().parents]
        found = next((place for place in places if os.access(place, os.W_OK | os.X_OK)), None)
        tempfile.tempdir = str(found or Path("/tmp"))  # without one, the check of the run folder reports the error
        os.environ["TMPDIR"] = tempfile.tempdir  # for child processes

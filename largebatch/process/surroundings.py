"""What libraries take for granted and a container may lack: a place for temporary files, a name of the user."""

from __future__ import annotations

import getpass
import os
import tempfile
from pathlib import Path


def settle(out: Path | None) -> None:
    """See that libraries find what they ask for at import, before the first of them is imported.

    Args:
        out: the run folder, in or above which temporary files may lie where the system has no room for them.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):  # a user id without an entry, as containers are given
        os.environ["LOGNAME"] = f"uid{os.getuid()}"
    if "HOME" not in os.environ:
        try:
            Path.home()
        except RuntimeError:
            os.environ["HOME"] = "/"
    try:
        tempfile.gettempdir()
    except FileNotFoundError:  # a file system that is read-only but for one folder
        places = [] if out is None else [out.absolute(), *out.absolute().parents]
        found = next((place for place in places if os.access(place, os.W_OK | os.X_OK)), None)
        tempfile.tempdir = str(found or Path("/tmp"))  # where there is none, the run folder's own line says so
        os.environ["TMPDIR"] = tempfile.tempdir  # for processes that are started

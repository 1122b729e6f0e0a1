"""Rank of this process, from its launcher's environment variables; a shell may still have those of another job."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

from largebatch.errors import UserError

# Variable with the file from which launch/torchrun.sh reads the exit codes of its processes: torchrun replaces all by 1.
EXIT_CODES = "LARGEBATCH_EXIT_CODES"
# Exit codes of failures that a restart would repeat: a user's mistake, a divergence.
FINAL_CODES = (2, 3)
NAMES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """Rank of this process in its run.

    Args:
        rank: its rank, from 0.
        local_rank: its rank on its node.
        world_size: number of processes of the run.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1


def launched_place(needs_address: bool = True) -> Place:
    """Read rank and world size from torchrun's environment variables; without WORLD_SIZE, return those of a single process.

    Args:
        needs_address: whether several processes still have to connect to each other, at MASTER_ADDR and MASTER_PORT.

    Raises:
        UserError: if the variables are not valid, or if fewer nodes have joined than were requested.
    """
    given = {name: os.environ.get(name, "").strip() for name in NAMES}
    if not given["WORLD_SIZE"]:
        return Place()
    lone = "0" if given["WORLD_SIZE"] == "1" else ""
    try:
        place = Place(int(given["RANK"] or lone), int(given["LOCAL_RANK"] or lone), int(given["WORLD_SIZE"]))
        is_place = place.local_rank >= 0 and 0 <= place.rank < place.world_size
        if place.world_size > 1 and needs_address:
            is_place = is_place and bool(given["MASTER_ADDR"]) and 0 <= int(given["MASTER_PORT"]) < 2**16
    except ValueError:
        is_place = False
    if not is_place:
        words = ", ".join(f"{name} is {value or 'not set'}" for name, value in given.items())
        raise UserError(
            f"environment: {words}: no place in a run; start with torchrun, or, where another job has left them in this shell, "
            f"unset {' '.join(NAMES)}"
        )
    if is_under_torchrun():
        _check_nodes()
    return place


def _check_nodes() -> None:
    """Check that as many nodes have joined as torchrun was started for, if its environment variables give the number.

    torchrun regards a node whose clock is slow as dead, and continues without it, whatever the requested number of nodes.

    Raises:
        UserError: if fewer nodes have joined.
    """
    asked, came = (os.environ.get(name, "") for name in ("PET_NNODES", "GROUP_WORLD_SIZE"))
    fewest = asked.partition(":")[0]
    if fewest.isdigit() and came.isdigit() and int(came) < int(fewest):
        raise UserError(
            f"torchrun: {fewest} nodes were asked for, {came} came ({platform.node()}): torchrun takes a node for dead whose "
            "clock is behind by more than its keep-alive time; set the clocks of all nodes alike (NTP)"
        )


def tell_begun() -> None:
    """Tell launch/torchrun.sh that this process has started, and therefore that the nodes have joined."""
    _tell("begun")


def hand_over(code: int, is_final: bool = False) -> int:
    """Tell launch/torchrun.sh the exit code of this process, and return the exit code for torchrun.

    torchrun restarts the processes if one exits with another code than 0.

    Args:
        code: the exit code.
        is_final: whether torchrun must not restart the run; it never does for `FINAL_CODES`.
    """
    return 0 if _tell(str(code)) and (is_final or code in FINAL_CODES) else code


def _tell(word: str) -> bool:
    path = os.environ.get(EXIT_CODES)
    if not path or not is_under_torchrun():
        return False
    try:
        with open(path, "a", encoding="ascii") as file:
            file.write(f"{word}\n")
    except OSError:
        return False
    return True


def is_under_torchrun() -> bool:
    """Return whether torchrun started this process; two variables are checked, as one may be left from another job."""
    return all(os.environ.get(name) for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE"))

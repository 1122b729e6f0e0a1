"""Which process of a run this one is, as its launcher's environment says; a shell may still hold another job's."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

from largebatch.errors import UserError

# Where launch/torchrun.sh wants to find how its processes ended: torchrun makes 1 of every code.
EXIT_CODES = "LARGEBATCH_EXIT_CODES"
# Codes of what another start would meet again: the user's mistake, a divergence.
FINAL_CODES = (2, 3)
NAMES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """Place of this process among the processes of its run.

    Args:
        rank: its number, from 0.
        local_rank: its number on its node.
        world_size: processes of the run.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1


def launched_place(needs_address: bool = True) -> Place:
    """Read the place that torchrun sets. Without WORLD_SIZE there is one process, whatever else is set.

    Args:
        needs_address: whether several processes have yet to meet, at MASTER_ADDR and MASTER_PORT.

    Raises:
        UserError: if the variables name no place in a run, or fewer nodes have come together than were asked for.
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
    """See that as many nodes have come together as torchrun was told of, where its environment says how many.

    Torchrun takes a node whose clock is behind for dead and goes on without it, however many it was to wait for.

    Raises:
        UserError: if there are fewer.
    """
    asked, came = (os.environ.get(name, "") for name in ("PET_NNODES", "GROUP_WORLD_SIZE"))
    fewest = asked.partition(":")[0]
    if fewest.isdigit() and came.isdigit() and int(came) < int(fewest):
        raise UserError(
            f"torchrun: {fewest} nodes were asked for, {came} came ({platform.node()}): torchrun takes a node for dead whose "
            "clock is behind by more than its keep-alive time; set the clocks of all nodes alike (NTP)"
        )


def tell_begun() -> None:
    """Let launch/torchrun.sh know that this process has begun, so that the nodes have come together."""
    _tell("begun")


def hand_over(code: int, is_final: bool = False) -> int:
    """Tell launch/torchrun.sh with which exit code this process ends; return the one that torchrun is to see.

    Torchrun starts again whatever ends with another code than 0.

    Args:
        code: the exit code.
        is_final: whether the run shall not be started again by torchrun; so it is for `FINAL_CODES`.
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
    """Return whether torchrun started this process: one variable alone may be left of another job."""
    return all(os.environ.get(name) for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE"))

"""Which process of a run this one is, as its launcher's environment says; a shell may still hold another job's."""

from __future__ import annotations

import os
from dataclasses import dataclass

from largebatch.errors import UserError

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
        UserError: if the variables name no place in a run.
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
    return place


def is_under_torchrun() -> bool:
    """Return whether torchrun started this process: one variable alone may be left of another job."""
    return all(os.environ.get(name) for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE"))

"""The values of an optimizer's groups, and its second moment, at another batch size than its reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from largebatch.moments.micro_batches import Units
from largebatch.moments.projection import Slot
from largebatch.optim.around import is_decoupled
from largebatch.optim.averages import Moment
from largebatch.optim.fused import may_fuse
from largebatch.optim.progress import follow_state
from largebatch.optim.quench import Quench
from largebatch.optim.shift import Count, Row, coefficient_at, shift_of


@contextmanager
def values_at(
    optimizer: torch.optim.Optimizer, kappa: float, batch_size: int, num_units: float, shortest: float
) -> Iterator[None]:
    """Return a context in which the groups have their values at a batch size; afterwards they have those of the reference.

    Args:
        optimizer: an optimizer whose groups have the values of the reference.
        kappa: B / B_ref.
        batch_size: B.
        num_units: n, the number of units that were squared.
        shortest: as in `largebatch.scaling.second_moment_coefficient`.
    """
    names = ("lr", "betas", "alpha", "fused")
    groups = optimizer.param_groups
    written = [{name: group[name] for name in names if name in group} for group in groups]
    try:
        for group in groups:
            group.update(_scaled(optimizer, group, kappa, shortest))
            if isinstance(optimizer, Quench):
                group["batch_size"], group["num_units"] = batch_size, num_units
        yield
    finally:
        optimizer.__dict__.pop("moment_source", None)
        for group, values in zip(groups, written, strict=True):
            group.update(values)


def _scaled(optimizer: torch.optim.Optimizer, group: dict[str, Any], kappa: float, shortest: float) -> dict[str, Any]:
    """Return those values of a group that change at this batch size."""
    values: dict[str, Any] = {}
    if may_fuse(optimizer, group, optimizer.state):
        values["fused"] = True
    if isinstance(optimizer, Quench) or kappa == 1.0:
        return values
    values["lr"] = group["lr"] * kappa
    if "betas" in group:
        values["betas"] = (group["betas"][0], coefficient_at(group, kappa, shortest))
    if "alpha" in group:
        values["alpha"] = coefficient_at(group, kappa, shortest)
    return values


def moved_rows(
    optimizer: torch.optim.Optimizer,
    name: str,
    units: Units,
    *,
    kappa: float,
    counts: dict[Tensor, Count],
    shortest: float,
) -> list[Row]:
    """Return how the second moment of each parameter is shifted, and count the update.

    Args:
        optimizer: an optimizer of torch.
        name: name of its second moment in the state.
        units: the units of the update.
        kappa: B / B_ref.
        counts: the counts of each parameter's second moment, changed in place.
        shortest: as in `largebatch.scaling.second_moment_coefficient`.
    """
    slots = {slot.parameter: slot for slot in units.slots}
    rows: list[Row] = []
    bounded = kappa < 1.0 or not units.equal
    for group in optimizer.param_groups:
        if any(not optimizer.state[p] for p in group["params"] if p in slots):
            optimizer._init_group(group, [], [], [], [], [], [])  # type: ignore[attr-defined]
    follow_state(optimizer, name, counts)
    for group in optimizer.param_groups:
        present = [p for p in group["params"] if p in slots]
        decay = 0.0 if is_decoupled(optimizer, group) else group["weight_decay"]
        for p in present:
            state = optimizer.state[p]
            count = counts.setdefault(p, Count())
            shift = shift_of(optimizer, group, kappa, bounded=bounded, count=count, shortest=shortest)
            maximize = group.get("maximize", False)
            averages = state.get("exp_avg"), state.get("max_exp_avg_sq"), state.get("grad_avg")
            rows.append(Row(slots[p], state[name], shift, decay, maximize, *averages, eps=group["eps"]))
    return rows


def moment_of(slots: list[Slot], units: Units, spread: float, kappa: float) -> Moment:
    """Return the second moment of the reference batch, for an optimizer of this package.

    Args:
        slots: the slots of the parameters.
        units: the units of the update.
        spread: 1 / (1 + B_t / B_{t-1}), for a single unit, where the change between two updates replaces the spread of units.
        kappa: B / B_ref.
    """
    regions = [slot.region for slot in slots]
    if units.num_units > 1:
        share = (kappa - 1.0) / (units.num_units - 1.0)
        return Moment(regions, share, units.scale, kappa, equal=units.equal)
    variances = []
    for slot, region in zip(slots, regions, strict=True):
        gradient = slot.gradient()
        change = torch.add(gradient, region, alpha=-units.clip) if slot.holds == "previous" else gradient
        variances.append(change.square().mul_(spread if slot.holds == "previous" else 1.0))
    return Moment(variances, kappa - 1.0, 1.0, kappa, of_variance=True)

"""A config, resolved: everything that follows from it for a data set and a number of ranks, derived once."""

from __future__ import annotations

import math
from dataclasses import replace

from largebatch.config.schema import Config
from largebatch.models import FactoryModel
from largebatch.planner.advice import advice
from largebatch.planner.checks import check_config, check_plan
from largebatch.planner.derive import (
    clips_reference,
    damps,
    largest_batch,
    measures_noise,
    reference,
    second_moment,
    tracked,
)
from largebatch.planner.run import Run
from largebatch.scaling.plan import Plan
from largebatch.scaling.schedules import Warmup

# Multiple of the reference batch from the first update on, above which two micro-batches an update are too few at first, when
# the average has hardly begun: an element whose two gradients happen to agree takes too large a step (docs/results.md).
TWO_SUFFICE, EARLY_UNITS = 16, 4


def resolve(config: Config, num_train: int, world_size: int = 1, group_size: int = 1) -> Run:
    """Resolve a config.

    Args:
        config: the config.
        num_train: samples in the training set.
        world_size: ranks.
        group_size: samples that a normalisation layer takes its statistics over; batches are multiples of it.

    Raises:
        UserError: if the config's sections do not go together, or the batch sizes cannot be had on these ranks.
    """
    check_config(config, num_train, world_size, group_size)
    plan = _plan(config, num_train, group_size)
    check_plan(config, plan, world_size * group_size)
    largest = largest_batch(config, plan)
    run = Run(
        config=config,
        plan=replace(plan, least_units=_least_units(config, plan), wants_units=_wants_units(config)),
        world_size=world_size,
        group_size=group_size,
        largest_batch=largest,
        second_moment=second_moment(config),
        tracked=tracked(config),
        measures_noise=measures_noise(config),
        damps=damps(config),
        clips_reference=clips_reference(config),
        fallback=config.model.fallback if isinstance(config.model, FactoryModel) else (),
    )
    return replace(run, warnings=tuple(advice(run)))


def _plan(config: Config, num_train: int, group_size: int) -> Plan:
    schedule, batch = config.schedule, config.batch
    return Plan(
        reference(config),
        batch.size,
        schedule.total_samples(num_train),
        num_train,
        schedule.build(num_train),
        _warmup(config, num_train),
        schedule.realize,
        batch.max_size if schedule.realize != "lr" else None,
        group_size,
        batch.at_epoch_end,
    )


def _warmup(config: Config, num_train: int) -> Warmup:
    """Return the warm-up; where its start is not given, from the reference's learning rate or the batch next to its own."""
    tuned, size, warmup = reference(config), config.batch.size, config.warmup
    start = warmup.start
    if start is None and warmup.grows_batch():
        kappa = max(1.0, size / tuned.batch_size)
        start = 0.5 ** int(math.log2(kappa))  # from the halving of the batch next above the reference's
    elif start is None:
        start = min(1.0, tuned.lr / tuned.at(size)["lr"])
    return Warmup(warmup.name, round(warmup.epochs * num_train), start, "batch" if warmup.grows_batch() else "lr")


def _wants_units(config: Config) -> bool:
    return tracked(config) == "micro_batch" and second_moment(config) is not None


def _least_units(config: Config, plan: Plan) -> int:
    """Return the micro-batches that an update is to have at the least."""
    if tracked(config) != "micro_batch":
        return 1
    begins_at = plan.full_batch_size(0) / config.batch.reference_size
    return EARLY_UNITS if _wants_units(config) and begins_at > TWO_SUFFICE else 2

"""Resolution of a config for a data set and a number of ranks: all derived values are computed once, here."""

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

# If the first batch is a larger multiple of the reference than this, two micro-batches per update are too few at the beginning:
# the average has few values, and an element whose two gradients happen to agree takes too large a step (docs/results.md).
TWO_SUFFICE, EARLY_UNITS = 16, 4


def resolve(config: Config, num_train: int, world_size: int = 1, group_size: int = 1) -> Run:
    """Return the run that a config describes.

    Args:
        config: the config.
        num_train: number of samples in the training set.
        world_size: number of ranks.
        group_size: number of samples over which a normalisation layer takes its statistics; batch sizes are multiples of it.

    Raises:
        UserError: if the config's sections do not fit together, or the batch sizes do not fit the ranks.
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
    """Return the warm-up. Its default start is the reference's learning rate, or for the batch, a size near the reference's."""
    tuned, size, warmup = reference(config), config.batch.size, config.warmup
    start = warmup.start
    if start is None and warmup.grows_batch():
        kappa = max(1.0, size / tuned.batch_size)
        start = 0.5 ** int(math.log2(kappa))  # the most halvings that do not go below the reference's batch
    elif start is None:
        start = min(1.0, tuned.lr / tuned.at(size)["lr"])
    return Warmup(warmup.name, round(warmup.epochs * num_train), start, "batch" if warmup.grows_batch() else "lr")


def _wants_units(config: Config) -> bool:
    return tracked(config) == "micro_batch" and second_moment(config) is not None


def _least_units(config: Config, plan: Plan) -> int:
    """Return the minimum number of micro-batches in an update."""
    if tracked(config) != "micro_batch":
        return 1
    begins_at = plan.full_batch_size(0) / config.batch.reference_size
    return EARLY_UNITS if _wants_units(config) and begins_at > TWO_SUFFICE else 2

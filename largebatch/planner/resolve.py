"""The plan of a run: what its config comes to on so many ranks."""

from __future__ import annotations

import math
from dataclasses import replace

from largebatch.config.schema import Run
from largebatch.planner.advice import advice
from largebatch.planner.checks import check_plan, check_run
from largebatch.planner.sizes import largest_batch
from largebatch.scaling.plan import Plan
from largebatch.scaling.rules import micro_batches_needed
from largebatch.scaling.schedules import Warmup

# Multiple of the reference batch from the first update on, above which two micro-batches an update are too few at first, when
# the average has hardly begun: an element whose two gradients happen to agree takes too large a step (docs/results.md).
TWO_SUFFICE, EARLY_UNITS = 16, 4


def build_plan(run: Run, num_train: int, world_size: int = 1, group_size: int = 1) -> tuple[Plan, list[str]]:
    """Return the plan of a run, and what its user should know.

    Args:
        run: the config.
        num_train: samples in the training set.
        world_size: ranks.
        group_size: samples that a normalisation layer takes its statistics over; batches are multiples of it.

    Raises:
        UserError: if the config's sections do not go together, or the batch sizes cannot be had on these ranks.
    """
    check_run(run, num_train, world_size, group_size)
    plan = Plan(
        run.reference(),
        run.batch.size,
        run.schedule.total_samples(num_train),
        num_train,
        run.schedule.build(num_train),
        _warmup(run, num_train),
        run.schedule.realize,
        run.batch.max_size if run.schedule.realize != "lr" else None,
        group_size,
        run.batch.at_epoch_end,
    )
    check_plan(run, plan, world_size * group_size)
    plan = replace(plan, least_units=_least_units(run, plan))
    return plan, list(advice(run, plan, world_size, group_size))


def _warmup(run: Run, num_train: int) -> Warmup:
    """Return the warm-up; where its start is not given, from the reference's learning rate or the batch next to its own."""
    reference, size, start = run.reference(), run.batch.size, run.warmup.start
    grows = run.warmup.grows_batch()
    if start is None and grows:
        kappa = max(1.0, size / reference.batch_size)
        start = 0.5 ** int(math.log2(kappa))  # from the halving of the batch next above the reference's
    elif start is None:
        start = min(1.0, reference.lr / reference.at(size)["lr"])
    return Warmup(run.warmup.name, round(run.warmup.epochs * num_train), start, "batch" if grows else "lr")


def _least_units(run: Run, plan: Plan) -> int:
    """Return the micro-batches that an update is to have at the least."""
    if run.tracked() != "micro_batch":
        return 1
    values = plan.reference.at(largest_batch(run, plan))
    coefficient = values["betas"][1] if "betas" in values else values.get("alpha", 0.0)
    needed = micro_batches_needed(coefficient) if run.second_moment() and coefficient else 2
    begins_at = plan.full_batch_size(0) / run.batch.reference_size
    return max(needed, EARLY_UNITS) if run.second_moment() and begins_at > TWO_SUFFICE else needed

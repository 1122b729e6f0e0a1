"""The plan of a run: what its config comes to on so many ranks, what is refused, and what its user should know."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from rich.console import Console
from rich.text import Text
from torch import nn

from largebatch.config.schema import Run
from largebatch.data.sampler import effective_micro_batches, largest_micro_batch, smallest_micro_batch
from largebatch.distributed import check_engine, resolve
from largebatch.errors import UserError
from largebatch.models import FactoryModel, norm_group_size
from largebatch.moments import is_shadow
from largebatch.optim import undecayed
from largebatch.optim.decay import LISTED
from largebatch.planner.advice import advice
from largebatch.planner.sizes import largest_batch
from largebatch.reporting.tables import reference_table, stage_table
from largebatch.scaling.plan import Plan
from largebatch.scaling.rules import micro_batches_needed
from largebatch.scaling.schedules import Warmup
from largebatch.section import within_memory
from largebatch.task import Task

# Multiple of the reference batch from the first update on, above which two micro-batches an update are too few at first, when
# the average has hardly begun: an element whose two gradients happen to agree takes too large a step (docs/results.md).
TWO_SUFFICE, EARLY_UNITS = 16, 4


# At a thousand updates a second a run of more would take 31 years.
MOST_UPDATES = 10**12


def build_plan(run: Run, num_train: int, world_size: int = 1, group_size: int = 1) -> tuple[Plan, list[str]]:
    """Return the plan of a run, and what its user should know.

    Args:
        run: the config.
        num_train: samples in the training set.
        world_size: ranks.
        group_size: samples that a normalisation layer takes its statistics over; batches are multiples of it.

    Raises:
        UserError: if the batch sizes cannot be had on these ranks, with the nearest that can.
    """
    check_engine(run.backend, run.precision)
    reference = run.reference()
    if run.schedule.total_samples(num_train) < 1:
        raise UserError(
            f"schedule.epochs: {run.schedule.epochs:g} epochs of {num_train} samples are less than one sample"
        )
    if run.scaling.rule == "sqrt" and (
        run.optimizer.name == "adagrad" or getattr(run.optimizer, "exponent", 0.5) != 0.5
    ):
        raise UserError(
            f"scaling.rule: sqrt holds for a root of a running average of squares, which {run.optimizer.name} "
            "as configured does not divide by; use linear with optimizer.second_moment micro_batch"
        )
    _check_batches(run, num_train, world_size, group_size)
    _check_noise(run)
    schedule = run.schedule.build(num_train)
    size, realize = run.batch.size, run.schedule.realize
    if realize != "lr":
        if run.scaling.rule == "none" and run.optimizer.takes_rule:
            raise UserError(f"schedule.realize: '{realize}' needs a scaling.rule (linear or sqrt), got none")
        total = run.schedule.total_samples(num_train)
        if realize == "batch_then_lr" and run.batch.max_size is None:
            raise UserError("batch.max_size: missing; schedule.realize batch_then_lr grows the batch up to it")
        lowest = schedule(total - 1)
        if run.batch.max_size is None and (lowest <= 0 or size / lowest > num_train):
            raise UserError(
                f"schedule.realize: the batch would grow past the {num_train} training samples; "
                "set batch.max_size with batch_then_lr, or raise the schedule's final factor"
            )
    if run.backend.squares_every > 1:
        _check_squares_every(run)
    still, total = getattr(run.optimizer, "K", 0), run.schedule.total_samples(num_train)  # quench, before it steps
    if still >= total:
        raise UserError(
            f"optimizer.K: the run's {total} samples end before {run.optimizer.name} takes its first step, after {still}; "
            "lower it to several times the batch size"
        )
    # At the reference batch itself the squares have no part in Adam's second moment; Quench's sigma2 has no reference.
    if run.second_moment() == "sample" and size < 2 and (reference.batch_size > 1 or not run.optimizer.takes_rule):
        key, plain = ("second_moment", "batch") if run.optimizer.takes_rule else ("sigma2", "average")
        raise UserError(
            f"batch.size: optimizer.{key} sample needs at least 2 samples an update, got {size}; raise it, or set "
            f"optimizer.{key} {plain}"
        )
    if run.tracked() == "micro_batch" and size <= group_size:
        key, way_out = "noise.per", "set noise.measure false"
        if run.second_moment():
            key, way_out = "optimizer.second_moment", "set optimizer.second_moment batch"
        what = f"group of {group_size} samples that a norm takes its statistics over" if group_size > 1 else "sample"
        raise UserError(
            f"{key}: micro_batch needs 2 micro-batches of an update or more over all ranks, got batch.size {size}, one {what}; "
            f"raise batch.size to {2 * group_size}, or {way_out}"
        )
    start = run.warmup.start
    if start is None and run.warmup.grows_batch():
        kappa = max(1.0, size / reference.batch_size)
        start = 0.5 ** int(math.log2(kappa))  # from the halving of the batch next above the reference's
    elif start is None:
        start = min(1.0, reference.lr / reference.at(size)["lr"])
    step = reference.at(size)["lr"] * run.optimizer.weight_decay
    if run.optimizer.name == "adamw" and step >= 1:
        raise UserError(
            f"optimizer.weight_decay: with the learning rate of batch size {size:,} every update would take {step:.3g} of each "
            "weight, and turn its sign; expected less than 1"
        )
    if run.warmup.name != "none" and run.warmup.epochs == 0:
        raise UserError(f"warmup.epochs: '{run.warmup.name}' needs a length > 0, got 0")
    plan = Plan(
        reference,
        size,
        run.schedule.total_samples(num_train),
        num_train,
        schedule,
        Warmup(
            run.warmup.name, round(run.warmup.epochs * num_train), start, "batch" if run.warmup.grows_batch() else "lr"
        ),
        realize,
        run.batch.max_size if realize != "lr" else None,
        group_size,
        run.batch.at_epoch_end,
    )
    fewest = plan.total_samples // max(1, max(size, run.batch.max_size or size))
    if fewest > MOST_UPDATES:
        raise UserError(
            f"schedule.epochs: {run.schedule.epochs:g} epochs of {num_train:,} samples are {fewest:.3g} updates or more; no "
            f"run has more than {MOST_UPDATES:.0e}"
        )
    plan = replace(plan, least_units=_least_units(run, plan))
    _check_batch_warmup(run, plan, world_size * group_size)
    return plan, list(advice(run, plan, world_size, group_size))


def check_single_samples(run: Run, task: Task, plan: Plan, world_size: int, group_size: int) -> None:
    """Refuse batch norms of a model from elsewhere, left as they are, that would meet a forward pass of one sample.

    Raises:
        UserError: naming the size of the update's batch.
    """
    if not isinstance(run.model, FactoryModel) or run.model.norm_group_size is not None:
        return
    options = world_size, run.batch.micro_size, group_size, plan.least_units
    size = next((size for size in plan.batch_sizes() if smallest_micro_batch(size, *options) == 1), None)
    if size is None:
        return
    dtype = torch.int64 if task.kind == "language_modeling" else None
    try:
        with torch.device("meta"), torch.no_grad():
            run.model.build(task).train()(torch.zeros(1, *task.sample_shape, dtype=dtype))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            return
    except Exception:  # it does more than a model without values can: the run will show
        return
    else:
        return
    raise UserError(
        f"model.norm_group_size: null leaves batch norms that need two samples a forward pass, and an update of {size:,} "
        f"samples has one of a single sample on {world_size} rank{'s' if world_size > 1 else ''}; set a norm_group_size, or "
        "another batch.size, batch.micro_size or schedule.epochs"
    )


def _check_squares_every(run: Run) -> None:
    """Refuse what needs the squares of every update."""
    why = ""
    if run.measures_noise():
        why = "the measured noise is of every update"
    elif run.tracked() == "sample":
        why = "squares of samples are taken in every update; it is for optimizer.second_moment micro_batch"
    elif run.precision == "fp16" or run.optimizer.non_finite == "skip":
        what = "precision fp16" if run.precision == "fp16" else "optimizer.non_finite skip"
        why = f"{what} goes on after a gradient that is not finite, which a variance that is kept would carry along"
    if why:
        raise UserError(f"backend.squares_every: got {run.backend.squares_every}, expected 1: {why}")


def _least_units(run: Run, plan: Plan) -> int:
    """Return the micro-batches that an update is to have at the least."""
    if run.tracked() != "micro_batch":
        return 1
    values = plan.reference.at(largest_batch(run, plan))
    coefficient = values["betas"][1] if "betas" in values else values.get("alpha", 0.0)
    needed = micro_batches_needed(coefficient) if run.second_moment() and coefficient else 2
    begins_at = plan.full_batch_size(0) / run.batch.reference_size
    return max(needed, EARLY_UNITS) if run.second_moment() and begins_at > TWO_SUFFICE else needed


def _check_noise(run: Run) -> None:
    """Refuse what cannot be had of the measured noise."""
    if not run.measures_noise():
        return
    why = "noise.measure"
    if run.batch.growth == "adaptive":
        why = "batch.growth adaptive"
        if run.scaling.rule not in ("linear", "sqrt") and run.optimizer.takes_rule:
            raise UserError(
                f"batch.growth: adaptive needs a scaling.rule that follows the batch (linear or sqrt), got {run.scaling.rule}"
            )
        if run.schedule.realize != "lr" or run.warmup.grows_batch():
            raise UserError(
                "batch.growth: adaptive decides the batch size by itself; schedule.realize and warmup.realize must be lr"
            )
    if run.scaling.rule == "adascale":
        why = "scaling.rule adascale"
        if run.schedule.realize != "lr" or run.warmup.grows_batch():
            raise UserError(
                "scaling.rule: adascale keeps the batch size; schedule.realize and warmup.realize must be lr"
            )
    if run.tracked() == "sample" and run.batch.size < 2:
        raise UserError(f"batch.size: {why} needs at least 2 samples an update, got {run.batch.size}")


def _check_batch_warmup(run: Run, plan: Plan, least: int) -> None:
    """Refuse a batch size that cannot rise from where it is to begin."""
    if not run.warmup.grows_batch():
        return
    if run.warmup.name != "gradual":
        raise UserError(f"warmup.realize: batch needs warmup.name gradual, got {run.warmup.name}")
    if plan.warmup.start <= 0:
        raise UserError("warmup.start: a batch cannot begin at 0 samples; expected more than 0")
    first = plan.full_batch_size(0)
    if first < least:
        raise UserError(
            f"warmup.start: the batch would begin at {first} samples, which the ranks cannot share; "
            f"the least is {least / run.batch.size:.4g} ({least} samples)"
        )


def _check_batches(run: Run, num_train: int, world_size: int, group_size: int) -> None:
    """Refuse batch sizes that do not fit, with the nearest that does."""
    step = group_size
    for key, size in (("batch.size", run.batch.size), ("batch.max_size", run.batch.max_size)):
        if size is None:
            continue
        least = step * world_size
        most = num_train // step * step
        nearest = min(max(round(size / step) * step, least), most)
        if least > most:
            raise UserError(
                f"torchrun: {world_size} ranks need {least} samples an update; there are {num_train} to train on"
            )
        if size % step:
            raise UserError(
                f"{key}: expected a multiple of the norm's group of {step} samples, got {size}; try {nearest}"
            )
        if size < least:
            raise UserError(
                f"{key}: {size} cannot be split over {world_size} ranks of at least {step}; the nearest is {nearest}"
            )
        if size > most:
            raise UserError(f"{key}: {size} is more than the {num_train} training samples; the nearest is {nearest}")
    micro = run.batch.micro_size
    if micro is not None and micro % step:
        nearest = max(step, round(micro / step) * step)
        raise UserError(
            f"batch.micro_size: expected a multiple of the norm's group of {step} samples, got {micro}; try {nearest}"
        )
    if run.batch.max_size is not None and run.batch.max_size < run.batch.size:
        raise UserError(f"batch.max_size: expected at least batch.size {run.batch.size}, got {run.batch.max_size}")


def print_plan(console: Console, run: Run, model: nn.Module, plan: Plan, data: str, world_size: int) -> None:
    """Print what is trained on what, and the plan's two tables.

    Args:
        console: where to.
        run: the config.
        model: the model.
        plan: its plan.
        data: the data set's size, and what else the first line says.
        world_size: ranks.
    """
    parameters = sum(p.numel() for p in model.parameters() if not is_shadow(p))
    console.print(
        Text.assemble(
            (run.model.name, "bold"), f", {parameters:,} parameters, on ", (run.data.name, "bold"), f", {data}"
        )
    )
    group_size = norm_group_size(model)
    stages = stage_table(plan, world_size, run.batch.micro_size, group_size)
    console.print(reference_table(plan, run.second_moment(), run.optimizer.takes_rule), stages)
    if run.optimizer.weight_decay > 0.0:
        console.print(_say_decay(run, model), highlight=False)
    if run.tracked() == "micro_batch":
        console.print(_say_units(run, plan, world_size, group_size), highlight=False)
    elif run.tracked() == "sample":
        size = plan.full_batch_size(0)
        squared = run.squared_samples(size)
        which = f"{squared:,} of an update's {size:,} samples" if squared < size else "every sample"
        console.print(f"{_squared_for(run)}: from the squared gradients of {which}", highlight=False)
    if run.batch.growth == "adaptive":
        most = largest_batch(run, plan)
        line = f"batch size: adaptive, follows the measured critical batch size up to {most:,}"
        if run.batch.micro_size is None and most > run.batch.size:
            line += (
                f", a rank's forward pass with it up to {-(-most // world_size):,} samples (batch.micro_size bounds it)"
            )
        console.print(line, highlight=False)
    if run.scaling.rule == "adascale":
        size, kappa = run.batch.size, run.batch.size / run.batch.reference_size
        fewest, most = (-(-round(plan.total_samples * longer) // size) for longer in (min(1.0, kappa), max(1.0, kappa)))
        console.print(
            f"AdaScale: a measured gain between {min(1.0, kappa):g} and {max(1.0, kappa):g} multiplies these learning rates; "
            f"the run takes {fewest:,} updates where noise dominates, up to {most:,} where it does not",
            highlight=False,
        )


def _say_decay(run: Run, model: nn.Module) -> str:
    """Return a line that says which parameters the weight decay is of."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and not is_shadow(p)}
    roles = {} if run.optimizer.decay_norm_and_bias else undecayed(model)
    decayed = [p for name, p in trained.items() if name not in roles]
    line = f"weight decay {run.optimizer.weight_decay:g}: of {_counted(decayed)}"
    if not roles:
        return line
    left = [
        _counted([trained[n] for n, r in roles.items() if r == role], role) for role in dict.fromkeys(roles.values())
    ]
    return f"{line}; none of {', '.join(left)}"


def _counted(parameters: list[nn.Parameter], role: str = "") -> str:
    one, several = {
        "": ("parameter", "parameters"),
        "norm": ("parameter of norms", "parameters of norms"),
        "bias": ("bias", "biases"),
        LISTED: (f"parameter {LISTED}", f"parameters {LISTED}"),
    }.get(role, (role, f"{role}s"))
    elements = sum(p.numel() for p in parameters)
    return f"{len(parameters):,} {one if len(parameters) == 1 else several} ({elements:,} elements)"


def _say_units(run: Run, plan: Plan, world_size: int, group_size: int) -> str:
    """Return a line that says what the squares of an update are of."""
    size, micro_size = plan.full_batch_size(0), run.batch.micro_size
    units = effective_micro_batches(size, world_size, micro_size, group_size, plan.least_units)
    line = f"{_squared_for(run)}: from the squared gradients of {units:.3g} micro-batches an update"
    whole = largest_micro_batch(size, world_size, micro_size, group_size)
    cut = largest_micro_batch(size, world_size, micro_size, group_size, plan.least_units)
    if cut < whole:
        passes = -(-whole // cut)
        line += (
            f"; a rank's {whole:,} samples are cut into {passes} passes of {cut:,}, as {plan.least_units} are needed"
        )
    return line


def _squared_for(run: Run) -> str:
    return "second moments" if run.second_moment() else "the gradient noise"


def print_warnings(console: Console, warnings: Iterable[str]) -> None:
    """Print what a user should know."""
    for warning in warnings:
        console.print(Text.assemble(("warning:", "yellow"), f" {warning}"))


def _data_sizes(run: Run) -> tuple[int, Task, str]:
    """Return training samples, task, and a word on where they come from: the data, or what is published of it.

    Raises:
        UserError: if the data is not there, and nothing is known of it.
    """
    try:
        with within_memory("data"):
            source = run.data.load(run.seed)
    except UserError:
        declared = run.data.declared() if hasattr(run.data, "declared") else None
        if declared is None:
            raise
        return *declared, " (as published; the data is not at hand)"
    return len(source.train), source.task, ""


def describe_plan(run: Run, world_size: int, console: Console) -> None:
    """Print the plan of a run without training it.

    Raises:
        UserError: for what the user can mend.
    """
    if run.backend.name != "accelerate":  # whose launcher is not here
        resolve(run.backend, run.precision)
    num_train, task, where = _data_sizes(run)
    with torch.device("meta"), within_memory("model"):
        model = run.model.build(task)
    plan, warnings = build_plan(run, num_train, world_size, norm_group_size(model))
    check_single_samples(run, task, plan, world_size, norm_group_size(model))
    print_plan(console, run, model, plan, f"{num_train:,} training samples{where}", world_size)
    verdict = "satisfies" if plan.schedule.robbins_monro else "does not satisfy"
    console.print(
        f"schedule '{run.schedule.name}' {verdict} the classical conditions for convergence: {plan.schedule.why}",
        highlight=False,
    )
    print_warnings(console, warnings)

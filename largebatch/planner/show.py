"""Output of `largebatch plan`, and the first lines of a run."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from rich.console import Console
from rich.text import Text
from torch import nn

from largebatch.config.schema import Config
from largebatch.data.sampler import effective_micro_batches, pieces_of_rank
from largebatch.distributed import resolve as resolve_backend
from largebatch.errors import UserError
from largebatch.models import norm_group_size
from largebatch.moments import is_shadow
from largebatch.optim import undecayed
from largebatch.optim.damping import STATE
from largebatch.optim.decay import LISTED
from largebatch.planner.checks import check_single_samples
from largebatch.planner.resolve import resolve
from largebatch.planner.run import Run
from largebatch.reporting.tables import reference_table, stage_table
from largebatch.section import within_memory
from largebatch.task import Task


def print_plan(console: Console, run: Run, model: nn.Module, data: str) -> None:
    """Print the model and data of a run, and the two tables of its plan.

    Args:
        console: the console to print to.
        run: the resolved config.
        model: its model.
        data: the size of the data set, and other text for the first line.
    """
    config, plan, world_size = run.config, run.plan, run.world_size
    parameters = sum(p.numel() for p in model.parameters() if not is_shadow(p))
    console.print(
        Text.assemble(
            (config.model.name, "bold"), f", {parameters:,} parameters, on ", (config.data.name, "bold"), f", {data}"
        )
    )
    stages = stage_table(plan, world_size, config.batch.micro_size, run.group_size)
    console.print(reference_table(plan, run.second_moment, config.optimizer.takes_rule), stages)
    if config.optimizer.weight_decay > 0.0:
        console.print(_say_decay(config, model), highlight=False)
    if run.tracked == "micro_batch":
        console.print(_say_units(run), highlight=False)
    elif run.tracked == "sample":
        size = plan.full_batch_size(0)
        squared = run.squared_samples(size)
        which = f"{squared:,} of an update's {size:,} samples" if squared < size else "every sample"
        console.print(f"{_squared_for(run)}: from the squared gradients of {which}", highlight=False)
    if run.damps:
        elements = sum(p.numel() for p in model.parameters() if p.requires_grad and not is_shadow(p))
        bytes_each = 8 if config.precision == "fp64" else 4
        console.print(
            f"damping: {len(STATE)} more tensors of state for each parameter ({', '.join(STATE)}), "
            f"{len(STATE) * bytes_each * elements / 2**20:,.3g} MiB on each rank",
            highlight=False,
        )
    if config.batch.growth == "adaptive":
        most = run.largest_batch
        line = f"batch size: adaptive, follows the measured critical batch size up to {most:,}"
        if config.batch.micro_size is None and most > config.batch.size:
            line += (
                f", a rank's forward pass with it up to {-(-most // world_size):,} samples (batch.micro_size bounds it)"
            )
        console.print(line, highlight=False)
    if config.scaling.rule == "adascale":
        size, kappa = config.batch.size, config.batch.size / config.batch.reference_size
        fewest, most = (-(-round(plan.total_samples * longer) // size) for longer in (min(1.0, kappa), max(1.0, kappa)))
        console.print(
            f"AdaScale: a measured gain between {min(1.0, kappa):g} and {max(1.0, kappa):g} multiplies these learning rates; "
            f"the run takes {fewest:,} updates where noise dominates, up to {most:,} where it does not",
            highlight=False,
        )


def _say_decay(config: Config, model: nn.Module) -> str:
    """Return a line with the number of parameters to which the weight decay applies, and of those without it."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and not is_shadow(p)}
    roles = {} if config.optimizer.decay_norm_and_bias else undecayed(model)
    decayed = [p for name, p in trained.items() if name not in roles]
    line = f"weight decay {config.optimizer.weight_decay:g}: of {_counted(decayed)}"
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


def _say_units(run: Run) -> str:
    """Return a line with the number of micro-batches whose gradients are squared, at the first and largest batch size."""
    plan, micro_size, largest = run.plan, run.config.batch.micro_size, run.largest_batch
    first, last = (
        f"{effective_micro_batches(size, run.world_size, micro_size, run.group_size, plan.units(size)):.3g}"
        for size in (plan.full_batch_size(0), largest)
    )
    line = f"{_squared_for(run)}: from the squared gradients of {first} micro-batch{'' if first == '1' else 'es'} an update"
    if last != first:
        line += f", {last} at a batch of {largest:,}"
    wanted = plan.units(largest)
    uncut = pieces_of_rank(largest, 0, run.world_size, micro_size, run.group_size)
    pieces = pieces_of_rank(largest, 0, run.world_size, micro_size, run.group_size, wanted)
    if len(pieces) > len(uncut):
        share, most = pieces[-1].stop, pieces[0].stop
        line += f"; a rank's {share:,} samples are cut into {len(pieces)} passes of {most:,}, as {wanted} are needed"
    return line


def _squared_for(run: Run) -> str:
    if run.second_moment:
        return "second moments"
    return "the gradient noise" if run.measures_noise else "the noise beside the curvature"


def print_warnings(console: Console, warnings: Iterable[str]) -> None:
    """Print warnings for the user, a line each."""
    for warning in warnings:
        console.print(Text.assemble(("warning:", "yellow"), f" {warning}"))


def _data_sizes(config: Config) -> tuple[int, Task, str]:
    """Return the number of training samples, the task, and a note if both are published values because the data is missing.

    Raises:
        UserError: if the data is missing and its published size is not known.
    """
    try:
        with within_memory("data"):
            source = config.data.load(config.seed)
    except UserError:
        declared = config.data.declared()
        if declared is None:
            raise
        return *declared, " (as published; the data is not at hand)"
    return len(source.train), source.task, ""


def describe_plan(config: Config, world_size: int, console: Console) -> None:
    """Print the plan of a config without training it.

    Raises:
        UserError: for any problem that the user can correct.
    """
    if config.backend.name != "accelerate":  # the launcher of Accelerate is not used here
        resolve_backend(config.backend, config.precision)
    num_train, task, where = _data_sizes(config)
    with torch.device("meta"), within_memory("model"):
        model = config.model.build(task)
    run = resolve(config, num_train, world_size, norm_group_size(model))
    check_single_samples(run, task)
    print_plan(console, run, model, f"{num_train:,} training samples{where}")
    schedule = run.plan.schedule
    verdict = "satisfies" if schedule.robbins_monro else "does not satisfy"
    console.print(
        f"schedule '{config.schedule.name}' {verdict} the classical conditions for convergence: {schedule.why}",
        highlight=False,
    )
    print_warnings(console, run.warnings)

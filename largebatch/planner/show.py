"""What `largebatch plan` and the head of a run print."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from rich.console import Console
from rich.text import Text
from torch import nn

from largebatch.config.schema import Run
from largebatch.data.sampler import effective_micro_batches, largest_micro_batch
from largebatch.distributed import resolve
from largebatch.errors import UserError
from largebatch.models import norm_group_size
from largebatch.moments import is_shadow
from largebatch.optim import undecayed
from largebatch.optim.decay import LISTED
from largebatch.planner.checks import check_single_samples
from largebatch.planner.resolve import build_plan
from largebatch.planner.sizes import largest_batch
from largebatch.reporting.tables import reference_table, stage_table
from largebatch.scaling.plan import Plan
from largebatch.section import within_memory
from largebatch.task import Task


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

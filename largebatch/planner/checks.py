"""Checks that the sections of a config fit together. The validator of a section checks the section by itself."""

from __future__ import annotations

import torch

from largebatch.config.optimizers import AdaptiveBase, LAMBConfig, LARSConfig, QuenchConfig, RMSPropConfig
from largebatch.config.schema import Config
from largebatch.data.sampler import smallest_micro_batch
from largebatch.distributed import check_engine
from largebatch.errors import UserError
from largebatch.models import FactoryModel
from largebatch.optim.response import KNOWN
from largebatch.planner.derive import damps, measures_noise, reference, second_moment, tracked
from largebatch.planner.run import Run
from largebatch.scaling.plan import Plan
from largebatch.task import Task

# At a thousand updates per second, a run with more updates would take over 31 years.
MOST_UPDATES = 10**12


def check_config(config: Config, num_train: int, world_size: int, group_size: int) -> None:
    """Refuse a config whose sections do not fit together, before its plan is made.

    Args:
        config: the config.
        num_train: number of samples in the training set.
        world_size: number of ranks.
        group_size: number of samples over which a normalisation layer takes its statistics.

    Raises:
        UserError: with what was expected and what the user can do.
    """
    check_engine(config.backend, config.precision)
    reference(config)
    if config.schedule.total_samples(num_train) < 1:
        raise UserError(
            f"schedule.epochs: {config.schedule.epochs:g} epochs of {num_train} samples are less than one sample"
        )
    _check_rule(config)
    _check_batches(config, num_train, world_size, group_size)
    _check_noise(config)
    _check_growth(config, num_train)
    if damps(config):
        _check_damping(config)
    if config.backend.squares_every > 1:
        _check_squares_every(config)
    _check_optimizer(config, num_train)
    _check_units(config, group_size)
    if config.warmup.name != "none" and config.warmup.epochs == 0:
        raise UserError(f"warmup.epochs: '{config.warmup.name}' needs a length > 0, got 0")


def check_plan(config: Config, plan: Plan, least: int) -> None:
    """Refuse a plan that no run can follow.

    Args:
        config: the config.
        plan: its plan.
        least: size in samples of the smallest batch that the ranks can share.

    Raises:
        UserError: with what was expected and what the user can do.
    """
    fewest = plan.total_samples // max(1, max(config.batch.size, config.batch.max_size or config.batch.size))
    if fewest > MOST_UPDATES:
        raise UserError(
            f"schedule.epochs: {config.schedule.epochs:g} epochs of {plan.samples_per_epoch:,} samples are {fewest:.3g} "
            f"updates or more; no run has more than {MOST_UPDATES:.0e}"
        )
    _check_batch_warmup(config, plan, least)


def _check_rule(config: Config) -> None:
    """Refuse the square-root rule for an optimizer that does not divide by the root of a running average of squares."""
    if config.scaling.rule == "sqrt" and (
        config.optimizer.name == "adagrad"
        or (isinstance(config.optimizer, RMSPropConfig) and config.optimizer.exponent != 0.5)
    ):
        raise UserError(
            f"scaling.rule: sqrt holds for a root of a running average of squares, which {config.optimizer.name} "
            "as configured does not divide by; use linear with optimizer.second_moment micro_batch"
        )


def _check_growth(config: Config, num_train: int) -> None:
    """Refuse a batch that grows instead of a falling learning rate if it cannot grow."""
    realize, size = config.schedule.realize, config.batch.size
    if realize == "lr":
        return
    if config.scaling.rule == "none" and config.optimizer.takes_rule:
        raise UserError(f"schedule.realize: '{realize}' needs a scaling.rule (linear or sqrt), got none")
    if realize == "batch_then_lr" and config.batch.max_size is None:
        raise UserError("batch.max_size: missing; schedule.realize batch_then_lr grows the batch up to it")
    lowest = config.schedule.build(num_train)(config.schedule.total_samples(num_train) - 1)
    if config.batch.max_size is None and (lowest <= 0 or size / lowest > num_train):
        raise UserError(
            f"schedule.realize: the batch would grow past the {num_train} training samples; "
            "set batch.max_size with batch_then_lr, or raise the schedule's final factor"
        )


def _check_optimizer(config: Config, num_train: int) -> None:
    """Refuse an optimizer that would take no step, or whose steps would be too large for its weights."""
    optimizer, total = config.optimizer, config.schedule.total_samples(num_train)
    if isinstance(optimizer, QuenchConfig) and total <= optimizer.K:
        raise UserError(
            f"optimizer.K: the run's {total} samples end before quench takes its first step, after {optimizer.K}; "
            "lower it to several times the batch size"
        )
    lr, size = reference(config).at(config.batch.size)["lr"], config.batch.size
    if isinstance(optimizer, LARSConfig | LAMBConfig):
        length = lr * getattr(optimizer, "trust_coefficient", 1.0)  # of a layer's step, as a share of the layer's norm
        if length >= 1:
            raise UserError(
                f"optimizer.lr: with the learning rate of batch size {size:,} {optimizer.name} would move each layer by "
                f"{length:.3g} of its own length in every update; expected less than 1"
            )
        # This bounds the decay of a layer's weights. Norms and biases are decayed only on request, and without such a bound.
        of = "norm and bias" if optimizer.decay_norm_and_bias and not optimizer.adapt_norm_and_bias else None
    else:
        of = "weight" if optimizer.name in ("sgd", "adamw") else None  # in others it is part of a normalised gradient
    step = lr * optimizer.weight_decay
    if of is not None and step >= 1:
        raise UserError(
            f"optimizer.weight_decay: with the learning rate of batch size {size:,} every update would take {step:.3g} of each "
            f"{of}, and turn its sign; expected less than 1"
        )


def _check_units(config: Config, group_size: int) -> None:
    """Refuse an update of a single sample or micro-batch if squares are tracked, because one unit does not show the noise."""
    size = config.batch.size
    # At the reference batch size, Adam's second moment does not use the squares; Quench's sigma2 has no reference.
    has_part = config.batch.reference_size > 1 or not config.optimizer.takes_rule
    if second_moment(config) == "sample" and size < 2 and has_part:
        key, plain = ("second_moment", "batch") if config.optimizer.takes_rule else ("sigma2", "average")
        raise UserError(
            f"batch.size: optimizer.{key} sample needs at least 2 samples an update, got {size}; raise it, or set "
            f"optimizer.{key} {plain}"
        )
    if tracked(config) == "micro_batch" and size <= group_size:
        key, way_out = "noise.per", "set noise.measure false"
        if second_moment(config):
            key, way_out = "optimizer.second_moment", "set optimizer.second_moment batch"
        what = f"group of {group_size} samples that a norm takes its statistics over" if group_size > 1 else "sample"
        raise UserError(
            f"{key}: micro_batch needs 2 micro-batches of an update or more over all ranks, got batch.size {size}, one {what}; "
            f"raise batch.size to {2 * group_size}, or {way_out}"
        )


def check_single_samples(run: Run, task: Task) -> None:
    """Refuse batch norms of a user's model, left unchanged, if a forward pass of a single sample would reach them.

    Raises:
        UserError: with the size of the update's batch.
    """
    model, plan, world_size = run.config.model, run.plan, run.world_size
    if not isinstance(model, FactoryModel) or model.norm_group_size is not None:
        return
    options = world_size, run.config.batch.micro_size, run.group_size
    sizes = (size for size in plan.batch_sizes() if smallest_micro_batch(size, *options, plan.units(size)) == 1)
    size = next(sizes, None)
    if size is None:
        return
    dtype = torch.int64 if task.kind == "language_modeling" else None
    try:
        with torch.device("meta"), torch.no_grad():
            model.build(task).train()(torch.zeros(1, *task.sample_shape, dtype=dtype))
        return
    except Exception as error:
        if "more than 1 value per channel" not in str(error):
            return  # the model cannot run without values; an error will show in the run
    raise UserError(
        f"model.norm_group_size: null leaves batch norms that need two samples a forward pass, and an update of {size:,} "
        f"samples has one of a single sample on {world_size} rank{'s' if world_size > 1 else ''}; set a norm_group_size, or "
        "another batch.size, batch.micro_size or schedule.epochs"
    )


def _check_squares_every(config: Config) -> None:
    """Refuse backend.squares_every above 1 together with an option that needs the squares of every update."""
    why = ""
    if measures_noise(config) or damps(config):
        why = "the damping is of every update" if damps(config) else "the measured noise is of every update"
    elif tracked(config) == "sample":
        why = "squares of samples are taken in every update; it is for optimizer.second_moment micro_batch"
    elif config.precision == "fp16" or config.optimizer.non_finite == "skip":
        what = "precision fp16" if config.precision == "fp16" else "optimizer.non_finite skip"
        why = f"{what} goes on after a gradient that is not finite, which a variance that is kept would carry along"
    if why:
        raise UserError(f"backend.squares_every: got {config.backend.squares_every}, expected 1: {why}")


def _check_damping(config: Config) -> None:
    """Refuse to damp steps that do not follow the linear rule, or for which the noise is not known."""
    optimizer = config.optimizer
    expected, got = "", ""
    if optimizer.optimizer_class not in KNOWN:
        expected, got = "optimizer.name sgd, rmsprop, adam or adamw", optimizer.name
    elif config.backend.name not in ("auto", "ddp"):
        expected, got = "backend.name ddp, which holds whole gradients", config.backend.name
    elif config.scaling.rule != "linear":
        expected, got = "scaling.rule linear, whose steps it damps", config.scaling.rule
    else:
        adaptive = isinstance(optimizer, AdaptiveBase)
        squares = second_moment(config) if adaptive else tracked(config)
        if squares != "micro_batch":
            key = "optimizer.second_moment" if adaptive else "noise.per"
            expected, got = f"{key} micro_batch, whose spread tells the noise", squares or "batch"
    if expected:
        raise UserError(f"optimizer.damping: expected {expected}, got {got}; set it false")


def _check_noise(config: Config) -> None:
    """Refuse options that need the measured noise and do not fit it."""
    if not measures_noise(config):
        return
    why = "noise.measure"
    if config.batch.growth == "adaptive":
        why = "batch.growth adaptive"
        if config.scaling.rule not in ("linear", "sqrt") and config.optimizer.takes_rule:
            raise UserError(
                f"batch.growth: adaptive needs a scaling.rule that follows the batch (linear or sqrt), got "
                f"{config.scaling.rule}"
            )
        if config.schedule.realize != "lr" or config.warmup.grows_batch():
            raise UserError(
                "batch.growth: adaptive decides the batch size by itself; schedule.realize and warmup.realize must be lr"
            )
    if config.scaling.rule == "adascale":
        why = "scaling.rule adascale"
        if config.schedule.realize != "lr" or config.warmup.grows_batch():
            raise UserError(
                "scaling.rule: adascale keeps the batch size; schedule.realize and warmup.realize must be lr"
            )
    if tracked(config) == "sample" and config.batch.size < 2:
        raise UserError(f"batch.size: {why} needs at least 2 samples an update, got {config.batch.size}")


def _check_batch_warmup(config: Config, plan: Plan, least: int) -> None:
    """Refuse a warm-up of the batch size that cannot rise from its start."""
    if not config.warmup.grows_batch():
        return
    if config.warmup.name != "gradual":
        raise UserError(f"warmup.realize: batch needs warmup.name gradual, got {config.warmup.name}")
    if plan.warmup.start <= 0:
        raise UserError("warmup.start: a batch cannot begin at 0 samples; expected more than 0")
    first = plan.full_batch_size(0)
    if first < least:
        raise UserError(
            f"warmup.start: the batch would begin at {first} samples, which the ranks cannot share; "
            f"the least is {least / config.batch.size:.4g} ({least} samples)"
        )


def _check_batches(config: Config, num_train: int, world_size: int, group_size: int) -> None:
    """Refuse batch sizes that do not fit the ranks or the data; the error gives the nearest size that does."""
    step = group_size
    for key, size in (("batch.size", config.batch.size), ("batch.max_size", config.batch.max_size)):
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
    micro = config.batch.micro_size
    if micro is not None and micro % step:
        nearest = max(step, round(micro / step) * step)
        raise UserError(
            f"batch.micro_size: expected a multiple of the norm's group of {step} samples, got {micro}; try {nearest}"
        )
    if config.batch.max_size is not None and config.batch.max_size < config.batch.size:
        raise UserError(
            f"batch.max_size: expected at least batch.size {config.batch.size}, got {config.batch.max_size}"
        )

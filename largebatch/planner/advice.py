"""Warnings about a run that do not prevent it but that a user should know before the run starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from largebatch.config.optimizers import AdaptiveBase, LARSConfig, QuenchConfig, SGDConfig
from largebatch.config.schedules import InverseSqrtConfig, RobbinsMonroConfig
from largebatch.planner.run import Run

# Scaled learning rate up to which RMSProp and Adam with second moments of the reference batch followed the reference's curve
# within the spread of the seeds: 1e-3 at 16 times the batch (Fashion-MNIST; docs/results.md).
MEASURED_LR = 0.016
# Multiple of the reference batch from which on a GPT did not follow its reference if it began at that batch size, but did
# follow it if the batch size rose to it (docs/results.md).
MEASURED_START = 4


def advice(run: Run) -> Iterator[str]:
    """Yield a line for each warning about a run."""
    yield from _unused(run)
    yield from _on_the_batch(run)
    yield from _on_averages(run)
    if run.measures_noise:
        yield from _on_noise(run)


def _unused(run: Run) -> Iterator[str]:
    """Yield a warning for each key of the config that is set but not used."""
    config, plan = run.config, run.plan
    if config.batch.max_size is not None and config.schedule.realize == "lr" and config.batch.growth == "schedule":
        yield "batch.max_size is not used: schedule.realize is lr, so the batch does not grow"
    if config.batch.critical_share != 1.0 and config.batch.growth != "adaptive":
        yield "batch.critical_share is not used: batch.growth is schedule"
    if config.noise.average_samples is not None and not run.measures_noise:
        yield "noise.average_samples is not used: noise.measure is false"
    if config.noise.per != "micro_batch" and (run.second_moment or not run.measures_noise):
        why = "the optimizer's second moment says what is tracked" if run.second_moment else "noise.measure is false"
        yield f"noise.per is not used: {why}"
    if config.warmup.name == "none" and (
        config.warmup.epochs or config.warmup.start is not None or config.warmup.realize != "lr"
    ):
        yield "warmup.epochs, start and realize are not used: warmup.name is none"
    if config.warmup.name != "none" and plan.warmup.start == 1.0:
        full = "batch size" if config.warmup.realize == "batch" else "learning rate"
        yield f"the warm-up starts at the full {full}, which is not above the reference's: it does nothing"
    share = -(-run.largest_batch // run.world_size)
    if config.batch.micro_size is not None and config.batch.micro_size > share:
        yield f"batch.micro_size {config.batch.micro_size} is not used: no rank has more than {share} samples of an update"
    if run.fallback and run.tracked != "sample":
        yield "model.fallback is not used: no squares of samples are tracked"
    if config.optimizer.squares_samples is not None and run.tracked != "sample":
        yield "optimizer.squares_samples is not used: no squares of samples are tracked"
    if config.optimizer.max_grad_norm_of != "reference" and config.optimizer.max_grad_norm is None:
        yield "optimizer.max_grad_norm_of is not used: max_grad_norm is not set"
    if run.tracked is None and (config.backend.squares_every > 1 or config.backend.squares_dtype != "float32"):
        yield "backend.squares_every and squares_dtype are not used: no squares are collected"
    elif config.backend.squares_every > 1 and config.backend.squares_every >= (updates := plan.num_updates()):
        every = config.backend.squares_every
        yield f"backend.squares_every {every:,}: the run's {updates:,} updates measure the variance once, in the first"


def _on_the_batch(run: Run) -> Iterator[str]:
    """Yield warnings about the batch size, the learning rate that follows it, and the length of warm-up and schedule."""
    config, plan, largest = run.config, run.plan, run.largest_batch
    kappa, num_train, optimizer = largest / config.batch.reference_size, plan.samples_per_epoch, config.optimizer
    if config.warmup.name != "none" and config.warmup.epochs >= config.schedule.epochs:
        line = f"the warm-up ({config.warmup.epochs:g} epochs) fills the whole run ({config.schedule.epochs:g} epochs)"
        reached = plan.warmup.of_lr(plan.total_samples)
        yield line if reached == 1.0 else f"{line}: the learning rate ends at {100 * reached:.3g} % of its value"
    schedule = config.schedule
    if isinstance(schedule, InverseSqrtConfig | RobbinsMonroConfig) and schedule.timescale_epochs >= schedule.epochs:
        yield (
            f"schedule.timescale_epochs {schedule.timescale_epochs:g} is not within the run ({schedule.epochs:g} epochs): "
            f"the learning rate ends at {100 * plan.schedule(plan.total_samples):.3g} % of its value"
        )
    if largest > num_train / 10:
        yield (
            f"batch size {largest:,} is more than a tenth of the {num_train:,} training samples: "
            "updates are few and the linear rule tends to break there (Smith et al. 2018)"
        )
    # LAMB sets the size of its update itself.
    plain = isinstance(optimizer, AdaptiveBase) and optimizer.name != "lamb" and not run.second_moment
    if kappa > 1 and config.scaling.rule == "linear" and plain:
        yield (
            f"the second moment of {optimizer.name} shrinks as the batch grows by {kappa:g}, so the linear rule does not "
            "keep the update's size; optimizer.second_moment micro_batch does"
        )
    of_reference = config.optimizer.max_grad_norm is not None and config.optimizer.max_grad_norm_of == "reference"
    if of_reference and kappa != 1 and optimizer.takes_rule and not run.clips_reference:
        yield (
            f"optimizer.max_grad_norm {config.optimizer.max_grad_norm:g} bounds the norm of the batch's own gradient, not "
            "that of the reference's: there are no squares for a second moment, which tell it"
        )
    scaled_lr = plan.reference.at(largest)["lr"]
    if isinstance(optimizer, AdaptiveBase) and run.second_moment and scaled_lr > MEASURED_LR:
        yield (
            f"the learning rate of {optimizer.name} at a batch of {largest:,} is {scaled_lr:.3g}; that the curve does not "
            f"depend on the batch size was measured up to {MEASURED_LR:g} (docs/results.md): expect less beyond"
        )
    begins_at = plan.full_batch_size(0) / config.batch.reference_size
    if isinstance(optimizer, AdaptiveBase) and run.second_moment and begins_at >= MEASURED_START:
        yield (
            f"the batch is {begins_at:g} times the reference from the first update: there a GPT did not follow its reference's "
            f"curve, measured from {MEASURED_START} on; with warmup.realize batch it did (docs/results.md)"
        )
    if config.scaling.rule == "none" and optimizer.takes_rule and kappa != 1:
        yield f"scaling.rule none: lr {optimizer.lr:g} is kept although the batch is {kappa:g} times the reference"


def _on_noise(run: Run) -> Iterator[str]:
    """Yield warnings where the measured noise is wrong or missing, or where its use is limited."""
    config, largest, group_size, num_train = run.config, run.largest_batch, run.group_size, run.plan.samples_per_epoch
    if group_size > 1 and run.tracked == "sample":
        yield (
            f"the {group_size} samples of a batch norm's group are not independent, so squares of samples do not give the "
            "noise of a batch; noise.per micro_batch with batch.micro_size a multiple of the group does"
        )
    length = config.noise.average_samples
    if length is not None and length < 5 * largest:
        yield (
            f"noise.average_samples {length:,} is less than five updates of {largest:,} samples: too few for a confidence "
            "band at that batch size, without which no batch grows and nothing is said of the batch size"
        )
    if config.batch.growth == "adaptive" and largest == config.batch.size:
        yield (
            f"batch.growth adaptive: the batch cannot double from {config.batch.size:,} within batch.max_size or a tenth of "
            "the training set"
        )
    elif config.batch.growth == "adaptive" and (config.batch.max_size or 0) > num_train // 10:
        yield (
            f"batch.max_size {config.batch.max_size:,}: an adaptive batch stops at a tenth of the training set, "
            f"{num_train // 10:,} samples"
        )
    if config.scaling.rule == "adascale" and config.optimizer.name != "sgd":
        yield f"scaling.rule adascale is derived for SGD; with {config.optimizer.name} it is an experiment"


def _on_averages(run: Run) -> Iterator[str]:
    """Yield warnings about running averages that span too few updates or weight samples unequally."""
    config, largest = run.config, run.largest_batch
    optimizer, reference = config.optimizer, run.plan.reference
    averages = _averages(vars(reference))
    takes_rate_in = isinstance(optimizer, LARSConfig) or (
        isinstance(optimizer, SGDConfig) and optimizer.form == "velocity"
    )
    has_momentum = "momentum" in averages or averages.get("beta1", 0.0) > 0.0
    if config.batch.at_epoch_end == "cut" and has_momentum and not takes_rate_in:
        yield (
            "batch.at_epoch_end cut: the mean gradient of an epoch's smaller last batch stays in the running average with "
            "the weight of a full one; optimizer.form velocity, or carry, gives every sample the same weight"
        )
    if isinstance(optimizer, QuenchConfig) and 2 * largest > optimizer.K:
        yield (
            f"optimizer.K {optimizer.K:,} is less than two updates of {largest:,} samples: quench's first averages "
            "are of little more than one batch"
        )
    kappa, at_largest = largest / reference.batch_size, reference.at(largest)
    rules = {
        "alpha": config.scaling.beta2,
        **{name: getattr(config.scaling, name) for name in ("momentum", "beta1", "beta2")},
    }
    for name, scaled in _averages(at_largest).items():
        beta = averages[name]
        in_samples = scaled != beta and not isinstance(rules[name], float)
        if in_samples and kappa * (1.0 - beta) > 1.0 and scaled < 0.5:
            yield (
                f"{name}: the running average spans {1.0 / (1.0 - beta):.4g} updates of the reference, the batch is up to "
                f"{kappa:g} times the reference: kappa*(1-beta) = {kappa * (1.0 - beta):.3g} > 1, it no longer averages"
            )


def _averages(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the coefficients of running averages among an optimizer's arguments, by name."""
    found = {name: values[name] for name in ("momentum", "alpha") if values.get(name)}
    return found | dict(zip(("beta1", "beta2"), values.get("betas") or (), strict=False))

"""From a config to a result: the plan of a run, and the run itself."""

from __future__ import annotations

import json
import random
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import nn

from largebatch.checkpoint import CheckpointFolder, locked, replace_text
from largebatch.config import AdaptiveBase, Run
from largebatch.data import Source
from largebatch.data.sampler import effective_micro_batches
from largebatch.distributed import Backend, Ranks, create_backend, is_communication, launched_ranks
from largebatch.distributed.saving import cause_of
from largebatch.distributed.state import export_weights
from largebatch.models import norm_group_size
from largebatch.plan import Plan
from largebatch.plot import plot_run
from largebatch.report import create_progress, reference_table, stage_table, summary_table
from largebatch.resume import Found, choose_checkpoint
from largebatch.schedules import Warmup
from largebatch.section import LostRankError, UserError
from largebatch.task import Task
from largebatch.tracking import Observers, check_trackers, create_trackers
from largebatch.trainer import Summary, Trainer


def build_model(run: Run, task: Task) -> nn.Module:
    """Return the model with initial weights that depend on the seed alone, the same on every rank."""
    torch.manual_seed(run.seed)
    return run.model.build(task)


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
            "as configured does not divide by; use linear with optimizer.second_moment sample"
        )
    _check_batches(run, num_train, world_size, group_size)
    schedule = run.schedule.build(num_train)
    size, realize = run.batch.size, run.schedule.realize
    if realize != "lr":
        if run.scaling.rule == "none":
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
    if run.backend.squares_every > 1 and (run.optimizer.max_grad_norm is not None or run.precision == "fp16"):
        reason = "optimizer.max_grad_norm" if run.optimizer.max_grad_norm is not None else "precision fp16"
        raise UserError(f"backend.squares_every: squares add up over updates, which {reason} scales one by one; use 1")
    if run.backend.squares_every > 1 and run.optimizer.non_finite == "skip":
        raise UserError(
            "backend.squares_every: squares add up over updates, from which those of a skipped one cannot be taken out "
            "(optimizer.non_finite skip); use 1"
        )
    if run.tracked() == "micro_batch":
        units = effective_micro_batches(size, world_size, run.batch.micro_size, group_size)
        if units < 2:
            raise UserError(
                "optimizer.second_moment: micro_batch needs 2 micro-batches of an update or more over all ranks; "
                f"set batch.micro_size to at most {max(group_size, size // world_size // 2)}"
            )
    gain = reference.at(size)["lr"] / reference.lr
    start = run.warmup.start if run.warmup.start is not None else min(1.0, 1.0 / gain)
    if run.warmup.name != "none" and run.warmup.epochs == 0:
        raise UserError(f"warmup.epochs: '{run.warmup.name}' needs a length > 0, got 0")
    plan = Plan(
        reference,
        size,
        run.schedule.total_samples(num_train),
        num_train,
        schedule,
        Warmup(run.warmup.name, round(run.warmup.epochs * num_train), start),
        realize,
        run.batch.max_size if realize != "lr" else None,
        group_size,
        run.batch.at_epoch_end,
    )
    return plan, _warnings(run, plan, world_size)


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


def _warnings(run: Run, plan: Plan, world_size: int) -> list[str]:
    """Return what does not stop a run, but should be known before it is paid for."""
    found = []
    kappa = run.batch.size / run.batch.reference_size
    if run.batch.max_size is not None and run.schedule.realize == "lr":
        found.append("batch.max_size is not used: schedule.realize is lr, so the batch does not grow")
    if run.warmup.name == "none" and (run.warmup.epochs or run.warmup.start is not None):
        found.append("warmup.epochs and warmup.start are not used: warmup.name is none")
    if run.warmup.name != "none" and run.warmup.epochs >= run.schedule.epochs:
        found.append(f"the warm-up ({run.warmup.epochs:g} epochs) fills the whole run ({run.schedule.epochs:g} epochs)")
    if run.warmup.name != "none" and plan.warmup.start == 1.0:
        found.append(
            "the warm-up starts at the full learning rate, which is not above the reference's: it does nothing"
        )
    momentum = getattr(run.optimizer, "momentum", 0.0) or getattr(run.optimizer, "betas", (0.0,))[0]
    if run.batch.at_epoch_end == "cut" and momentum and getattr(run.optimizer, "form", "") != "velocity":
        found.append(
            "batch.at_epoch_end cut: the mean gradient of an epoch's smaller last batch stays in the running average with "
            "the weight of a full one; optimizer.form velocity, or carry, gives every sample the same weight"
        )
    largest, num_train = max(stage.batch_size for stage in plan.stages()), plan.samples_per_epoch
    if run.batch.micro_size is not None and run.batch.micro_size > -(-largest // world_size):
        found.append(
            f"batch.micro_size {run.batch.micro_size} is not used: no rank has more than {-(-largest // world_size)} samples "
            "of an update"
        )
    if largest > num_train / 10:
        found.append(
            f"batch size {largest:,} is more than a tenth of the {num_train:,} training samples: "
            "updates are few and the linear rule tends to break there (Smith et al. 2018)"
        )
    if kappa > 1 and run.scaling.rule == "linear" and isinstance(run.optimizer, AdaptiveBase) and not run.tracked():
        found.append(
            f"the second moment of {run.optimizer.name} shrinks as the batch grows by {kappa:g}, so the linear rule does not "
            "keep the update's size; optimizer.second_moment sample does"
        )
    if run.tracked() is None and (run.backend.squares_every > 1 or run.backend.squares_dtype != "float32"):
        found.append("backend.squares_every and squares_dtype are not used: no squares are tracked")
    if run.scaling.rule == "none" and kappa != 1:
        found.append(
            f"scaling.rule none: lr {run.optimizer.lr:g} is kept although the batch is {kappa:g} times the reference"
        )
    return found


@dataclass
class Result:
    """A finished run: its summary, and its folder."""

    summary: Summary
    folder: Path | None


class SharedError(UserError):
    """A mistake that rank 0 found and every rank was told of: one line a node says it."""


def default_folder(name: str) -> Path:
    """Return runs/NAME-DATE-TIME."""
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def check_folder(folder: Path, resume: bool = False) -> None:
    """Refuse a folder that cannot take a run.

    Args:
        folder: the run folder.
        resume: whether a run in it is to be continued.

    Raises:
        UserError: if it holds a run already, or is a file, or cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out: {folder} is a file; name a folder")
    holds_run = any((folder / name).exists() for name in ("metrics.jsonl", "config.yaml"))
    if not resume and (holds_run or CheckpointFolder(folder / "checkpoints").saved()):
        raise UserError(
            f"--out: {folder} already holds a run; continue it with --resume auto, name another folder, or remove it"
        )


def train(
    run: Run,
    folder: Path | None = None,
    console: Console | None = None,
    ranks: Ranks | None = None,
    source: Source | None = None,
    warnings: tuple[str, ...] = (),
    resume: str = "never",
) -> Result:
    """Train a run; everything that can be refused is refused before anything is written.

    Args:
        run: the config.
        folder: run folder; None writes nothing.
        console: where tables and progress go; None prints nothing.
        ranks: this process among all; None reads the environment that torchrun sets.
        source: the data, where the caller has loaded it already.
        warnings: what to tell beside the run's own warnings.
        resume: ``never``; ``auto`` continues the run in the folder, or begins it where there is none; or the path of a
            checkpoint or of a run folder to continue from.

    Raises:
        UserError: for what the user can mend.
    """
    ranks = launched_ranks() if ranks is None else ranks
    if ranks.rank != 0:
        folder_here, console = None, None
    else:
        folder_here = folder
    if folder_here is not None:
        check_folder(folder_here, resume != "never")
    check_trackers(run.log)
    source = run.data.load(run.seed) if source is None else source
    model = build_model(run, source.task)
    group_size = norm_group_size(model)
    plan, plan_warnings = build_plan(run, len(source.train), ranks.world_size, group_size)
    try:
        backend = create_backend(run.backend, run.precision, ranks)
    except UserError as error:
        error.everywhere = False
        raise
    # Random layers (dropout) draw other numbers on every rank; the weights were drawn alike.
    own_seed = int(np.random.SeedSequence([run.seed, ranks.rank + 1]).generate_state(1)[0])
    torch.manual_seed(own_seed)
    np.random.seed(own_seed)  # and Python's: a user's model or data may draw from them
    random.seed(own_seed)
    observers, is_lost = Observers(), False
    with ExitStack() as held:
        try:
            is_new = folder_here is not None and not folder_here.exists()
            if folder_here is not None and not is_new:
                held.enter_context(locked(folder_here))
            found, notes = _agree_on_checkpoint(run, folder, resume, len(source.train), backend)
            if console is not None:
                _say_start(console, run, source, model, plan, backend.describe(), ranks.world_size, group_size)
                for warning in (*warnings, *plan_warnings, *notes):
                    console.print(f"[yellow]warning:[/yellow] {warning}", highlight=False)
            trainer = Trainer(run, source, model, plan, backend, observers, folder, found)
            done = trainer.progress.samples_seen
            if folder_here is not None:
                if is_new:
                    _make_folder(folder_here)
                    held.enter_context(locked(folder_here))
                _write_config(folder_here, run)
                observers.observers += create_trackers(run, folder_here)
                observers.rewind(done)
            if console is not None:
                for line in _resumption(found, trainer, run):
                    console.print(line, highlight=False)
                observers.observers.append(create_progress(console, plan.total_samples, done))
            summary = trainer.train()
            del trainer
        except SharedError:
            raise
        except UserError as error:
            error.everywhere = False  # a broken sample, say, which one rank alone has met
            backend.watch.report(str(error), is_own=True)
            raise
        except Exception as error:
            if ranks.world_size == 1 or not is_communication(error):
                backend.watch.report(f"{type(error).__name__}: {cause_of(error)}", is_own=True)
                raise
            is_lost = True
            raise LostRankError(f"{backend.watch.explain(cause_of(error))}; {_what_is_kept(folder)}") from error
        finally:
            observers.close()
            if not is_lost:  # a group that has lost a rank cannot be left in good order
                backend.close()
        if folder_here is not None:
            _write_results(folder_here, run, summary, plan)
    if console is not None:
        console.print(summary_table(summary.as_dict(), str(folder_here) if folder_here else None))
    return Result(summary, folder_here)


def _write_results(folder: Path, run: Run, summary: Summary, plan: Plan) -> None:
    """Write summary.json, the weights of a finished run, and curve.png.

    Raises:
        UserError: if they cannot be written.
    """
    try:
        if summary.status == "finished":
            last = CheckpointFolder(folder / "checkpoints").place(summary.samples)
            export_weights(last, folder / "model.safetensors")
        # After the weights: who reads "finished" finds them.
        replace_text(folder / "summary.json", json.dumps(summary.as_dict(), indent=2) + "\n")
        title = f"{folder.name}:  batch {run.batch.reference_size:,} → {run.batch.size:,}, {run.optimizer.name}"
        plot_run(folder, title, plan.samples_per_epoch)
    except OSError as error:
        raise UserError(
            f"{folder}: the run is {summary.status}, but its results cannot be written ({error.strerror})"
        ) from error


def _what_is_kept(folder: Path | None) -> str:
    saved = CheckpointFolder(folder / "checkpoints").saved() if folder is not None else []
    if not saved:
        return "there is no checkpoint yet"
    return f"the last checkpoint is {saved[-1]}: continue with --resume auto --out {folder}"


def _agree_on_checkpoint(
    run: Run, folder: Path | None, resume: str, num_train: int, backend: Backend
) -> tuple[Found | None, tuple[str, ...]]:
    """Return the checkpoint that rank 0 chose, on every rank, and what it noticed.

    Raises:
        UserError: if there is none to continue from, or it is of another run, or a rank does not see it.
    """
    if resume == "never" or folder is None:
        return None, ()
    found: Found | None = None
    notes: tuple[str, ...] = ()
    error: UserError | None = None
    if backend.rank == 0:
        try:
            found, notes = choose_checkpoint(run, resume, folder, num_train)
            CheckpointFolder(folder / "checkpoints").clean()
        except UserError as raised:
            error = raised
    found, notes, error = backend.share((found, notes, error))
    if error is not None:
        raise SharedError(str(error))
    if found is not None and not found.path.is_dir():
        raise UserError(f"--resume: {found.path} is not there; the run folder must be on a file system all ranks share")
    return found, notes


def _resumption(found: Found | None, trainer: Trainer, run: Run) -> list[str]:
    """Return what a resumed run says before it goes on."""
    if found is None:
        return []
    progress, saved = trainer.progress, found.state
    lines = [
        f"resumed from {found.path}: update {progress.step:,}, {progress.samples_seen:,} samples, "
        f"written {saved['date']} by {saved['engine']}"
    ]
    if run.tracked() == "micro_batch" and saved["world_size"] != trainer.backend.world_size:
        lines.append("second moments come from other micro-batches than before: the same in the mean, not to rounding")
    if trainer.micro_size != run.batch.micro_size:
        lines.append(
            f"{saved['world_size']} ranks were there, now {trainer.backend.world_size}: micro-batches stay at "
            f"{trainer.micro_size} samples, the rest is accumulated"
        )
    return lines


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: cannot write to {folder} ({error.strerror})") from error


def _write_config(folder: Path, run: Run) -> None:
    try:
        (folder / "summary.json").unlink(missing_ok=True)  # of the part of the run that ended
        replace_text(folder / "config.yaml", run.to_yaml())
    except OSError as error:
        raise UserError(f"--out: cannot write to {folder} ({error.strerror})") from error


def _say_start(
    console: Console,
    run: Run,
    source: Source,
    model: nn.Module,
    plan: Plan,
    devices: str,
    world_size: int,
    group_size: int,
) -> None:
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"[bold]{run.model.name}[/bold], {parameters:,} parameters, on [bold]{run.data.name}[/bold], "
        f"{len(source.train):,} training and {len(source.val):,} validation samples; {devices}",
        highlight=False,
    )
    console.print(reference_table(plan, run.tracked()), stage_table(plan, world_size, run.batch.micro_size, group_size))


def _data_sizes(run: Run) -> tuple[int, Task, str]:
    """Return training samples, task, and a word on where they come from: the data, or what is published of it.

    Raises:
        UserError: if the data is not there, and nothing is known of it.
    """
    try:
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
    num_train, task, where = _data_sizes(run)
    with torch.device("meta"):
        model = run.model.build(task)
    group_size = norm_group_size(model)
    plan, warnings = build_plan(run, num_train, world_size, group_size)
    console.print(
        f"[bold]{run.model.name}[/bold], {sum(p.numel() for p in model.parameters()):,} parameters, on "
        f"[bold]{run.data.name}[/bold], {num_train:,} training samples{where}",
        highlight=False,
    )
    console.print(reference_table(plan, run.tracked()), stage_table(plan, world_size, run.batch.micro_size, group_size))
    verdict = "satisfies" if plan.schedule.robbins_monro else "does not satisfy"
    console.print(
        f"schedule '{run.schedule.name}' {verdict} the classical conditions for convergence: {plan.schedule.why}",
        highlight=False,
    )
    for warning in warnings:
        console.print(f"[yellow]warning:[/yellow] {warning}", highlight=False)

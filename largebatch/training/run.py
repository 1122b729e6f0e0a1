"""Training of a run from its config to its results."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from torch import nn
from torch.nn.parameter import is_lazy

from largebatch.checkpoint.folder import CheckpointFolder, locked, replace_text
from largebatch.checkpoint.manager import Checkpoint
from largebatch.config.schema import Config
from largebatch.data import Source, digest, seed_generators
from largebatch.data.sampler import SampleKeys
from largebatch.data.source import readable
from largebatch.distributed import Backend, Meeting, Ranks, choose_backend, is_communication, launched_ranks
from largebatch.distributed.state import export_weights
from largebatch.distributed.stopping import StopRequest
from largebatch.distributed.watch import cause_of
from largebatch.errors import LostRankError, LostWorkerError, SharedError, UserError
from largebatch.models import FactoryModel, norm_group_size
from largebatch.moments import track, verify
from largebatch.planner.checks import check_single_samples
from largebatch.planner.resolve import resolve
from largebatch.planner.run import Run
from largebatch.planner.show import print_plan, print_warnings
from largebatch.reporting.loggers import Loggers, check_trackers, create_trackers
from largebatch.reporting.progress import Summary
from largebatch.reporting.tables import create_progress, summary_table
from largebatch.scaling.plan import Plan
from largebatch.section import within_memory
from largebatch.task import Task
from largebatch.training.agreement import difference, show_checkpoint, show_model, show_run
from largebatch.training.resume import choose_checkpoint
from largebatch.training.run_folder import check_folder, claim, lock_wait
from largebatch.training.trainer import Trainer


def build_model(config: Config, task: Task) -> nn.Module:
    """Return the model with initial weights that depend only on the seed, and so are the same on every rank.

    Raises:
        UserError: if no parameter is trainable, or a tensor is sparse, has no values, was made in inference mode, or is
            complex, for which a run has no precision.
    """
    seed_generators(config.seed)
    with within_memory("model"):
        model = config.model.build(task)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        kind = "lazy" if is_lazy(tensor) else "meta" if tensor.is_meta else str(tensor.layout).removeprefix("torch.")
        if kind == "strided" and tensor.is_inference():
            raise UserError(
                f"model.name: '{name}' of {config.model.name} was made under torch.inference_mode, and cannot be trained; "
                "build the model outside of it"
            )
        if kind != "strided":
            raise UserError(
                f"model.name: '{name}' of {config.model.name} is a {kind} tensor; a run needs dense ones that hold values"
            )
        if tensor.is_complex():
            raise UserError(
                f"model.name: '{name}' of {config.model.name} is complex, and would lose its imaginary part; make it real and "
                "use torch.view_as_complex on it"
            )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            f"model.name: {config.model.name} has no parameter to train: expected one with requires_grad or more"
        )
    return model


@dataclass
class Result:
    """A finished run: its summary, and its folder."""

    summary: Summary
    folder: Path | None


def train(
    config: Config,
    folder: Path | None = None,
    *,
    console: Console | None = None,
    ranks: Ranks | None = None,
    source: Source | None = None,
    warnings: tuple[str, ...] = (),
    resume: str = "never",
    may_rename: bool = False,
) -> Result:
    """Train a run. All checks of the arguments are made before anything is written.

    Args:
        config: the config.
        folder: the run folder; None to write nothing.
        console: the console for tables and progress; None to print nothing.
        ranks: the rank of this process and the number of ranks; None to read the environment that torchrun sets.
        source: the data, if the caller has already loaded it.
        warnings: warnings to print in addition to the run's own.
        resume: ``never``; ``auto`` to continue the run in the folder, or begin it if there is none; or the path of a checkpoint
            or of a run folder to continue from.
        may_rename: whether to append a number to the name of a new folder if another run has taken the name.

    Raises:
        UserError: for any problem that the user can correct.
    """
    ranks = launched_ranks() if ranks is None else ranks
    ranks = replace(ranks, timeout_seconds=config.backend.timeout_seconds)
    console = console if ranks.rank == 0 else None
    meeting = Meeting(ranks)
    ready = _prepare(config, folder, source, resume, may_rename, ranks, meeting)
    backend = ready.open_backend()
    # Random layers (dropout) draw different numbers on every rank; the initial weights are the same.
    seed_generators(int(np.random.SeedSequence([config.seed, ranks.rank + 1]).generate_state(1)[0]))
    loggers = Loggers()
    with ExitStack() as held:
        with _told(backend, lambda: _what_is_kept(folder)) as opened:
            opened.callback(loggers.close)
            folder = backend.broadcast(folder)  # a name with the time may differ between ranks
            mine = folder if ranks.rank == 0 else None
            is_new = mine is not None and (may_rename or not mine.exists())
            if mine is not None and not is_new:
                held.enter_context(locked(mine, lock_wait()))
                check_folder(mine, resume != "never")  # again: another run may have begun and ended since
            found, notes = _agree_on_checkpoint(config, folder, resume, ready.digest, backend, meeting)
            if found is None:
                notes += _verify_squares(ready, backend)
            if console is not None:
                _print_head(console, ready, backend, (*warnings, *ready.source.notes, *ready.run.warnings, *notes))
            folder = _agree_on_folder(folder, is_new, may_rename, held, backend)
            trainer = Trainer(
                ready.run,
                ready.source,
                ready.model,
                backend,
                logger=loggers,
                folder=folder,
                found=found,
                data=ready.digest,
            )
            opened.callback(trainer.step.loader.close)  # close the workers before anything else
            _open_loggers(loggers, folder if ranks.rank == 0 else None, console, trainer, found)
            summary = trainer.train()
            plan = trainer.plan  # includes the changes of an adaptive batch
            del trainer
        folder = folder if ranks.rank == 0 else None
        with StopRequest():  # a signal does not interrupt the writing of results
            notes = () if folder is None else _write_results(folder, config, summary, plan)
    if console is not None:
        print_warnings(console, notes)
        console.print(summary_table(summary.as_dict(), str(folder) if folder else None))
    return Result(summary, folder)


def _print_head(console: Console, ready: _Ready, backend: Backend, warnings: tuple[str, ...]) -> None:
    """Print the plan and the warnings for the user."""
    sizes = f"{len(ready.source.train):,} training and {len(ready.source.val):,} validation samples"
    print_plan(console, ready.run, ready.model, f"{sizes}; {backend.describe()}")
    print_warnings(console, warnings)


def _open_loggers(
    loggers: Loggers, folder: Path | None, console: Console | None, trainer: Trainer, found: Checkpoint | None
) -> None:
    """Open the outputs of rank 0: the config and metrics.jsonl in the folder, trackers, and the progress display."""
    config = trainer.config
    if folder is not None:
        _write_config(folder, config)
        loggers.loggers += create_trackers(config, folder, _teller(console))
        loggers.rewind(trainer.progress.samples_seen)
    if console is not None:
        for line in _resume_lines(found, trainer):
            console.print(line, highlight=False)
        loggers.loggers.append(create_progress(console, trainer.plan.total_samples, trainer.clock))


@dataclass(frozen=True)
class _Ready:
    """The data, model and plan that the ranks have agreed on before any of them opens its engine."""

    source: Source
    digest: dict[str, Any]
    model: nn.Module
    run: Run
    open_backend: Callable[[], Backend]


def _prepare(
    config: Config,
    folder: Path | None,
    source: Source | None,
    resume: str,
    may_rename: bool,
    ranks: Ranks,
    meeting: Meeting,
) -> _Ready:
    """Load the data, build the model and the plan, and check that all ranks have the same ones.

    Raises:
        UserError: on every rank, for any problem that the user can correct.
    """
    with meeting.agree("config", difference) as shown:
        shown.update(show_run(config, resume, folder))
        if ranks.rank == 0 and folder is not None and not may_rename:
            check_folder(folder, resume != "never")
        check_trackers(config.log)
    with meeting.agree("data and the model", difference) as shown:
        if source is None:
            with within_memory("data"):
                source = config.data.load(config.seed)
        shown["data"] = known = digest(source, config.loader)
        model = build_model(config, source.task)
        shown.update(show_model(model))
        group_size = norm_group_size(model)
        run = resolve(config, len(source.train), ranks.world_size, group_size)
        check_single_samples(run, source.task)
        open_backend = choose_backend(config.backend, config.precision, replace(ranks, store=meeting.store))
    return _Ready(source, known, model, run, open_backend)


@contextmanager
def _told(backend: Backend, what_is_kept: Callable[[], str]) -> Iterator[ExitStack]:
    """Report the error that ends this rank to the others, and add the last checkpoint to the error of a lost rank or worker.

    It yields a stack of resources that is closed at the end, in reverse order, before the engine is closed.
    """
    is_lost, opened = False, ExitStack()
    try:
        yield opened
    except SharedError:
        raise
    except UserError as error:
        error.everywhere = False  # for example a broken sample that only one rank has read
        backend.watch.report(str(error), is_own=True, is_mistake=True)
        raise
    except LostWorkerError as error:
        backend.watch.report(str(error), is_own=True)
        raise LostWorkerError(f"{error}; {what_is_kept()}") from error
    except SystemExit as error:  # raised by the code of the model or the data
        backend.watch.report(f"its code exits (code {error.code})", is_own=True, is_mistake=True)
        raise
    except Exception as error:
        if backend.world_size == 1 or not is_communication(error):
            backend.watch.report(f"{type(error).__name__}: {cause_of(error)}", is_own=True)
            raise
        is_lost = True
        lost = LostRankError(f"{backend.watch.explain(cause_of(error))}; {what_is_kept()}")
        lost.is_mistake = backend.watch.found_mistake
        raise lost from error
    finally:
        opened.close()
        if not is_lost:  # a group that has lost a rank cannot be closed properly
            backend.close()


def _teller(console: Console | None) -> Callable[[str], None]:
    """Return a function that prints a warning."""
    return lambda line: None if console is None else print_warnings(console, (line,))


def _verify_squares(ready: _Ready, backend: Backend) -> tuple[str, ...]:
    """Verify the squares of a user's model against single samples; return a warning if this is not possible.

    Raises:
        UserError: if they are wrong.
    """
    run, model, source = ready.run, ready.model, ready.source
    if run.tracked != "sample" or not isinstance(run.config.model, FactoryModel) or len(source.train) < 2:
        return ()
    track(model, per="sample", fallback=run.fallback)
    numbers = np.arange(min(4, len(source.train)))
    model.to(backend.device, backend.dtype)
    *fetched, missing = readable(source.train.__getitems__(SampleKeys(np.zeros_like(numbers), numbers)))
    if len(missing) > len(numbers) - 2:
        return (f"the squares of {run.config.model.name} could not be verified: the first samples cannot be read",)
    batch = [part.to(backend.device, backend.dtype if part.is_floating_point() else None) for part in fetched]
    try:
        reason = verify(model, lambda batch: source.task.losses(model(batch[0]), batch[1]).sum(), batch)
    except UserError as error:
        raise SharedError(str(error)) from None
    return () if reason is None else (f"the squares of {run.config.model.name} could not all be verified: {reason}",)


def _write_results(folder: Path, config: Config, summary: Summary, plan: Plan) -> tuple[str, ...]:
    """Write summary.json, the weights of a finished run, and curve.png; return a warning if the figure was not drawn.

    Raises:
        UserError: if the weights or the summary cannot be written.
    """
    try:
        if summary.status == "finished":
            last = CheckpointFolder(folder / "checkpoints").place(summary.samples)
            export_weights(last, folder / "model.safetensors")
        # Write the weights first, so that they exist once the summary says "finished".
        replace_text(folder / "summary.json", json.dumps(summary.as_dict(), indent=2) + "\n")
    except OSError as error:
        raise UserError(
            f"{folder}: the run is {summary.status}, but its results cannot be written ({error.strerror}); once they can, "
            f"--resume auto --out {folder} writes them"
        ) from error
    largest = plan.largest_batch()
    title = f"{folder.resolve().name}:  batch {config.batch.reference_size:,} → {largest:,}, {config.optimizer.name}"
    try:
        from largebatch.reporting.plots import plot_run  # imported here because matplotlib loads slowly

        plot_run(folder, title, plan.samples_per_epoch)
    except Exception as error:  # a failed plot does not fail the run
        return (f"{folder / 'curve.png'} was not drawn: {cause_of(error)}",)
    return ()


def _what_is_kept(folder: Path | None) -> str:
    saved = CheckpointFolder(folder / "checkpoints").saved() if folder is not None else []
    if not saved:
        return "there is no checkpoint yet"
    return f"the last checkpoint is {saved[-1]}: continue with --resume auto --out {folder}"


def _agree_on_checkpoint(
    config: Config, folder: Path | None, resume: str, data: dict[str, Any], backend: Backend, meeting: Meeting
) -> tuple[Checkpoint | None, tuple[str, ...]]:
    """Return, on every rank, the checkpoint that rank 0 chose and its notes about it.

    Raises:
        UserError: if there is none to continue from, it belongs to another run, or a rank sees a different one.
    """
    if resume == "never" or folder is None:
        return None, ()
    found: Checkpoint | None = None
    notes: tuple[str, ...] = ()
    error: UserError | None = None
    if backend.rank == 0:
        try:
            found, notes = choose_checkpoint(config, resume, folder, data)
            CheckpointFolder(folder / "checkpoints").clean()
        except UserError as raised:
            error = raised
    found, notes, error = backend.broadcast((found, notes, error))
    if error is not None:
        raise SharedError(str(error))
    if found is None:
        return None, notes
    with meeting.agree("checkpoint", difference) as shown:
        shown.update(show_checkpoint(found.path))
    return found, notes


def _resume_lines(found: Checkpoint | None, trainer: Trainer) -> list[str]:
    """Return the lines that a resumed run prints before it continues."""
    if found is None:
        return []
    progress, saved, run = trainer.progress, found.state, trainer.run
    lines = [
        f"resumed from {found.path}: update {progress.step:,}, {progress.samples_seen:,} samples, "
        f"written {saved['date']} by {saved['engine']}"
    ]
    if run.second_moment == "micro_batch" and saved["world_size"] != trainer.backend.world_size:
        lines.append("second moments come from other micro-batches than before: the same in the mean, not to rounding")
    if trainer.micro_size != run.config.batch.micro_size:
        lines.append(
            f"{saved['world_size']} ranks were there, now {trainer.backend.world_size}: micro-batches stay at "
            f"{trainer.micro_size} samples, the rest is accumulated"
        )
    return lines


def _agree_on_folder(
    folder: Path | None, is_new: bool, may_rename: bool, held: ExitStack, backend: Backend
) -> Path | None:
    """Make and lock a new run folder on rank 0; return its path on every rank.

    Raises:
        UserError: if another run has made it in the meantime, or it cannot be made.
    """
    error: UserError | None = None
    if is_new and folder is not None:
        try:
            folder = claim(folder, may_rename, held)
        except UserError as raised:
            error = raised
    folder, error = backend.broadcast((folder, error))
    if error is not None:
        raise SharedError(str(error))
    return folder


def _write_config(folder: Path, config: Config) -> None:
    try:
        (folder / "summary.json").unlink(missing_ok=True)  # from the earlier part of the run
        replace_text(folder / "config.yaml", config.to_yaml())
    except OSError as error:
        raise UserError(f"--out: cannot write to {folder} ({error.strerror})") from error

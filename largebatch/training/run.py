"""From a config to a result."""

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
    """Return the model with initial weights that depend on the seed alone, the same on every rank.

    Raises:
        UserError: if there is nothing to train, or a tensor that is complex, which no precision of a run has room for,
            sparse, or without values.
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
    """Train a run; everything that can be refused is refused before anything is written.

    Args:
        config: the config.
        folder: run folder; None writes nothing.
        console: where tables and progress go; None prints nothing.
        ranks: this process among all; None reads the environment that torchrun sets.
        source: the data, where the caller has loaded it already.
        warnings: what to tell beside the run's own warnings.
        resume: ``never``; ``auto`` continues the run in the folder, or begins it where there is none; or the path of a
            checkpoint or of a run folder to continue from.
        may_rename: whether a new folder may get a number behind its name where another run has taken it.

    Raises:
        UserError: for what the user can mend.
    """
    ranks = launched_ranks() if ranks is None else ranks
    ranks = replace(ranks, timeout_seconds=config.backend.timeout_seconds)
    console = console if ranks.rank == 0 else None
    meeting = Meeting(ranks)
    ready = _prepare(config, folder, source, resume, may_rename, ranks, meeting)
    backend = ready.open_backend()
    # Random layers (dropout) draw other numbers on every rank; the weights were drawn alike.
    seed_generators(int(np.random.SeedSequence([config.seed, ranks.rank + 1]).generate_state(1)[0]))
    loggers = Loggers()
    with ExitStack() as held:
        with _told(backend, lambda: _what_is_kept(folder)) as opened:
            opened.callback(loggers.close)
            folder = backend.broadcast(folder)  # one by the clock may differ by rank
            mine = folder if ranks.rank == 0 else None
            is_new = mine is not None and (may_rename or not mine.exists())
            if mine is not None and not is_new:
                held.enter_context(locked(mine, lock_wait()))
                check_folder(mine, resume != "never")  # again: another run may have come and gone
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
            opened.callback(trainer.step.loader.close)  # the workers, before anything else is closed
            _open_loggers(loggers, folder if ranks.rank == 0 else None, console, trainer, found)
            summary = trainer.train()
            plan = trainer.plan  # with the changes of an adaptive batch
            del trainer
        folder = folder if ranks.rank == 0 else None
        with StopRequest():  # the results of a run that has ended take less time than to begin it again for them
            notes = () if folder is None else _write_results(folder, config, summary, plan)
    if console is not None:
        print_warnings(console, notes)
        console.print(summary_table(summary.as_dict(), str(folder) if folder else None))
    return Result(summary, folder)


def _print_head(console: Console, ready: _Ready, backend: Backend, warnings: tuple[str, ...]) -> None:
    """Print the plan and what its user should know."""
    sizes = f"{len(ready.source.train):,} training and {len(ready.source.val):,} validation samples"
    print_plan(console, ready.run, ready.model, f"{sizes}; {backend.describe()}")
    print_warnings(console, warnings)


def _open_loggers(
    loggers: Loggers, folder: Path | None, console: Console | None, trainer: Trainer, found: Checkpoint | None
) -> None:
    """Open what takes the rows, on rank 0: the config and metrics.jsonl of the folder, trackers, the progress."""
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
    """What the ranks have agreed on before any of them opens its engine."""

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
    """Load the data, build the model and the plan, and see that all ranks have the same.

    Raises:
        UserError: for what the user can mend; on every rank.
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
    """Tell the other ranks what ends this one, and say of a lost rank or worker what is kept.

    Yields a stack of what to close at the end, the last first; the engine is closed after all of it.
    """
    is_lost, opened = False, ExitStack()
    try:
        yield opened
    except SharedError:
        raise
    except UserError as error:
        error.everywhere = False  # a broken sample, say, which one rank alone has met
        backend.watch.report(str(error), is_own=True, is_mistake=True)
        raise
    except LostWorkerError as error:
        backend.watch.report(str(error), is_own=True)
        raise LostWorkerError(f"{error}; {what_is_kept()}") from error
    except SystemExit as error:  # of the model's or the data's own code
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
        if not is_lost:  # a group that has lost a rank cannot be left in good order
            backend.close()


def _teller(console: Console | None) -> Callable[[str], None]:
    """Return what prints a warning."""
    return lambda line: None if console is None else print_warnings(console, (line,))


def _verify_squares(ready: _Ready, backend: Backend) -> tuple[str, ...]:
    """Hold the squares of a model from elsewhere against single samples; return what to tell where that cannot be done.

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
    """Write summary.json, the weights of a finished run, and curve.png; return what to tell of the picture.

    Raises:
        UserError: if the weights or the summary cannot be written.
    """
    try:
        if summary.status == "finished":
            last = CheckpointFolder(folder / "checkpoints").place(summary.samples)
            export_weights(last, folder / "model.safetensors")
        # After the weights: who reads "finished" finds them.
        replace_text(folder / "summary.json", json.dumps(summary.as_dict(), indent=2) + "\n")
    except OSError as error:
        raise UserError(
            f"{folder}: the run is {summary.status}, but its results cannot be written ({error.strerror}); once they can, "
            f"--resume auto --out {folder} writes them"
        ) from error
    largest = plan.largest_batch()
    title = f"{folder.resolve().name}:  batch {config.batch.reference_size:,} → {largest:,}, {config.optimizer.name}"
    try:
        from largebatch.reporting.plots import plot_run  # matplotlib takes its time, and every rank comes by here

        plot_run(folder, title, plan.samples_per_epoch)
    except Exception as error:  # a picture fails no run
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
    """Return the checkpoint that rank 0 chose, on every rank, and what it noticed.

    Raises:
        UserError: if there is none to continue from, or it is of another run, or a rank does not see the same one.
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
    """Return what a resumed run says before it goes on."""
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
    """Make a new run folder on rank 0 and hold it; return it on every rank.

    Raises:
        UserError: if another run has made it meanwhile, or it cannot be made.
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
        (folder / "summary.json").unlink(missing_ok=True)  # of the part of the run that ended
        replace_text(folder / "config.yaml", config.to_yaml())
    except OSError as error:
        raise UserError(f"--out: cannot write to {folder} ({error.strerror})") from error

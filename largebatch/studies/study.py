"""A study: variants of one config, with several seeds each, compared in a table and a figure.

    base: fashion_mnist_cnn_bn.yaml         # relative to the study's file
    seeds: [0, 1, 2]
    set: {schedule.epochs: 9}               # for every variant
    variants:
      reference: {batch.size: 32}           # the others are compared with the first variant
      no warm-up: {batch.size: 512, warmup.name: none}

With ``methods``, each variant but the first is run with each method, and a second table has a column of distances for each
method. With ``groups``, all of this is repeated for each group, with its own reference.

Every run has an ordinary run folder, STUDY/VARIANT/seed-N. A study that was interrupted continues where it stopped.
"""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, ValidationError
from rich.console import Console
from rich.table import Table

from largebatch.checkpoint.folder import replace_text
from largebatch.config.file import merge_flags, parse_config, parse_flags, read_yaml
from largebatch.config.schema import Config
from largebatch.distributed import Ranks
from largebatch.errors import LostWorkerError, UserError
from largebatch.reporting.loggers import Row, read_metrics
from largebatch.reporting.tables import create_console, duration
from largebatch.section import Section
from largebatch.studies.folder import UNFINISHED, check_study_folder, is_finished, read_summary, results_told
from largebatch.training.run import train


class Study(Section):
    """The file of a study."""

    base: str
    """Config that the variants change, beside the study's file."""
    seeds: list[int] = Field(min_length=1)
    """Seeds of every variant."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Flags for every variant: {section.key: value}."""
    variants: dict[str, dict[str, Any]] = Field(min_length=1)
    """Flags of each variant, by its name; the first is the reference of the comparison."""
    methods: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Flags of each method, by its name; every variant but the first is run by each."""
    groups: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Flags of each group, by its name; all variants are run in each."""

    def cells(self) -> Iterator[tuple[Cell, dict[str, Any]]]:
        """Yield every cell of the study with its flags."""
        for group, group_flags in (self.groups or {"": {}}).items():
            for number, (variant, variant_flags) in enumerate(self.variants.items()):
                methods = self.methods if self.methods and number else {"": {}}
                for method, method_flags in methods.items():
                    flags = {**self.set, **group_flags, **variant_flags, **method_flags}
                    yield Cell(group, variant, method, number == 0), flags


@dataclass(frozen=True)
class Cell:
    """Position of a variant in the table."""

    group: str
    variant: str
    method: str
    is_reference: bool

    def __str__(self) -> str:
        return ", ".join(part for part in (self.group, self.variant, self.method) if part)


@dataclass
class Variant:
    """Results of the runs of one variant, for each seed.

    Args:
        cell: its position in the table.
        config: its config with the first seed.
        summaries: the summary.json of each seed.
        epochs: the epochs of the curves, (p,); by AdaScale's clock if it is used.
        val_loss: validation loss of each seed at those epochs, (seeds, p); NaN after the run diverged.
        train_loss: training loss of each seed at the end, from `last_training_loss`.
    """

    cell: Cell
    config: Config
    summaries: list[dict[str, Any]] = field(default_factory=list)
    epochs: np.ndarray = field(default_factory=lambda: np.zeros(0))
    val_loss: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    train_loss: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name in tables and figures."""
        return str(self.cell)

    def finals(self, name: str) -> np.ndarray:
        """Return the values of a summary's key for the seeds that finished."""
        done = [s[name] for s in self.summaries if s["status"] == "finished" and s[name] is not None]
        return np.array(done, dtype=float)


def load_study(path: Path, flags: dict[str, Any]) -> tuple[Study, dict[Cell, list[Config]]]:
    """Read a study and the config of each of its runs.

    Args:
        path: the study's file.
        flags: flags from the command line for every variant, which take precedence over the file.

    Raises:
        UserError: for any error in the study, its base or a variant.
    """
    try:
        study = Study.model_validate(read_yaml(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {where}: {first['msg']}; a study has base, seeds, set and variants") from error
    folders = [slug(str(cell)) for cell, _ in study.cells()]
    unclear = sorted({name for name in folders if not name.strip(".") or folders.count(name) > 1})
    if unclear or len(set(study.seeds)) < len(study.seeds):
        what = f"names that give one folder: {', '.join(unclear) or study.seeds}"
        raise UserError(f"{path}: expected variants and seeds of different names, got {what}")
    runs: dict[Cell, list[Config]] = {}
    for cell, changes in study.cells():
        runs[cell] = []
        for seed in study.seeds:
            values = read_yaml(path.parent / study.base)
            merge_flags(values, {**changes, **flags, "seed": seed})
            runs[cell].append(parse_config(values, f"{path}: variant '{cell}'"))
    return study, runs


def slug(name: str) -> str:
    """Return a variant's name in a form suitable for a folder."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


# Time in seconds in which a run can save its state after its study has ended.
LAST_SAVE_SECONDS = 120.0


def _start_worker(threads: int) -> None:
    """Set the number of threads, and make the worker save and stop if the study's process ends."""
    torch.set_num_threads(threads)
    parent = parent_process()
    if parent is not None:

        def follow() -> None:
            parent.join()
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(LAST_SAVE_SECONDS)
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()


def _train_quietly(config: Config, folder: Path) -> dict[str, Any]:
    """Train or resume one run of a study in a worker process; return its summary."""
    summary = train(config, folder, ranks=Ranks(), resume="auto").summary
    parent = parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(1)  # no process is left to receive the result
    if summary.status in UNFINISHED:
        raise KeyboardInterrupt
    return summary.as_dict()


def run_study(path: Path, out: Path | None, jobs: int, flag_words: list[str] | None = None) -> int:
    """Train the runs that are not finished, then write table.md, table.json and curves.png; return the exit code.

    Args:
        path: the study's file.
        out: the study folder; None for runs/NAME.
        jobs: number of runs that train at the same time.
        flag_words: words of ``--section.key VALUE`` flags for every variant.
    """
    if jobs < 1:
        raise UserError(f"--jobs: expected at least 1, got {jobs}")
    study, runs = load_study(path, parse_flags(flag_words or []))
    out = out or Path("runs") / path.stem
    check_study_folder(out)
    console = create_console()
    todo = []
    for cell, by_seed in runs.items():
        for seed, config in zip(study.seeds, by_seed, strict=True):
            folder = out / slug(str(cell)) / f"seed-{seed}"
            if not is_finished(config, folder):
                todo.append((cell, seed, config, folder))
    total = sum(map(len, runs.values()))
    console.print(f"{path.stem}: {total} runs, {total - len(todo)} of them finished before; {jobs} at a time in {out}")
    given = re.match(r"\s*([1-9][0-9]*)", os.environ.get("OMP_NUM_THREADS", ""))  # OpenMP also accepts "4,2" (nested)
    threads = int(given[1]) if given else max(1, (os.cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(jobs, get_context("spawn"), _start_worker, (threads,)) as pool:
        futures = {pool.submit(_train_quietly, config, folder): (cell, seed) for cell, seed, config, folder in todo}
        try:
            for future in as_completed(futures):
                cell, seed = futures[future]
                summary = future.result()
                accuracy = f"  accuracy {summary['val_accuracy']:.2%}" if summary["val_accuracy"] is not None else ""
                val = f"  val {summary['val_loss']:.4f}" if summary["val_loss"] is not None else ""
                console.print(
                    f"{cell}, seed {seed}: {summary['status']}{val}{accuracy}  {duration(summary['seconds'])}",
                    highlight=False,
                )
        except BrokenProcessPool as error:
            raise LostWorkerError(
                "a process that trained a run of the study died: killed, as for want of memory, or ended by the run's code; "
                f"the finished runs are in {out}, and the same command trains the others"
            ) from error
        except BaseException:
            if sum(future.cancel() for future in futures):  # a later call of the command trains these
                console.print("stopping once the runs under way are done")
            raise
    with results_told(out):
        variants = [read_variant(cell, by_seed, study.seeds, out) for cell, by_seed in runs.items()]
        write_results(variants, out, path.stem, console)
    return 0


def read_variant(cell: Cell, runs: list[Config], seeds: list[int], out: Path) -> Variant:
    """Read the results of a variant's runs; curves are interpolated to common epochs."""
    variant = Variant(cell, runs[0])
    curves = []
    for seed in seeds:
        folder = out / slug(str(cell)) / f"seed-{seed}"
        variant.summaries.append(read_summary(folder))
        updates, evaluations = read_metrics(folder / "metrics.jsonl")
        if not evaluations and variant.summaries[-1]["status"] == "finished":
            raise UserError(
                f"{folder}: the run is finished, but metrics.jsonl has no evaluation; remove {folder} to train it again"
            )
        variant.train_loss.append(last_training_loss(updates, evaluations))
        # With AdaScale, epochs are counted by its clock, which shows the progress of runs of all batch sizes on one scale.
        clock = [row["epoch"] * row.get("clock_samples", row["samples"]) / row["samples"] for row in evaluations]
        curves.append((clock, [row["val_loss"] for row in evaluations]))
    every = runs[0].evaluate.every_epochs
    variant.epochs = np.arange(1, int(runs[0].schedule.epochs / every + 1e-9) + 1) * every
    # An evaluation may be up to one update after its epoch, so curves are interpolated to the epochs, with the first and last
    # values held constant outside. A run that diverged has no values after its last evaluation.
    variant.val_loss = np.array(
        [
            np.interp(variant.epochs, at, values, right=None if summary["status"] == "finished" else np.nan)
            if at
            else np.full(len(variant.epochs), np.nan)
            for (at, values), summary in zip(curves, variant.summaries, strict=True)
        ]
    )
    return variant


def last_training_loss(updates: Sequence[Row], evaluations: Sequence[Row]) -> float:
    """Return the mean loss of the samples since the second to last evaluation, each before its update; NaN without samples."""
    begin = evaluations[-2]["samples"] if len(evaluations) > 1 else 0
    samples = np.diff([0, *(row["samples"] for row in updates)])
    late = np.array([row["samples"] > begin for row in updates])
    losses = np.array([row["loss"] for row in updates], dtype=float)
    return float(np.average(losses[late], weights=samples[late])) if late.any() else float("nan")


def curve_distance(variant: Variant, reference: Variant) -> float:
    """Return the mean over epochs of the distance between two mean validation-loss curves; NaN if one of them diverged."""
    if len(variant.epochs) != len(reference.epochs):
        return float("nan")
    return float(np.abs(variant.val_loss.mean(axis=0) - reference.val_loss.mean(axis=0)).mean())


def seed_deviation(variant: Variant) -> float:
    """Return the mean over epochs of the standard deviation of the validation loss over seeds; NaN for a single seed."""
    if len(variant.val_loss) < 2:
        return float("nan")
    return float(variant.val_loss.std(axis=0, ddof=1).mean())


def _spread(values: np.ndarray, form: str) -> str:
    if len(values) == 0:
        return "diverged"
    deviation = f" ± {values.std(ddof=1):{form}}" if len(values) > 1 else ""
    return f"{values.mean():{form}}{deviation}"


def _counts(summaries: list[dict[str, Any]], name: str) -> str:
    """Return a count if it is the same for all seeds, or its mean and deviation: an adaptive batch differs between seeds."""
    counts = np.array([s[name] for s in summaries if s["status"] == "finished"] or [s[name] for s in summaries])
    return f"{counts[0]:,}" if (counts == counts[0]).all() else _spread(counts.astype(float), ",.0f")


def result_rows(variants: list[Variant]) -> list[dict[str, str]]:
    """Return the table of a study, with a row for each variant; numbers are the mean ± standard deviation over seeds."""
    rows = []
    references = {variant.cell.group: variant for variant in variants if variant.cell.is_reference}
    has_accuracy = any(s["val_accuracy"] is not None for variant in variants for s in variant.summaries)
    finished = {s["samples"] for variant in variants for s in variant.summaries if s["status"] == "finished"}
    for variant in variants:
        reference = references[variant.cell.group]
        config, summaries = variant.config, variant.summaries
        diverged = sum(s["status"] != "finished" for s in summaries)
        row = {
            "variant": variant.name,
            "batch size": f"{config.batch.size:,}",
            "updates": _counts(summaries, "updates"),
        }
        if len(finished) > 1:  # with AdaScale, runs may end after different numbers of samples
            row["samples"] = _counts(summaries, "samples")
        if has_accuracy:
            row["error at the end, %"] = _spread(100 - 100 * variant.finals("val_accuracy"), ".2f")
        ended = np.array([s["status"] == "finished" for s in summaries])
        row["training loss at the end"] = _spread(np.array(variant.train_loss)[ended], ".4f")
        row["val. loss at the end"] = _spread(variant.finals("val_loss"), ".4f")
        row["distance of the curve"] = f"{curve_distance(variant, reference):.4f}" if variant is not reference else "-"
        row["seed sd of the curve"] = f"{seed_deviation(variant):.4f}"
        row["diverged"] = f"{diverged} of {len(summaries)}"
        rows.append(row)
    return rows


def distance_rows(variants: list[Variant]) -> list[dict[str, str]]:
    """Return the table of distances, with a row for each group and variant and a column for each method."""
    references = {variant.cell.group: variant for variant in variants if variant.cell.is_reference}
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for variant in variants:
        cell = variant.cell
        if cell.is_reference:
            continue
        head = {
            "group": cell.group,
            "variant": cell.variant,
            "seed sd": f"{seed_deviation(references[cell.group]):.4f}",
        }
        row = rows.setdefault((cell.group, cell.variant), head)
        row[cell.method] = f"{curve_distance(variant, references[cell.group]):.4f}"
    return list(rows.values())


def _as_table(rows: list[dict[str, str]], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in rows[0]:
        table.add_column(heading, justify="left" if heading in ("variant", "group") else "right")
    for row in rows:
        table.add_row(*row.values())
    return table


def write_results(variants: list[Variant], out: Path, name: str, console: Console) -> None:
    """Write table.md, table.json and curves.png, and print the tables."""
    rows = result_rows(variants)
    replace_text(out / "table.json", json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(row.values()) + " |" for row in rows]
    replace_text(out / "table.md", "\n".join(lines) + "\n")
    console.print(_as_table(rows, name))
    if any(variant.cell.method for variant in variants):
        distances = distance_rows(variants)
        lines += ["", "| " + " | ".join(distances[0]) + " |", "|" + "---|" * len(distances[0])]
        lines += ["| " + " | ".join(row.values()) + " |" for row in distances]
        replace_text(out / "table.md", "\n".join(lines) + "\n")
        console.print(_as_table(distances, "distance of the curve from the reference's"))
    from largebatch.reporting.plots import plot_study

    console.print(f"{plot_study(variants, out, name)}", highlight=False)

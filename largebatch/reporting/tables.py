"""Terminal output of a run: the tables before and after it, and its progress."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from largebatch.data.sampler import pieces_of_rank
from largebatch.noise.estimator import efficiency, progress
from largebatch.reporting.loggers import Row, read_metrics
from largebatch.scaling.plan import Plan
from largebatch.scaling.rules import noise_scale, temperature

NAMES = {
    "batch_size": "batch size",
    "lr": "learning rate",
    "momentum": "momentum",
    "betas": "betas",
    "alpha": "alpha",
    "eps": "eps",
}


def number(value: Any) -> str:
    """Return a value as text: integers with thousands separators, floats with four significant digits, or six in a list."""
    if isinstance(value, tuple | list):
        return ", ".join(f"{v:.6g}" for v in value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """Return seconds as 12 s, 3 min 05 s or 2 h 07 min."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def reference_table(plan: Plan, tracked: str | None = None, has_temperature: bool = True) -> Table:
    """Return the table of hyper-parameters at the reference batch size and at this run's batch size.

    Args:
        plan: the plan.
        tracked: the unit of the squares in second moments; None if they use no tracked squares.
        has_temperature: whether lr is the learning rate of a step, which it is not in Quench.
    """
    reference = plan.reference
    size = plan.batch_size_at_start  # smaller batches of a warm-up are shown as stages
    derived = reference.at(size)
    tuned = {name: getattr(reference, name) for name in derived}
    table = Table(title=f"Reference to this run (rule: {reference.rule})", title_justify="left")
    for heading, justify in (("", "left"), ("reference", "right"), ("this run", "right")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    table.add_row("batch size", number(reference.batch_size), number(size))
    if tracked is not None:
        unit = {"sample": "samples", "micro_batch": "micro-batches"}[tracked]
        table.add_row(
            "second moment of",
            f"B = {number(reference.batch_size)}",
            f"B = {number(reference.batch_size)}, from {unit}",
        )
    for name, value in tuned.items():
        table.add_row(NAMES[name], number(value), number(derived[name]))
    if not has_temperature:
        return table
    temperatures = [
        temperature(values["lr"], batch, values.get("momentum", 0.0))
        for values, batch in ((tuned, reference.batch_size), (derived, size))
    ]
    table.add_row("temperature (lr per sample)", *(f"{t:.4g}" for t in temperatures))
    scales = [
        noise_scale(values["lr"], batch, plan.samples_per_epoch, values.get("momentum", 0.0))
        for values, batch in ((tuned, reference.batch_size), (derived, size))
    ]
    table.add_row("Smith's noise scale lr*N/(B*(1-mu))", *(f"{s:.4g}" for s in scales))
    return table


def stage_table(plan: Plan, world_size: int, micro_size: int | None, group_size: int = 1, most: int = 14) -> Table:
    """Return the table of the run's stages; if there are more than ``most``, only the first and last ones are shown."""
    updates, count = plan.num_updates(), plan.num_stages()
    table = Table(
        title=f"Plan: {plan.total_samples / plan.samples_per_epoch:g} epochs, {plan.total_samples:,} samples, "
        f"{updates:,} updates on {world_size} rank{'s' * (world_size > 1)}",
        title_justify="left",
    )
    for heading in (
        "epochs",
        "samples",
        "updates",
        "batch size",
        "ranks x micro x accum.",
        "learning rate",
        "averaging",
    ):
        table.add_column(heading, justify="right")
    shown = plan.stages() if count <= most else plan.stages(slice(most // 2)) + plan.stages(slice(-most // 2, None))
    for index, stage in enumerate(shown):
        if count > most and index == most // 2:
            table.add_row(*["..."] * 7)
        first, last = (s / plan.samples_per_epoch for s in (stage.first_sample, stage.first_sample + stage.samples))
        units = plan.units(stage.batch_size)
        pieces = pieces_of_rank(stage.batch_size, 0, world_size, micro_size, group_size, units)
        micro, accumulation = pieces[0].stop, len(pieces)
        rates = number(stage.lr_first)
        if abs(stage.lr_last - stage.lr_first) > 1e-9 * stage.lr_first:
            rates += f" → {number(stage.lr_last)}"
        table.add_row(
            f"{first:.4g} – {last:.4g}",
            number(stage.samples),
            number(stage.updates),
            number(stage.batch_size),
            f"{world_size} x {micro:,} x {accumulation}",
            rates,
            ", ".join(f"{name} {number(value)}" for name, value in stage.averaging.items()),
        )
    return table


def summary_table(summary: dict[str, Any], folder: str | None) -> Table:
    """Return the table that is printed at the end of a run."""
    table = Table(title=f"Run {summary['status']}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    rows = {
        "updates": number(summary["updates"]),
        "samples": number(summary["samples"]),
        "epochs": number(summary["epochs"]),
        "time": duration(summary["seconds"]),
        "samples per second": f"{summary['samples_per_second']:,.0f}",
        "training loss": number(summary["loss"]),
        "validation loss": number(summary["val_loss"]),
    }
    if summary["val_accuracy"] is not None:
        rows["validation accuracy"] = f"{summary['val_accuracy']:.2%}"
        rows["best validation accuracy"] = f"{summary['best_val_accuracy']:.2%}"
    if summary["unreadable"]:
        rows["left out, as they cannot be read"] = number(len(summary["unreadable"]))
    if folder:
        rows["run folder"] = folder
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def noise_table(rows: list[Row], by_layer: dict[str, float | None], batch_size: int) -> Table:
    """Return the table of `largebatch noise`: the noise at several points of a run, and that of each layer at its end.

    Args:
        rows: the rows of updates, with noise metrics.
        by_layer: noise scale of each layer at the end, in samples; None where it is infinite.
        batch_size: B at the end. The last update's own batch size may be smaller and is not used.
    """
    table = Table(title="Gradient noise", title_justify="left")
    for heading in ("", "B_simple", "99 % band", "batch size", "progress per update", "efficiency per sample"):
        table.add_column(heading, justify="left" if not heading else "right")

    def samples(value: float | None) -> str:
        return "∞" if value is None or math.isinf(value) else f"{value:,.0f}" if value >= 10 else f"{value:.2g}"

    def add(name: str, scale: float | None, band: str, size: int) -> None:
        known = math.inf if scale is None else scale
        table.add_row(
            name, samples(scale), band, number(size), f"{progress(size, known):.0%}", f"{efficiency(size, known):.0%}"
        )

    for index in sorted({round((len(rows) - 1) * part / 5) for part in range(6)}):
        row = rows[index]
        band = f"{samples(row['noise_scale_low'])} – {samples(row['noise_scale_high'])}"
        size = batch_size if row is rows[-1] else row["batch_size"]
        add(f"epoch {row['epoch']:.3g}", row["noise_scale"], band, size)
    table.add_section()
    for name, scale in by_layer.items():
        add(name, scale, "", batch_size)
    return table


def print_noise(console: Console, folder: Path) -> None:
    """Print the gradient noise that a run measured."""
    updates, evaluations = read_metrics(folder / "metrics.jsonl")
    if not updates:
        return
    by_layer = evaluations[-1].get("noise_scale_by_layer", {}) if evaluations else {}
    console.print(noise_table(updates, by_layer, max(row["batch_size"] for row in updates[-2:])))
    console.print(
        "B_simple = tr(Sigma)/|G|^2: a batch of so many samples makes half of a noiseless update's progress, for half of what "
        f"each sample brings in a small batch; over training it is in {folder / 'curve.png'}",
        highlight=False,
    )


class ProgressBar:
    """Shows progress as a bar on a terminal."""

    def __init__(self, console: Console, total_samples: int, done: float = 0) -> None:
        self.val = ""
        self.progress = Progress(
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self.task = self.progress.add_task("", total=total_samples, shown="")
        self.progress.update(self.task, completed=done)
        self.progress.start()

    def log(self, row: Row) -> None:
        """Update the bar, or print an event."""
        if "event" in row:
            self.progress.console.print(row["event"], style="yellow", markup=False, highlight=False)
            return
        if "val_loss" in row:
            self.val = f"  {_scores(row)}"
            self.progress.update(self.task, completed=_done(row))
            return
        self.progress.update(self.task, completed=_done(row), shown=f"{_state(row)}{self.val}")

    def sync(self) -> None:
        """Do nothing, because the bar has no buffer to write."""

    def rewind(self, samples: int) -> None:
        """Move the bar back to ``samples`` samples."""
        self.progress.update(self.task, completed=samples)

    def close(self) -> None:
        """Stop the bar and leave it on the terminal."""
        self.progress.stop()


class ProgressLines:
    """Prints progress without a terminal: a line at each evaluation, and in between at most one every few seconds."""

    def __init__(self, console: Console, total_samples: int, done: float = 0, every_seconds: float = 5.0) -> None:
        self.console, self.total, self.every = console, total_samples, every_seconds
        self.first = done  # samples that a resumed run saw before it was resumed
        self.started = self.last = time.monotonic()
        self.row: Row = {}

    def log(self, row: Row) -> None:
        """Print a line if one is due."""
        now = time.monotonic()
        if "event" in row:
            self.console.print(row["event"], style="yellow", markup=False, highlight=False)
            return
        if "val_loss" not in row:
            self.row = row
            if now - self.last < self.every:
                return
        done = min(1.0, _done(row) / self.total)  # AdaScale's clock may exceed the total
        left = (now - self.started) * (1.0 - done) * self.total / max(1, _done(row) - self.first)
        scores = f"  {_scores(row)}" if "val_loss" in row else ""
        state = _state(self.row) if self.row else ""
        self.console.print(
            f"{done:4.0%}  epoch {row['epoch']:<7.4g} {state}{scores}  {duration(left)} left", highlight=False
        )
        self.last = now

    def sync(self) -> None:
        """Do nothing, because every line is printed at once."""

    def rewind(self, samples: int) -> None:
        """Estimate the time left from ``samples`` samples and the current time."""
        self.first, self.started = samples, time.monotonic()

    def close(self) -> None:
        """Do nothing, because every line has been printed."""


def _done(row: Row) -> float:
    """Return the number of samples that counts towards the end of the run: AdaScale's clock if it is used."""
    return float(row["clock_samples" if "clock_samples" in row else "samples"])


def _state(row: Row) -> str:
    rate = f"{row['samples_per_second']:,.0f}/s"
    return f"loss {row['loss']:.4f}  lr {row['lr']:.4g}  B {row['batch_size']:,}  {rate}"


def _scores(row: Row) -> str:
    accuracy = f"  accuracy {row['val_accuracy']:.2%}" if "val_accuracy" in row else ""
    return f"val {row['val_loss']:.4f}{accuracy}"


def create_console() -> Console:
    """Return a console as wide as the terminal, or 110 columns without one. Markup is off because paths contain brackets."""
    return Console(width=None if sys.stdout.isatty() else 110, markup=False, emoji=False)


def create_progress(console: Console, total_samples: int, done: float = 0) -> ProgressBar | ProgressLines:
    """Return a progress bar on a terminal, or plain lines elsewhere; ``done`` samples were seen before.

    FORCE_COLOR may make a file count as a terminal; a bar is drawn only on a real one, where its frames can be overwritten.
    """
    moves = console.is_interactive and console.file.isatty()
    return (ProgressBar if moves else ProgressLines)(console, total_samples, done)

"""Figures of runs, studies and limits; that of a run shows loss, learning rate and batch size against epochs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from largebatch.reporting.limits import Place
from largebatch.reporting.loggers import read_metrics
from largebatch.section import displayable

BLUE, ORANGE, GREEN, GREY = "#2563a8", "#d9702b", "#3a8a5f", "#8a8f98"
METHOD_COLORS = (ORANGE, BLUE, GREY, GREEN, "#9c4dcc", "#c2a200", "#c0392b", "#159a9c", "#795548")
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e8eb",
    "grid.linewidth": 0.8,
    "axes.edgecolor": GREY,
    "axes.labelcolor": "#30343a",
    "xtick.color": "#30343a",
    "ytick.color": "#30343a",
    "legend.frameon": False,
    "figure.dpi": 130,
    "savefig.bbox": "tight",
    "text.parse_math": False,  # names may contain dollar signs
    "text.usetex": False,  # regardless of the user's matplotlib style
}


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Return a centred moving average, whose window shrinks at both ends so that it averages only existing values."""
    half = window // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    left = np.maximum(np.arange(len(values)) - half, 0)
    right = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (sums[right] - sums[left]) / (right - left)


def _set_log(axis: Any) -> None:
    """Set a logarithmic scale with few, plain tick labels, because the default labels overlap on a low axis."""
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 200 * low else (1.0,)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def plot_run(folder: Path, title: str, samples_per_epoch: int) -> Path | None:
    """Draw curve.png from a run's metrics.jsonl; return its path, or None if there is no update to draw yet."""
    updates, evaluations = read_metrics(folder / "metrics.jsonl")
    if not updates:
        return None

    def column(rows: list[dict[str, Any]], name: str) -> np.ndarray:
        return np.array([row[name] for row in rows], dtype=float)

    epochs, losses = column(updates, "samples") / samples_per_epoch, column(updates, "loss")
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 7.5), layout="constrained")
        loss_axis, lr_axis, batch_axis = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1.2, 1.2])
        if len(losses) > 40:
            loss_axis.plot(epochs, losses, color=BLUE, alpha=0.25, linewidth=0.8)
            losses = smoothed(losses, max(3, len(losses) // 50))
        loss_axis.plot(epochs, losses, color=BLUE, label="training loss", linewidth=1.6)
        if evaluations:
            at = column(evaluations, "samples") / samples_per_epoch
            marks = "o" if len(at) <= 60 else None
            loss_axis.plot(
                at, column(evaluations, "val_loss"), color=ORANGE, marker=marks, markersize=3, label="validation loss"
            )
            last = evaluations[-1]
            if "val_accuracy" in last:
                title += f"  ·  accuracy {last['val_accuracy']:.2%}"
        if losses.min() > 0 and losses.max() / losses.min() > 20:
            _set_log(loss_axis)
        loss_axis.set_ylabel("loss")
        loss_axis.legend(loc="upper right")
        loss_axis.set_title(displayable(title), loc="left", fontsize=11, color="#30343a")

        lr_axis.plot(epochs, lrs := column(updates, "lr"), color=GREEN, linewidth=1.6)
        if lrs.min() > 0 and lrs.max() > 20 * np.quantile(lrs, 0.25):  # steps; a cosine reads better on a linear scale
            _set_log(lr_axis)
        else:
            lr_axis.set_ylim(0, lrs.max() * 1.1)
        lr_axis.set_ylabel("learning rate")

        # The smaller last batch of a run is not a change of the plan, so it is drawn with the size of the row before it.
        sizes = column(updates, "batch_size")
        if len(sizes) > 1 and sizes[-1] < sizes[-2]:
            sizes[-1] = sizes[-2]
        batch_axis.step(epochs, sizes, where="pre", color=GREY, linewidth=1.6, label="batch size")
        batch_axis.set_ylim(0, sizes.max() * 1.15)
        batch_axis.set_ylabel("batch size")
        if "noise_scale" in updates[-1]:
            stable = [row.get("stable_batch_size") for row in updates]
            _draw_noise(
                batch_axis, epochs, stable, *(column(updates, f"noise_scale{end}") for end in ("", "_low", "_high"))
            )
        batch_axis.set_xlabel(f"epochs of {samples_per_epoch:,} samples")
        batch_axis.set_xlim(left=0)
        path = _save(figure, folder / "curve.png")
    return path


def _save(figure: Any, path: Path) -> Path:
    """Write a figure to a temporary file and rename it; return its path."""
    beside = path.with_name(path.name + ".part")
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # about letters missing in the font
            figure.savefig(beside, format="png")
        beside.replace(path)
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
    return path


def _draw_noise(
    axis: Any, epochs: np.ndarray, stable: list[float | None], scale: np.ndarray, low: np.ndarray, high: np.ndarray
) -> None:
    """Draw the critical batch size with its band, and the batch size of the largest stable step, beside the batch size.

    The critical batch size is not drawn where its band is infinite or reaches 0. The stable batch size is not drawn where it is
    100 times the axis limit or more, which would leave no room for the other curves.
    """
    largest = axis.get_ylim()[1]
    known = np.isfinite(scale) & np.isfinite(high) & (low > 0)
    axis.plot(
        epochs, np.where(known, scale, np.nan), color=ORANGE, linewidth=1.2, label="critical batch size (99 % band)"
    )
    axis.fill_between(epochs, low, high, where=known, color=ORANGE, alpha=0.25, linewidth=0)
    near = np.array(stable, dtype=float)
    near[~(near < 100 * largest)] = np.nan
    if np.isfinite(near).any():
        axis.plot(epochs, near, color=BLUE, linewidth=1.2, label="batch size of the largest stable step")
    axis.autoscale(axis="y")
    _set_log(axis)
    axis.set_ylabel("samples")
    axis.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, fontsize=8)  # above: a band may fill the axes


def plot_limit(places: Sequence[Place], path: Path, num_train: int) -> Path:
    """Draw the largest stable, critical and used batch sizes against epochs; return the path.

    Args:
        places: the points of one run, in their order.
        path: the path of the figure.
        num_train: number of samples in the training set, which is the upper limit of the axis.
    """
    epochs, most = np.array([place.epoch for place in places]), 10.0 * num_train
    bands = {
        ("steps are stable up to", BLUE): [place.stable for place in places],
        ("critical batch size (99 % band)", ORANGE): [(p.noise.low, p.noise.noise_scale, p.noise.high) for p in places],
    }
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 4.2), layout="constrained")
        axis = figure.subplots()
        for (label, color), band in bands.items():
            low, middle, high = np.clip(np.array(band), 1e-3, most).T
            axis.plot(epochs, middle, color=color, marker="o", markersize=3, label=label)
            axis.fill_between(epochs, low, high, color=color, alpha=0.2, linewidth=0)
        sizes = [place.batch_size for place in places]
        axis.step(epochs, sizes, where="post", color=GREY, linewidth=1.6, label="batch size")
        axis.set_ylim(min(1.0, *sizes), num_train)
        _set_log(axis)
        axis.set_ylabel("samples")
        axis.set_xlabel("epochs")
        axis.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, fontsize=9)
        return _save(figure, path)


class Curves(Protocol):
    """Data of a variant that `plot_study` draws: its cell, and each seed's validation loss (seeds, p) at epochs (p,)."""

    cell: Any
    epochs: np.ndarray
    val_loss: np.ndarray


def plot_study(variants: Sequence[Curves], folder: Path, title: str) -> Path:
    """Draw curves.png: mean validation loss with a band of one standard deviation over seeds.

    Without methods there is a panel for each group, with all its variants. With methods there is a panel for each combination
    of group and variant, with the reference in black and a line for each method.
    """
    panels = _panels(variants, title)
    by_method = any(variant.cell.method for variant in variants)
    columns = max(1, len({v.cell.variant for v in variants}) - 1) if by_method else min(2, -(-len(panels) // 2))
    rows = -(-len(panels) // columns)
    with rc_context(STYLE):
        size = (3.6 * columns + 1, 2.8 * rows) if by_method else (7.0 * columns + 1.5, 5.0 * rows)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for axis, (name, lines) in zip(axes.flat, panels.items(), strict=False):
            shades = [to_hex(c) for c in colormaps["viridis"](np.linspace(0.0, 0.9, max(1, len(lines) - 1)))]
            colors = ["#111418", *(METHOD_COLORS if by_method else shades)]
            for number, (label, variant) in enumerate(lines):
                mean, deviation = variant.val_loss.mean(axis=0), variant.val_loss.std(axis=0)
                # Only the reference has the first colour.
                color = colors[0] if number == 0 else colors[1 + (number - 1) % (len(colors) - 1)]
                width = 2.4 if number == 0 else 1.5
                axis.plot(variant.epochs, mean, color=color, linewidth=width, label=_label(label))
                axis.fill_between(
                    variant.epochs, mean - deviation, mean + deviation, color=color, alpha=0.15, linewidth=0
                )
            finite = np.concatenate([v.val_loss[np.isfinite(v.val_loss)] for _, v in lines])
            if len(finite) and finite.max() > 5 * finite.min() > 0:
                _set_log(axis)
            axis.set_title(displayable(name), loc="left", fontsize=9 if by_method else 11, color="#30343a")
            if not by_method:
                axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9)
        figure.supxlabel("epochs", fontsize=10)
        figure.supylabel("validation loss", fontsize=10)
        if by_method:
            handles, labels = axes.flat[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=9)
        path = _save(figure, folder / "curves.png")
    return path


def _label(name: str) -> str:
    """Return a name for a legend, with a leading space if it begins with an underscore, because legends omit such names."""
    return f" {displayable(name)}" if name.startswith("_") else displayable(name)


def _panels(variants: Sequence[Curves], title: str) -> dict[str, list[tuple[str, Curves]]]:
    """Return {panel: [(label, variant)]}, with the reference first in each panel."""
    references = {variant.cell.group: variant for variant in variants if variant.cell.is_reference}
    panels: dict[str, list[tuple[str, Curves]]] = {}
    by_method = any(variant.cell.method for variant in variants)
    for variant in variants:
        cell, reference = variant.cell, references[variant.cell.group]
        if not by_method:
            panels.setdefault(cell.group or title, []).append((cell.variant, variant))
        elif cell.method:
            name = ", ".join(part for part in (cell.group, cell.variant) if part)
            panels.setdefault(name, [(reference.cell.variant, reference)]).append((cell.method, variant))
    return panels

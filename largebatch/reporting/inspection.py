"""Output of ``largebatch inspect``: the contents of a run or a checkpoint, its progress, and whether it is damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from largebatch.checkpoint.folder import CheckpointFolder, find_problems, read_mapping, read_run_state, samples_of
from largebatch.errors import UserError
from largebatch.reporting.loggers import read_metrics
from largebatch.reporting.tables import duration, number


def size_text(count: float) -> str:
    """Return a number of bytes as text with a unit: 512 B, 1.5 kB, 2.0 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir() if file.is_file())


def inspect(path: Path, console: Console) -> bool:
    """Print the contents of a run folder or a checkpoint; return whether no checkpoint in it is damaged.

    Raises:
        UserError: if it is neither, or its values are not those of a run.
    """
    if not path.is_dir():
        raise UserError(f"inspect: {path} is no folder; name a run folder or one of its checkpoints")
    try:
        if samples_of(path) is not None:
            return _inspect_checkpoint(path, console)
        if (path / "config.yaml").exists():
            return _inspect_run(path, console)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"inspect: {path} was changed: its values are not those of a run ({type(error).__name__}: {error})"
        ) from error
    raise UserError(f"inspect: {path} is neither a run folder (no config.yaml) nor a checkpoint (samples-NUMBER)")


def _what(config: dict[str, Any]) -> str:
    batch = config["batch"]
    return (
        f"{config['model']['name']} on {config['data']['name']}, {config['optimizer']['name']}, "
        f"batch {batch['reference_size']:,} → {batch['size']:,}"
    )


def _inspect_run(folder: Path, console: Console) -> bool:
    config = read_mapping(folder / "config.yaml", "config of a run")
    epochs = config["schedule"]["epochs"]
    console.print(Text.assemble((str(folder), "bold"), f": {_what(config)}, {epochs:g} epochs"))
    if (folder / "summary.json").exists():
        summary = read_mapping(folder / "summary.json", "summary of a run")
        line = f"{summary['status']} after {summary['updates']:,} updates, {duration(summary['seconds'])}"
        console.print(f"{line}{': ' + summary['message'] if summary['message'] else ''}", highlight=False)
    else:
        console.print("no summary: it is running, or was killed", highlight=False)
    if (folder / "metrics.jsonl").exists():
        updates, evaluations = read_metrics(folder / "metrics.jsonl")
        for name, rows, key in (("update", updates, "loss"), ("evaluation", evaluations, "val_loss")):
            if rows:
                row = rows[-1]
                console.print(
                    f"last {name} in metrics.jsonl: update {row['step']:,}, epoch {row['epoch']:.4g}, {key} {number(row[key])}",
                    highlight=False,
                )
    checkpoints = CheckpointFolder(folder / "checkpoints")
    table = Table(title="Checkpoints", title_justify="left")
    for heading in ("", "update", "epoch", "written", "by", "size", ""):
        table.add_column(heading, justify="right" if heading in ("update", "epoch", "size") else "left")
    is_whole, usable = True, None
    for path in checkpoints.saved():
        problems = find_problems(path)
        is_whole = is_whole and not problems
        try:
            state = read_run_state(path)
            progress = state["progress"]
            epoch = progress["samples_seen"] / state["num_train"]
            cells = [f"{progress['step']:,}", f"{epoch:.4g}", state["date"], state["engine"]]
        except UserError:
            cells = ["?"] * 4
        usable = usable if problems else path
        best = "  best" if checkpoints.best() == path else ""
        verdict = Text(f"damaged: {problems[0]}", "red") if problems else Text(f"whole{best}")
        table.add_row(path.name, *cells, size_text(_bytes(path)), verdict)
    if not checkpoints.saved():
        console.print("no checkpoint", highlight=False)
        return True
    console.print(table)
    console.print(
        f"--resume auto continues from {usable}" if usable else "none of them can be continued", highlight=False
    )
    return is_whole


def _inspect_checkpoint(path: Path, console: Console) -> bool:
    problems = find_problems(path)
    state = read_run_state(path)
    progress, config = state["progress"], state["config"]
    table = Table(title=str(path), title_justify="left", show_header=False)
    table.add_column()
    table.add_column()
    rows = {
        "run": _what(config),
        "update": f"{progress['step']:,}",
        "samples": f"{progress['samples_seen']:,} (epoch {progress['samples_seen'] / state['num_train']:.4g} of "
        f"{config['schedule']['epochs']:g})",
        "training loss": number(progress["loss"]),
        "validation loss": number(progress["val_loss"]),
        "skipped, rolled back": f"{progress['skipped']}, {progress['rollbacks']}",
        "written": f"{state['date']} by {state['engine']}",
        "versions": ", ".join(f"{name} {value}" for name, value in state["versions"].items()),
        "size": size_text(_bytes(path)),
    }
    if not problems:
        rows |= _tensor_rows(path)
    rows["whole"] = "; ".join(problems) if problems else "yes: every file is as the manifest has it"
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    return not problems


def _tensor_rows(path: Path) -> dict[str, str]:
    from largebatch.distributed.state import MODEL, OPTIMIZER, tensor_metadata

    tensors = tensor_metadata(path)
    counts = {
        part: sum(entry.size.numel() for name, entry in tensors.items() if name.startswith(part))
        for part in (MODEL, OPTIMIZER)
    }
    slots = sorted({name.rpartition(".")[2] for name in tensors if name.startswith(OPTIMIZER)})
    return {
        "model": f"{counts[MODEL]:,} numbers",
        "optimizer": f"{counts[OPTIMIZER]:,} numbers: {', '.join(slots) or 'no state'}",
    }

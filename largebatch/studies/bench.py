"""``largebatch bench CONFIG``: training speed of a config by micro-batch size, and the cost of tracking squares."""

from __future__ import annotations

import gc
import time
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from largebatch.config.optimizers import AdaptiveBase, QuenchConfig
from largebatch.config.schedules import ConstantConfig, WarmupConfig
from largebatch.config.schema import Config
from largebatch.data import Source
from largebatch.data.sampler import largest_micro_batch, rank_share
from largebatch.distributed import Backend, Ranks, create_backend, launched_ranks
from largebatch.errors import UserError
from largebatch.models import norm_group_size
from largebatch.planner.resolve import resolve
from largebatch.reporting.loggers import Loggers
from largebatch.section import Section
from largebatch.training.run import build_model
from largebatch.training.trainer import Trainer

WARMUP_UPDATES, BLOCKS, SMALLEST, MOST_SIZES = 2, 3, 8, 4
MOST_TIMED = 10**6  # maximum number of updates of each variant in a block


def variants(config: Config) -> dict[str, Config]:
    """Return the config at a constant batch size: without squares, with squares of samples, and with those of micro-batches."""

    def with_(section: Section, **values: Any) -> Any:
        return section.model_copy(update=values)

    same = {
        "schedule": ConstantConfig(epochs=config.schedule.epochs),
        "warmup": WarmupConfig(),
        "scaling": with_(config.scaling, rule="none"),  # not timed, and other rules may need squares
        "batch": with_(config.batch, growth="schedule", max_size=None, at_epoch_end="carry"),
        "noise": with_(config.noise, measure=False),
        "optimizer": with_(config.optimizer, damping=False),
    }
    found = {}
    for name, squares in (("plain", "batch"), ("samples", "sample"), ("micro-batches", "micro_batch")):
        changed: dict[str, Any] = {}
        # Keeping squares from other updates (squares_every) is only valid for a second moment's squares of micro-batches.
        if not isinstance(config.optimizer, AdaptiveBase) or squares == "sample":
            changed["backend"] = with_(config.backend, squares_every=1)
        if isinstance(config.optimizer, AdaptiveBase):
            changed["optimizer"] = with_(same["optimizer"], second_moment=squares)
        else:
            if isinstance(config.optimizer, QuenchConfig):
                changed["optimizer"] = with_(same["optimizer"], sigma2="average")
            if squares != "batch":
                changed["noise"] = with_(config.noise, measure=True, per=squares)
        found[name] = with_(config, **{**same, **changed})
    return found


def micro_sizes(share: int, group_size: int) -> list[int]:
    """Return the micro-batch sizes to try: a rank's whole share, and its repeated halves in multiples of the group size."""
    sizes: list[int] = []
    while share >= max(group_size, SMALLEST) and len(sizes) < MOST_SIZES:
        sizes.append(share)
        share = share // 2 // group_size * group_size
    return sizes or [max(share, 1)]


def _is_cut(config: Config, num_train: int, world_size: int, group_size: int) -> bool:
    """Return whether passes must be smaller than the config's micro-batch size to give an update enough micro-batches."""
    size, micro_size = config.batch.size, config.batch.micro_size
    units = resolve(config, num_train, world_size, group_size).plan.units(size)
    return largest_micro_batch(size, world_size, micro_size, group_size, units) < (micro_size or size)


def time_updates(config: Config, source: Source, backend: Backend, updates: int) -> list[float]:
    """Return the seconds of each of ``updates`` updates of a new run, after untimed warm-up updates."""
    model = build_model(config, source.task)
    run = resolve(config, len(source.train), backend.world_size, norm_group_size(model))
    size = config.batch.size
    plan = replace(run.plan, total_samples=(WARMUP_UPDATES + updates + 1) * size)  # independent of the config's length
    trainer = Trainer(replace(run, plan=plan), source, model, backend, logger=Loggers())
    trainer.model.train()
    gc.collect()  # models are in reference cycles; the previous one must not count in the peak
    if backend.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(backend.device)
    seconds = []
    for _ in range(WARMUP_UPDATES + updates):
        backend.barrier()
        started = time.perf_counter()
        trainer.step(size, plan.at(0), trainer.progress)  # reading the gradient's norm synchronises the device
        seconds.append(time.perf_counter() - started)
        trainer.progress.step += 1
    return seconds[WARMUP_UPDATES:]


def bench(config: Config, updates: int, console: Console, ranks: Ranks | None = None) -> None:
    """Print samples per second by micro-batch size, without squares and with each kind; on one process or under torchrun.

    The updates of the variants alternate in blocks, so that other load on the machine affects all of them.

    Args:
        config: the config.
        updates: number of timed updates of each variant in each of three blocks.
        console: the console to print to.
        ranks: the rank of this process and the number of ranks; None to read the environment that torchrun sets.

    Raises:
        UserError: for any problem that the user can correct.
    """
    if not 1 <= updates <= MOST_TIMED:
        raise UserError(f"--updates: expected 1 to {MOST_TIMED:,}, got {updates:,}")
    ranks = launched_ranks() if ranks is None else ranks
    source = config.data.load(config.seed)
    group = norm_group_size(build_model(config, source.task))
    share = rank_share(config.batch.size, 0, ranks.world_size, group)
    backend = create_backend(config.backend, config.precision, ranks)
    on_gpu = backend.device.type == "cuda"
    table = Table(title=f"{config.model.name}, batch {config.batch.size:,}: {backend.describe()}", title_justify="left")
    for heading in ("micro-batch", "squares", "ms an update", "samples per second", "plain = 1", "peak memory"):
        table.add_column(heading, justify="right" if heading != "squares" else "left")
    try:
        for size in micro_sizes(share.stop - share.start, group):
            configs = {
                name: variant.model_copy(update={"batch": variant.batch.model_copy(update={"micro_size": size})})
                for name, variant in variants(config).items()
            }
            if config.batch.size < 2:
                del configs["samples"]
            if config.batch.size < 2 or _is_cut(configs["micro-batches"], len(source.train), ranks.world_size, group):
                del configs["micro-batches"]  # a single one has no variance, or passes would be smaller
            seconds: dict[str, list[float]] = {name: [] for name in configs}
            peaks = dict.fromkeys(configs, 0)
            for _ in range(BLOCKS):
                for name, variant in configs.items():
                    seconds[name] += time_updates(variant, source, backend, updates)
                    if on_gpu:
                        peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated(backend.device))
            for name, times in seconds.items():
                mid = median(times)
                memory = f"{peaks[name] / 2**20:,.0f} MiB" if on_gpu else "-"
                ratio = mid / median(seconds["plain"])
                table.add_row(
                    f"{size:,}" if name == "plain" else "",
                    "none" if name == "plain" else name,
                    f"{1000 * mid:,.1f}",
                    f"{config.batch.size / mid:,.0f}",
                    f"{ratio:.2f}",
                    memory,
                )
    finally:
        backend.close()
    if ranks.rank == 0:
        console.print(table)

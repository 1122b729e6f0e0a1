"""What a run measures of its gradient noise, and what it draws from it: rows, AdaScale's gain, the next batch size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from largebatch.noise.adascale import AdaScale
from largebatch.noise.estimator import NoiseScale, efficiency, noise_estimates, progress
from largebatch.optim.limit import LimitMeter
from largebatch.planner.run import Run
from largebatch.reporting.loggers import Row

# Of an averaging length: how often it is asked whether another batch size is due.
DECISIONS = 10
# Updates that an averaging length spans at least, by default: fewer than five leave the band open for good.
LEAST_UPDATES = 10
# Share of the largest stable step above which is warned, and measurements that it rests on at the least. It is a mean over
# directions; where it was measured beside the steepest one, that one's share was up to five times as large (docs/limit.md).
LARGE_SHARE, LEAST_MEASUREMENTS = 0.2, 4


def layer_of(name: str) -> str:
    """Return the module a parameter belongs to, by the parameter's name; the name itself for one of the root."""
    return name.rpartition(".")[0] or name


class NoiseMeter:
    """Measures the gradient noise of every update; alike on every rank, as the sums it is given are.

    Args:
        run: what is trained.
        names: of the trained parameters, in the order of the sums.
        limit: measures how near the steps are to the largest stable ones, where the engine does.
    """

    def __init__(self, run: Run, names: Sequence[str], limit: LimitMeter | None = None) -> None:
        self.limit = limit
        config, plan = run.config, run.plan
        layers = list(dict.fromkeys(map(layer_of, names)))
        self.columns = torch.tensor([layers.index(layer_of(name)) for name in names])
        self.largest = run.largest_batch
        given = config.noise.average_samples
        self.length_samples = given or max(1, plan.total_samples // 20)
        self.noise = NoiseScale(layers, self.length_samples, least_updates=1 if given else LEAST_UPDATES)
        self.adascale = AdaScale(config.batch.reference_size) if config.scaling.rule == "adascale" else None
        self.is_adaptive, self.share = config.batch.growth == "adaptive", config.batch.critical_share
        self.smallest = config.batch.size
        self.warned, self.warns_from = False, plan.total_samples / 4
        self.warned_of_limit = False

    @property
    def clock(self) -> float | None:
        """Samples that the reference run would have seen, where AdaScale counts them."""
        return None if self.adascale is None else self.adascale.samples

    def update(self, sums: Tensor, batch_size: int, num_units: float, world_size: int) -> float:
        """Take in one update's sums; return what its learning rate is multiplied by: AdaScale's gain, or 1.

        Args:
            sums: (2, P), as `Backend.noise_sums` returns them.
            batch_size: B.
            num_units: n, independent units whose squares were tracked.
            world_size: ranks over which the engine averaged gradients.

        An update of one unit (a small last batch) says nothing of noise and enters no average.
        """
        if num_units <= 1:
            return 1.0 if self.adascale is None else self.adascale.advance(batch_size)
        sums, scale = sums.to("cpu", torch.float64), num_units / world_size
        by_layer = torch.zeros(2, len(self.noise.names), dtype=torch.float64).index_add_(1, self.columns, sums)
        self.noise.update(by_layer, batch_size, num_units, scale)
        if self.adascale is None:
            return 1.0
        trace, signal = noise_estimates(sums.sum(1, keepdim=True), batch_size, num_units, scale)
        return self.adascale.update(float(trace), float(signal), batch_size)

    def row(self, batch_size: int) -> Row:
        """Return what a row of metrics says of the noise, and of a batch size in it; infinities as JSON's null."""
        whole = self.noise.whole
        row = {
            "noise_scale": whole.noise_scale,
            "noise_scale_low": whole.low,
            "noise_scale_high": whole.high,
            "gradient_variance": whole.trace,
            "gradient_signal": whole.signal,
            "progress_per_update": progress(batch_size, whole.noise_scale),
            "efficiency_per_sample": efficiency(batch_size, whole.noise_scale),
        }
        if self.limit is not None and self.limit.count:
            found = self.limit.limit()
            row |= {"stability_share": found.share, "stable_batch_size": found.batch_size}
        return row | ({} if self.adascale is None else {"gain": self.adascale.gain})

    def shares_by_layer(self) -> dict[str, float]:
        """Return of each layer the share of the largest stable step in use; nothing before it was measured."""
        return {} if self.limit is None else self.limit.limit(layer_of).by_name

    def by_layer(self) -> dict[str, float | None]:
        """Return the noise scale of each layer, in samples; None where it is infinite."""
        scales = {name: noise.noise_scale for name, noise in self.noise.by_name.items()}
        return {name: scale if math.isfinite(scale) else None for name, scale in scales.items()}

    def warnings(self, batch_size: int, samples_seen: int) -> Iterator[str]:
        """Yield, once each, that the batch is larger than the critical batch size, and that its steps are near the limit.

        Of noise not in the first quarter of the run, where it is small and that of the averages out of date, and of an
        adaptive batch only where it can fall no further and lies above what it aims at.
        """
        whole, share = self.noise.whole, self.share if self.is_adaptive else 1.0
        can_fall = self.is_adaptive and batch_size > self.smallest
        if not (self.warned or can_fall or samples_seen < self.warns_from or share * whole.high >= batch_size):
            self.warned = True
            yield (
                f"batch size {batch_size:,} is above the critical batch size of {whole.noise_scale:,.0f} samples "
                f"(99 % band {whole.low:,.0f} to {whole.high:,.0f}): a sample now brings "
                f"{efficiency(batch_size, whole.noise_scale):.0%} of what it would in a small batch"
            )
        if self.limit is None or self.warned_of_limit or self.limit.count < LEAST_MEASUREMENTS:
            return
        if self.limit.share > LARGE_SHARE:  # asked at every update
            self.warned_of_limit, found = True, self.limit.limit()
            yield (
                f"a step of batch size {batch_size:,} takes {found.share:.2f} of the largest stable one, of batch size "
                f"{found.batch_size:,.0f}, as a mean over directions: the steepest may be past their limit, from where on the "
                "loss leaves the curve of a small batch; largebatch limit measures them at a checkpoint"
            )

    def next_batch_size(self, batch_size: int, samples_seen: int, last: int) -> int:
        """Return the batch size from here on: doubled or halved once the whole confidence band speaks for it.

        A batch is doubled where twice its size is below the band of critical_share * B_simple, halved where half its size
        is above; in between it stays, so that it does not go back and forth.

        Args:
            batch_size: B of the last update.
            samples_seen: samples used so far.
            last: samples seen before the last update.
        """
        every = max(1, self.length_samples // DECISIONS)
        if not self.is_adaptive or samples_seen // every == last // every:
            return batch_size
        whole = self.noise.whole
        if self.share * whole.low >= 2 * batch_size and 2 * batch_size <= self.largest:
            return 2 * batch_size
        if self.share * whole.high <= batch_size / 2 and batch_size // 2 >= self.smallest:
            return batch_size // 2
        return batch_size

    def start_at(self, samples_seen: int) -> None:
        """Begin in the middle of a run that had no clock: AdaScale's stands where the run does."""
        if self.adascale is not None:
            self.adascale.updates = samples_seen / self.adascale.reference_batch_size

    def state_dict(self) -> dict[str, Any]:
        """Return the averages and the clock, as JSON takes them."""
        clock = None if self.adascale is None else self.adascale.state_dict()
        limit = None
        if self.limit is not None:
            self.limit.drop()  # half a measurement is not saved, and the run that goes on goes on as one that is resumed
            limit = self.limit.state_dict()
        warned = {"warned": self.warned, "warned_of_limit": self.warned_of_limit}
        return {"noise": self.noise.state_dict(), "adascale": clock, "limit": limit} | warned

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self.noise.load_state_dict(state["noise"])
        self.warned, self.warned_of_limit = state["warned"], state.get("warned_of_limit", False)
        if self.limit is not None and state.get("limit"):
            self.limit.load_state_dict(state["limit"])
        if self.adascale is not None and state["adascale"] is not None:
            self.adascale.load_state_dict(state["adascale"])

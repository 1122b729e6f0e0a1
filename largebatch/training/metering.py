"""Measurement of a run's gradient noise, and its uses: metrics, AdaScale's gain, and the next batch size."""

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

# Number of times in an averaging length that the batch size may change.
DECISIONS = 10
# Default minimum number of updates in an averaging length. With fewer than five updates the band would stay infinite.
LEAST_UPDATES = 10
# Share of the largest stable step above which the user is warned, and the minimum number of measurements for a warning. The
# share is a mean over directions. Where the steepest direction was measured too, its share was up to five times as large
# (docs/limit.md).
LARGE_SHARE, LEAST_MEASUREMENTS = 0.2, 4


def layer_of(name: str) -> str:
    """Return the name of the module that a parameter belongs to, or the parameter's own name if it belongs to the root."""
    return name.rpartition(".")[0] or name


class NoiseMeter:
    """Measures the gradient noise of every update. The results are the same on every rank, as the sums are over all ranks.

    Args:
        run: the resolved config.
        names: names of the trained parameters, in the order of the sums.
        limit: meter of the steps as shares of the largest stable ones; None if the engine does not measure them.
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
        """Number of samples that the reference run would have seen; None without AdaScale, which counts them."""
        return None if self.adascale is None else self.adascale.samples

    def update(self, sums: Tensor, batch_size: int, num_units: float, world_size: int) -> float:
        """Add the sums of one update; return the factor of its learning rate, which is AdaScale's gain or 1.

        Args:
            sums: (2, P), as `Backend.noise_sums` returns them.
            batch_size: B.
            num_units: n, number of independent units whose squares were tracked.
            world_size: number of ranks over which the engine averaged gradients.

        An update of one unit (a small last batch) does not show the noise and enters no average.
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
        """Return the noise metrics of a row, and those of a batch size in this noise; an infinity is logged as null."""
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
        """Return, for each layer, the share of the largest stable step in use; an empty dict before the first measurement."""
        return {} if self.limit is None else self.limit.limit(layer_of).by_name

    def by_layer(self) -> dict[str, float | None]:
        """Return the noise scale of each layer in samples, or None where it is infinite."""
        scales = {name: noise.noise_scale for name, noise in self.noise.by_name.items()}
        return {name: scale if math.isfinite(scale) else None for name, scale in scales.items()}

    def warnings(self, batch_size: int, samples_seen: int) -> Iterator[str]:
        """Yield, once each, warnings that the batch exceeds its critical size, and that its steps are near their limit.

        The first warning is not given in the first quarter of the run, where the noise is small and its averages are out of
        date. An adaptive batch gets it only when it cannot shrink further and is still above its target.
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
        if self.limit.share > LARGE_SHARE:  # checked at every update
            self.warned_of_limit, found = True, self.limit.limit()
            yield (
                f"a step of batch size {batch_size:,} takes {found.share:.2f} of the largest stable one, of batch size "
                f"{found.batch_size:,.0f}, as a mean over directions: the steepest may be past their limit, from where on the "
                "loss leaves the curve of a small batch; largebatch limit measures them at a checkpoint"
            )

    def next_batch_size(self, batch_size: int, samples_seen: int, last: int) -> int:
        """Return the next batch size, doubled or halved once the whole confidence band supports the change.

        The band is that of critical_share * B_simple. A batch is doubled if twice its size is at most the lower end, and halved
        if half its size is at least the upper end. In between it is kept, so that it does not alternate.

        Args:
            batch_size: B of the last update.
            samples_seen: number of samples used so far.
            last: number of samples seen before the last update.
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
        """Set AdaScale's clock to the number of samples seen, for a run that continues from one without a clock."""
        if self.adascale is not None:
            self.adascale.updates = samples_seen / self.adascale.reference_batch_size

    def state_dict(self) -> dict[str, Any]:
        """Return the averages and the clock in a form that JSON can hold."""
        clock = None if self.adascale is None else self.adascale.state_dict()
        limit = None
        if self.limit is not None:
            self.limit.drop()  # a partial measurement is not saved; dropping it keeps this run equal to a resumed one
            limit = self.limit.state_dict()
        warned = {"warned": self.warned, "warned_of_limit": self.warned_of_limit}
        return {"noise": self.noise.state_dict(), "adascale": clock, "limit": limit} | warned

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.noise.load_state_dict(state["noise"])
        self.warned, self.warned_of_limit = state["warned"], state.get("warned_of_limit", False)
        if self.limit is not None and state.get("limit"):
            self.limit.load_state_dict(state["limit"])
        if self.adascale is not None and state["adascale"] is not None:
            self.adascale.load_state_dict(state["adascale"])

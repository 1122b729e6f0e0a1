"""Output of `largebatch limit`: a table and a sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from largebatch.noise.estimator import Noise


@dataclass(frozen=True)
class Place:
    """Results of the measurement at one point of training.

    Args:
        samples: number of samples seen before it.
        epoch: the same number in epochs.
        batch_size: B of the next update.
        reference_size: B_ref.
        eigenvalue: lower and upper bound of the largest eigenvalue.
        shares: r of the next update, at the lower bound of the eigenvalue, between the bounds, and at the upper bound.
        noise: the noise scale at this point.
    """

    samples: int
    epoch: float
    batch_size: int
    reference_size: int
    eigenvalue: tuple[float, float]
    shares: tuple[float, ...]
    noise: Noise

    @property
    def stable(self) -> tuple[float, ...]:
        """Batch size at which r would be 1 by the linear rule: lower bound, between, upper bound; infinite where r is 0."""
        return tuple(self.batch_size / share if share > 0 else math.inf for share in reversed(self.shares))


def _samples(value: float, most: int) -> str:
    """Return a number of samples rounded to three digits, or "> most" if it is larger than ``most``."""
    if value > most:
        return f"> {most:,}"
    digits = max(0, len(str(int(value))) - 3)
    return f"{round(value, -digits):,.0f}" if value >= 10 else f"{value:.2g}"


def _band(value: float, low: float, high: float, most: int) -> str:
    if low > most:
        return _samples(low, most)
    return f"{_samples(value, most)} ({_samples(low, most)} to {_samples(high, most)})"


def limit_table(places: Sequence[Place], optimizer: str, num_train: int) -> Table:
    """Return the table, with a row for each point of training.

    Args:
        places: the points of one run.
        optimizer: the name of the optimizer.
        num_train: number of samples in the training set; larger batch sizes are not given.
    """
    table = Table(title=f"Up to which batch size the steps of {optimizer} are stable", title_justify="left")
    for heading in ("epoch", "batch", "λ", "r", "stable to a batch of", "over B_ref", "critical batch (99 %)"):
        table.add_column(heading, justify="right")
    for place in places:
        low, middle, high = place.stable
        noise = place.noise
        table.add_row(
            f"{place.epoch:.3g}",
            f"{place.batch_size:,}",
            " to ".join(f"{value:.3g}" for value in place.eigenvalue),
            f"{place.shares[1]:.2g}",
            _band(middle, low, high, num_train),
            f"{middle / place.reference_size:.2g}" if middle <= num_train else "",
            _band(noise.noise_scale, noise.low, noise.high, num_train),
        )
    return table


def describe_limit(places: Sequence[Place], num_train: int) -> str:
    """Return a sentence with the batch size up to which a run's steps are stable, at the point where it is smallest.

    Args:
        places: the points of one run, in their order.
        num_train: number of samples in the training set; larger batch sizes are not given.
    """
    place = min(places, key=lambda place: place.stable[1])
    low, middle, high = place.stable
    start = f"From epoch {places[0].epoch:.3g} on" if places[0].samples else "From its beginning on"
    where = f" at epoch {place.epoch:.3g}" if len(places) > 1 else ""
    if middle > num_train:
        return f"{start} the linear rule's steps would be stable at any batch size that {num_train:,} samples give."
    held = (
        f"{start} this run would hold up to a batch of about {_band(middle, low, high, num_train)} samples, "
        f"{middle / place.reference_size:.2g} times its reference, where{where} the linear rule's steps cease to be stable"
    )
    noise = place.noise
    if noise.low > num_train:
        return f"{held}."
    critical = _band(noise.noise_scale, noise.low, noise.high, num_train)
    return (
        f"{held}; beyond the critical batch of {critical} a sample brings less than half of what it does in a small one, "
        "and in the first tenth of a run a larger batch may fall behind its reference."
    )

"""What the training of a config reads."""

from __future__ import annotations

from dataclasses import dataclass

from largebatch.config.schema import Config
from largebatch.planner.derive import Unit
from largebatch.scaling.plan import Plan

# Squares of so small a share of an update's samples, and of so many at the least, follow the reference as well as those of all
# (docs/results.md).
SQUARED_SHARE, LEAST_SQUARED = 16, 16


@dataclass(frozen=True, kw_only=True)
class Run:
    """A config, resolved for a data set and a number of ranks; alike on every rank.

    Args:
        config: the config.
        plan: batch size and hyper-parameters as functions of samples seen.
        world_size: ranks.
        group_size: samples that a normalisation layer takes its statistics over; batches are multiples of it.
        largest_batch: the largest batch size that the run may come to.
        second_moment: what the second moment takes squares of; None where it is plain, or not there.
        tracked: what squares are tracked, for the second moment or the noise; None for none.
        measures_noise: whether the gradient noise is measured.
        damps: whether steps are damped by the curvature that they meet.
        clips_reference: whether the clipping threshold bounds the norm of a gradient of the reference batch.
        fallback: modules whose squares are taken by differentiating them sample by sample.
        warnings: what its user should know.
    """

    config: Config
    plan: Plan
    world_size: int
    group_size: int
    largest_batch: int
    second_moment: Unit | None
    tracked: Unit | None
    measures_noise: bool
    damps: bool
    clips_reference: bool
    fallback: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    def squared_samples(self, batch_size: int) -> int:
        """Return how many samples of an update are squared, where squares are those of samples; else all."""
        given = self.config.optimizer.squares_samples
        if self.tracked != "sample" or given == "all":
            return batch_size
        return min(max(LEAST_SQUARED, batch_size // SQUARED_SHARE) if given is None else given, batch_size)

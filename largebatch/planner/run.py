"""The resolved config that training uses."""

from __future__ import annotations

from dataclasses import dataclass

from largebatch.config.schema import Config
from largebatch.planner.derive import Unit
from largebatch.scaling.plan import Plan

# The default is to square one sample in SQUARED_SHARE, and at least LEAST_SQUARED samples of an update. Runs with these squares
# followed the reference as well as runs with the squares of all samples (docs/results.md).
SQUARED_SHARE, LEAST_SQUARED = 16, 16


@dataclass(frozen=True, kw_only=True)
class Run:
    """A config, resolved for a data set and a number of ranks; the same on every rank.

    Args:
        config: the config.
        plan: batch size and hyper-parameters as functions of samples seen.
        world_size: number of ranks.
        group_size: number of samples over which a normalisation layer takes its statistics; batch sizes are multiples of it.
        largest_batch: the largest batch size that the run may reach.
        second_moment: the unit of the squares in the second moment; None if it uses no tracked squares.
        tracked: the unit of the squares that are tracked for the second moment, noise or damping; None if none are.
        measures_noise: whether the gradient noise is measured.
        damps: whether steps are damped according to the measured curvature.
        clips_reference: whether the clipping threshold bounds the norm of a gradient of the reference batch.
        fallback: modules whose squares are computed by differentiating them sample by sample.
        warnings: warnings for the user.
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
        """Return the number of samples of an update that are squared; all of them if the unit is not a sample."""
        given = self.config.optimizer.squares_samples
        if self.tracked != "sample" or given == "all":
            return batch_size
        return min(max(LEAST_SQUARED, batch_size // SQUARED_SHARE) if given is None else given, batch_size)

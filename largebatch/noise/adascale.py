"""AdaScale: the learning rate of a larger batch from the measured gradient noise (Johnson et al. 2020, arXiv:2007.05105)."""

from __future__ import annotations

import math
from typing import Any

from largebatch.errors import UserError
from largebatch.scaling.rules import averaging_updates

# The paper averages with coefficient theta = max(1 - kappa/1000, 0): this many updates at the reference for kappa <= 1000.
AVERAGING_UPDATES = 1000


def adascale_gain(trace: float, signal: float, reference_batch_size: int, batch_size: int) -> float:
    """Return the gain r: the number of updates at B_ref that one update at B replaces, and the factor on its learning rate.

        r = (sigma2 + |G|^2) / (sigma2/kappa + |G|^2),   sigma2 = tr(Sigma)/B_ref,   kappa = B/B_ref

    The gain is kappa where noise dominates, as in the linear rule, and 1 where noise is negligible. On an isotropic quadratic
    an update with r times the learning rate makes exactly r times the expected progress.

    Args:
        trace: tr(Sigma) of one sample's gradient; estimates below 0 count as 0.
        signal: |G|^2; estimates below 0 count as 0.
        reference_batch_size: B_ref, the batch size at which the learning rate was tuned, >= 1.
        batch_size: B, >= 1.

    Returns:
        r, between 1 and kappa; 1 where both estimates are zero.

    Example:
        >>> adascale_gain(trace=3.0, signal=1.0, reference_batch_size=1, batch_size=3)
        2.0
    """
    kappa = batch_size / reference_batch_size
    variance, signal = max(trace, 0.0) / reference_batch_size, max(signal, 0.0)
    damped = variance / kappa + signal
    gain = (variance + signal) / damped if damped > 0 else 1.0
    # Rounding may leave the interval by one unit in the last place.
    return min(max(gain, min(1.0, kappa)), max(1.0, kappa))


class AdaScale:
    """The gain of each update, and the clock that it drives: tau += r, in updates at the reference batch size.

    An update at B with the learning rate r * lr(tau) stands for r updates at B_ref. The schedule is read at tau, and the
    run ends when tau reaches the number of updates that it would have had at B_ref. tr(Sigma) and |G|^2 are averaged
    over 1000 * B_ref samples, as in the paper; the first updates are averaged as plain means. The paper estimates both from the
    gradients of kappa ranks; here they come from tracked squares, so that kappa need not be an integer.

    Args:
        reference_batch_size: B_ref, >= 1.
        length_samples: number of samples that the averages span; 1000 * B_ref by default.

    Example:
        >>> clock = AdaScale(reference_batch_size=32)
        >>> clock.update(trace=96.0, signal=1.0, batch_size=96)
        2.0
        >>> clock.updates, clock.samples
        (2.0, 64.0)
    """

    def __init__(self, reference_batch_size: int, length_samples: float | None = None) -> None:
        if not reference_batch_size >= 1:
            raise UserError(f"adascale: reference_batch_size: expected at least 1 sample, got {reference_batch_size}")
        self.reference_batch_size = reference_batch_size
        self.length_samples = AVERAGING_UPDATES * reference_batch_size if length_samples is None else length_samples
        self.updates = 0.0
        self.gain = 1.0
        self._count = 0.0
        self._trace = 0.0
        self._signal = 0.0

    @property
    def samples(self) -> float:
        """The clock in samples, tau * B_ref, at which schedules are evaluated: the samples seen by a run at the reference."""
        return self.updates * self.reference_batch_size

    def update(self, trace: float, signal: float, batch_size: int) -> float:
        """Average one update's estimates, advance the clock, and return the gain, the factor on this update's learning rate.

        Estimates that are not finite (an overflow, for which the step is skipped) change neither the averages nor the clock.

        Args:
            trace: this update's tr(Sigma), summed over all parameters (`largebatch.noise.estimator.noise_estimates`).
            signal: this update's |G|^2.
            batch_size: B.
        """
        if not math.isfinite(trace + signal):
            return self.gain
        self._count = min(self._count + 1.0, averaging_updates(self.length_samples, batch_size))
        self._trace += (trace - self._trace) / self._count
        self._signal += (signal - self._signal) / self._count
        return self.advance(batch_size)

    def advance(self, batch_size: int) -> float:
        """Advance the clock by an update without noise estimates (one that has a single unit), and return its gain.

        Args:
            batch_size: B, for which the gain is computed from the averages so far.
        """
        self.gain = adascale_gain(self._trace, self._signal, self.reference_batch_size, batch_size)
        self.updates += self.gain
        return self.gain

    def state_dict(self) -> dict[str, Any]:
        """Return the clock and the averages, for a checkpoint."""
        return {
            "updates": self.updates,
            "gain": self.gain,
            "count": self._count,
            "trace": self._trace,
            "signal": self._signal,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.updates, self.gain = state["updates"], state["gain"]
        self._count, self._trace, self._signal = state["count"], state["trace"], state["signal"]

"""Scaling rules, which convert hyper-parameters tuned at one batch size to another, in plain arithmetic.

Notation: B is the global batch size in samples (all ranks, all accumulation steps), kappa = B / B_ref, mu the momentum,
N = 1 / (1 - mu) the length of a running average in updates, eta the learning rate, eta0 the learning rate per sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

LrRule = Literal["linear", "sqrt", "adascale", "none"]
AveragingRule = Literal["keep", "half_life", "length"]


def _require(holds: bool, name: str, expected: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {value}")


def _require_momentum(momentum: float, name: str = "momentum") -> None:
    _require(0.0 <= momentum < 1.0, name, "a value in [0, 1)", momentum)


def _require_batch_size(batch_size: float, name: str = "batch_size") -> None:
    _require(batch_size >= 1, name, "at least 1 sample", batch_size)


def scaled_lr(lr0: float, batch_size: int, momentum: float = 0.0) -> float:
    """Return the learning rate that keeps SGD's temperature fixed as the batch grows.

        eta = (1 - mu) * B * eta0

    Args:
        lr0: eta0, learning rate per sample, > 0.
        batch_size: B, samples per update over all ranks and accumulation steps, >= 1.
        momentum: mu in [0, 1).

    Returns:
        eta, for torch.optim.SGD(momentum=mu) without dampening.

    Raises:
        ValueError: if an argument lies outside its range.

    Example:
        >>> round(scaled_lr(0.1 / (0.1 * 256), 8192, momentum=0.9), 6)
        3.2

    References:
        McAllester, TTIC 31230 (2020), "SGD with Momentum"; Smith et al., "Don't Decay the Learning Rate, Increase the
        Batch Size", ICLR 2018, arXiv:1711.00489.
    """
    _require(lr0 > 0, "lr0", "a learning rate per sample > 0", lr0)
    _require_batch_size(batch_size)
    _require_momentum(momentum)
    return (1.0 - momentum) * batch_size * lr0


def temperature(lr: float, batch_size: float, momentum: float = 0.0) -> float:
    """Return eta0 = eta / ((1 - mu) * B), the total effect of one sample's gradient: the inverse of `scaled_lr`.

    Args:
        lr: eta, >= 0.
        batch_size: B in samples, >= 1.
        momentum: mu in [0, 1); 0 for optimizers whose first moment is a running average (Adam).

    Raises:
        ValueError: if an argument lies outside its range.

    Example:
        >>> round(temperature(3.2, 8192, momentum=0.9), 9) == round(temperature(0.1, 256, momentum=0.9), 9)
        True
    """
    _require(lr >= 0, "lr", "a learning rate >= 0", lr)
    _require_batch_size(batch_size)
    _require_momentum(momentum)
    return lr / ((1.0 - momentum) * batch_size)


def scaled_momentum(lr0: float, batch_size: int, lr: float) -> float:
    """Return the momentum at which ``lr`` has the temperature ``lr0``: mu = 1 - eta / (B * eta0).

    Smith et al. (2018, section 5.2) raise the momentum instead of the learning rate when the batch grows.

    Raises:
        ValueError: if an argument is out of range, or no momentum in [0, 1) gives that temperature.

    Example:
        >>> round(scaled_momentum(0.1 / (0.1 * 128), 3200, 0.5), 6)
        0.98
    """
    _require(lr0 > 0, "lr0", "a learning rate per sample > 0", lr0)
    _require(lr > 0, "lr", "a learning rate > 0", lr)
    _require_batch_size(batch_size)
    momentum = 1.0 - lr / (batch_size * lr0)
    _require(momentum >= 0, "lr", f"at most B*eta0 = {batch_size * lr0:g} (momentum 0)", lr)
    return momentum


def noise_scale(lr: float, batch_size: float, num_samples: int, momentum: float = 0.0) -> float:
    """Return Smith et al.'s noise scale of the training dynamics, g = eta * N_train / (B * (1 - mu)).

    Example:
        >>> noise_scale(0.5, 640, 50_000, 0.9) == noise_scale(0.1, 128, 50_000, 0.9)
        True
    """
    return temperature(lr, batch_size, momentum) * num_samples


def averaging_length(beta: float) -> float:
    """Return N = 1 / (1 - beta), the length in updates of the running average with coefficient beta in [0, 1)."""
    _require_momentum(beta, "beta")
    return 1.0 / (1.0 - beta)


def averaging_coefficient(length: float) -> float:
    """Return beta = 1 - 1/N for a running average over N >= 1 updates: the inverse of `averaging_length`."""
    _require(length >= 1, "length", "at least 1 update", length)
    return 1.0 - 1.0 / length


def averaging_updates(length_samples: float, batch_size: int) -> float:
    """Return N = max(1, N0 / B), the number of updates that a running average over N0 samples spans.

    References:
        McAllester, TTIC 31230, "SGD: decoupling hyper-parameters" (the text prints min for max).
    """
    _require(length_samples >= 1, "length_samples", "at least 1 sample", length_samples)
    _require_batch_size(batch_size)
    return max(1.0, length_samples / batch_size)


def scaled_coefficient(beta: float, kappa: float, rule: AveragingRule | float) -> float:
    """Return a running average's coefficient after the batch has grown by kappa.

    Args:
        beta: coefficient at the reference batch size, in [0, 1).
        kappa: B / B_ref, > 0.
        rule: ``keep`` keeps the length in updates; ``half_life`` keeps the half-life in samples, beta**kappa (Marek et al.
            2025, arXiv:2507.07101); ``length`` keeps the length in samples, 1 - 1/max(1, N/kappa), which is
            1 - kappa*(1 - beta) (Malladi et al. 2022) as long as that is positive; a number is the new coefficient itself.

    Raises:
        ValueError: if an argument lies outside its range.
    """
    _require_momentum(beta, "beta")
    _require(kappa > 0, "kappa", "a ratio of batch sizes > 0", kappa)
    if isinstance(rule, int | float):
        _require_momentum(rule, "averaging rule")
        return float(rule)
    if rule == "keep":
        return beta
    if rule == "half_life":
        return float(beta**kappa)
    if rule == "length":
        return averaging_coefficient(max(1.0, averaging_length(beta) / kappa))
    raise ValueError(f"averaging rule: expected one of {get_args(AveragingRule)} or a number in [0, 1), got {rule!r}")


# Number of micro-batches that the running average of a second moment should span.
SPANNED_UNITS = 16.0


def enough_units(beta2: float, kappa: float) -> int:
    """Return the number of micro-batches per update that is enough to estimate a second moment from their squares.

    The average spans 1 / (1 - beta2) updates. A short one, such as that of 0.95**64, rests on the micro-batches of a single
    update. With only two of them, their variance is almost zero for some elements, which then take too large a step
    (docs/results.md). One micro-batch for each reference batch in the update is always enough.

    Args:
        beta2: coefficient of the average in use, in [0, 1].
        kappa: B / B_ref, > 0.

    Example:
        >>> [enough_units(0.999**kappa, kappa) for kappa in (4, 64)], [enough_units(0.95**kappa, kappa) for kappa in (4, 64)]
        ([1, 1], [3, 16])
    """
    return max(1, min(math.ceil(SPANNED_UNITS * (1.0 - beta2)), math.ceil(kappa)))


def second_moment_coefficient(beta: float, kappa: float, shortest: float = 0.0) -> float:
    """Return the coefficient of a second moment's average after the batch has grown by kappa.

        max(beta**kappa, min(beta, shortest))

    The half-life in samples is kept, unless the average would become shorter than that of ``shortest``.

    Args:
        beta: coefficient at the reference batch size, in [0, 1): Adam's beta2 or RMSProp's alpha.
        kappa: B / B_ref, > 0.
        shortest: the average is not made shorter than one of this coefficient, in [0, 1); a smaller beta is kept.

    Example:
        >>> round(second_moment_coefficient(0.999, 16), 6), second_moment_coefficient(0.95, 16, shortest=0.9)
        (0.984119, 0.9)
    """
    return max(scaled_coefficient(beta, kappa, "half_life"), min(beta, shortest))


@dataclass(frozen=True)
class Reference:
    """Hyper-parameters and the batch size they were tuned at; `at` converts them to another batch size.

    Learning rates:

        linear   eta = eta_ref * kappa       * (1 - mu) / (1 - mu_ref)      the temperature is kept
        sqrt     eta = eta_ref * sqrt(kappa) * (1 - mu) / (1 - mu_ref)      plain Adam and RMSProp (Malladi et al. 2022)
        adascale eta = eta_ref * r           * (1 - mu) / (1 - mu_ref)      gain r in [1, kappa] (`noise.AdaScale`)
        none     eta = eta_ref

    where mu is heavy-ball momentum; Adam's beta1 is the coefficient of an average and does not enter. Under ``sqrt`` eps
    becomes eps / sqrt(kappa), because the second moment of a batch's mean gradient shrinks by kappa where noise dominates.

    Args:
        batch_size: B_ref, the global batch size the values were tuned at, in samples.
        lr: eta_ref, > 0.
        momentum: mu of SGD or RMSProp, in [0, 1).
        betas: Adam's coefficients, each in [0, 1).
        alpha: RMSProp's coefficient, in [0, 1).
        eps: added to the root of the second moment.
        rule: ``linear``, ``sqrt``, ``adascale`` (`at` gives the learning rate before the gain) or ``none``.
        momentum_rule: how mu follows the batch size (see `scaled_coefficient`); kept by default.
        beta1_rule: the same for Adam's beta1; by default ``length`` under ``sqrt``, and ``keep`` under the other rules.
        beta2_rule: the same for Adam's beta2 and RMSProp's alpha; by default ``half_life`` under ``linear``
            (`second_moment_coefficient`), ``length`` under ``sqrt``, and ``keep`` under ``adascale`` and ``none``.
        shortest: coefficient of the shortest average of a second moment under the default of ``linear``.

    Raises:
        ValueError: if a value lies outside its range.

    Example:
        >>> {name: round(value, 6) for name, value in Reference(256, 0.1, momentum=0.9).at(8192).items()}
        {'lr': 3.2, 'momentum': 0.9}

    References:
        Goyal et al. 2017, arXiv:1706.02677; Smith et al. 2018, arXiv:1711.00489; Malladi et al. 2022, arXiv:2205.10287.
    """

    batch_size: int
    lr: float
    momentum: float | None = None
    betas: tuple[float, float] | None = None
    alpha: float | None = None
    eps: float | None = None
    rule: LrRule = "linear"
    momentum_rule: AveragingRule | float | None = None
    beta1_rule: AveragingRule | float | None = None
    beta2_rule: AveragingRule | float | None = None
    shortest: float = 0.0

    def __post_init__(self) -> None:
        _require_batch_size(self.batch_size)
        _require(self.lr > 0, "lr", "a learning rate > 0", self.lr)
        _require(self.rule in get_args(LrRule), "rule", f"one of {get_args(LrRule)}", self.rule)
        self.at(self.batch_size)

    def at(self, batch_size: int) -> dict[str, Any]:
        """Return the optimizer's keyword arguments at this global batch size: lr, and the other values that were given."""
        _require_batch_size(batch_size)
        kappa = batch_size / self.batch_size
        default: AveragingRule = "length" if self.rule == "sqrt" else "keep"
        beta1_rule = default if self.beta1_rule is None else self.beta1_rule
        gain = {"linear": kappa, "sqrt": math.sqrt(kappa), "adascale": 1.0, "none": 1.0}[self.rule]
        values: dict[str, Any] = {}
        if self.momentum is not None:
            momentum = scaled_coefficient(
                self.momentum, kappa, "keep" if self.momentum_rule is None else self.momentum_rule
            )
            if self.rule != "none":
                gain *= (1.0 - momentum) / (1.0 - self.momentum)
            values["momentum"] = momentum
        values = {"lr": self.lr * gain, **values}
        if self.betas is not None:
            beta1, beta2 = self.betas
            values["betas"] = (
                scaled_coefficient(beta1, kappa, beta1_rule),
                self._second_moment(beta2, kappa, default),
            )
        if self.alpha is not None:
            values["alpha"] = self._second_moment(self.alpha, kappa, default)
        if self.eps is not None:
            values["eps"] = self.eps / math.sqrt(kappa) if self.rule == "sqrt" else self.eps
        return values

    def _second_moment(self, beta: float, kappa: float, default: AveragingRule) -> float:
        if self.beta2_rule is None and self.rule == "linear":
            return second_moment_coefficient(beta, kappa, self.shortest)
        return scaled_coefficient(beta, kappa, default if self.beta2_rule is None else self.beta2_rule)


def adam_per_sample(
    lr0: float, batch_size: int, first_moment_samples: float, second_moment_samples: float, eps: float
) -> dict[str, Any]:
    """Return Adam's arguments from hyper-parameters stated per sample (the lecture's reparameterisation).

        N_g = max(1, N0_g / B),  N_s = max(1, N0_s / B),  eta = eps * B * eta0

    so that eta0 has SGD's unit where eps dominates the root of the second moment.

    Args:
        lr0: eta0, learning rate per sample in SGD's unit, > 0.
        batch_size: B in samples.
        first_moment_samples: N0_g, samples that the average of gradients spans.
        second_moment_samples: N0_s, samples that the average of squares spans.
        eps: added to the root of the second moment, > 0.

    References:
        McAllester, TTIC 31230, "SGD: decoupling hyper-parameters".
    """
    _require(eps > 0, "eps", "a value > 0", eps)
    return {
        "lr": eps * scaled_lr(lr0, batch_size),
        "betas": (
            averaging_coefficient(averaging_updates(first_moment_samples, batch_size)),
            averaging_coefficient(averaging_updates(second_moment_samples, batch_size)),
        ),
        "eps": eps,
    }

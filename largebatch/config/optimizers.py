"""Config sections of the optimizers."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias, get_args

import torch
from pydantic import AfterValidator, Field, model_validator

from largebatch import optim
from largebatch.section import Coefficient, Count, NonNegative, Positive, Section

NAME = Field(description="Optimizer: sgd, lars, adagrad, rmsprop, adam, adamw, lamb or quench.")


def _default(optimizer_class: Callable[..., torch.optim.Optimizer], name: str) -> Any:
    """Return the default of an argument of an optimizer's constructor."""
    return signature(optimizer_class).parameters[name].default


def _half_or_one(value: float) -> float:
    if value not in (0.5, 1.0):
        raise ValueError("0.5 or 1")
    return value


class OptimizerBase(Section):
    """Fields that all optimizers have in common."""

    optimizer_class: ClassVar[Callable[..., torch.optim.Optimizer]]
    """Constructor of the optimizer. It has the defaults, and an argument for each field that the section adds to the base."""
    takes_rule: ClassVar[bool] = True
    """Whether a scaling rule scales its learning rate with the batch size."""

    name: Annotated[str, NAME]
    lr: Positive
    """Learning rate tuned at the reference batch size."""
    weight_decay: NonNegative = 0.0
    """Weight decay, of weights: not of norms, biases, scales, class tokens, position embeddings, and what a model's own
    no_weight_decay() names. The plan says how many of each."""
    decay_norm_and_bias: bool = False
    """Decay all parameters alike, norms, biases and the others too."""
    max_grad_norm: Positive | None = None
    """Clip the gradient's global norm to this."""
    max_grad_norm_of: Literal["reference", "batch"] = "reference"
    """Whose norm max_grad_norm bounds: that of a gradient of the reference batch, where squares for the second moment tell
    it, or that of the batch's own mean gradient, which falls as the batch grows."""
    damping: bool = False
    """Divide each element's step by a measure of the curvature that it meets, so that steps level off where the linear rule's
    are no longer stable (docs/limit.md): sgd, rmsprop, adam and adamw, with squares of micro-batches, alone or under DDP."""
    squares_samples: Count | Literal["all"] | None = None
    """Samples of an update that are squared, where squares are those of samples (second_moment, sigma2 or noise.per sample).
    None: a sixteenth of the update, and 16 at the least."""
    non_finite: Literal["stop", "skip", "roll_back"] = "stop"
    """At a NaN or infinite gradient: stop with the state before it; skip the update and count it; or go back to the last
    checkpoint and continue with other samples."""

    def reference_values(self) -> dict[str, Any]:
        """Return the values, besides lr, that are scaled with the batch size."""
        names = ("momentum", "betas", "alpha", "eps")
        return {name: getattr(self, name) for name in names if hasattr(self, name)}

    def build(self, groups: list[dict[str, Any]], reference_size: int) -> torch.optim.Optimizer:
        """Return the optimizer, constructed with the fields of this section that its constructor takes.

        Args:
            groups: parameter groups, which include their weight decay.
            reference_size: batch size at which the values were tuned.
        """
        known = signature(self.optimizer_class).parameters
        own = (name for name in type(self).model_fields if name in known and name != "weight_decay")
        values = {name: getattr(self, name) for name in own}
        if "reference_batch_size" in known:
            values["reference_batch_size"] = reference_size
        return self.optimizer_class(groups, **values)


class AdaptiveBase(OptimizerBase):
    """Fields that all optimizers with a second moment have in common."""

    second_moment: Literal["batch", "sample", "micro_batch"] | None = None
    """Squares of what: the batch's mean gradient (as published), or that of the reference batch, estimated from micro-batches
    or samples. None: micro_batch where the batch is not the reference and the rule is linear, else batch."""


class SGDConfig(OptimizerBase):
    """Stochastic gradient descent."""

    optimizer_class: ClassVar = optim.SGD

    name: Annotated[Literal["sgd"], NAME] = "sgd"
    momentum: Coefficient = _default(optim.SGD, "momentum")
    """Momentum tuned at the reference batch size."""
    nesterov: bool = _default(optim.SGD, "nesterov")
    """Nesterov's look-ahead momentum."""
    form: Literal["sum", "velocity", "average"] = _default(optim.SGD, "form")
    """Where the learning rate enters: sum (torch.optim), velocity (inside v), average (running average of gradients)."""

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> Self:
        if self.nesterov and (self.momentum == 0 or self.form != "sum"):
            raise ValueError(
                f"nesterov needs momentum > 0 and form sum, got momentum {self.momentum:g} and form {self.form}"
            )
        return self


class LARSConfig(OptimizerBase):
    """LARS: a layer's step follows the length of its weights (You et al. 2017)."""

    optimizer_class: ClassVar = optim.LARS

    name: Annotated[Literal["lars"], NAME] = "lars"
    momentum: Coefficient = _default(optim.LARS, "momentum")
    """Momentum tuned at the reference batch size; the learning rate enters the buffer."""
    trust_coefficient: Positive = _default(optim.LARS, "trust_coefficient")
    """How far a layer may move, relative to its length, at a learning rate of 1."""
    adapt_norm_and_bias: bool = _default(optim.LARS, "adapt_norm_and_bias")
    """Adapt norms and biases too; else their rate is lr itself."""


class AdagradConfig(AdaptiveBase):
    """Adagrad."""

    optimizer_class: ClassVar = optim.Adagrad

    name: Annotated[Literal["adagrad"], NAME] = "adagrad"
    eps: NonNegative = _default(optim.Adagrad, "eps")
    """Added to the root of the second moment."""


class RMSPropConfig(AdaptiveBase):
    """RMSProp."""

    optimizer_class: ClassVar = optim.RMSProp

    name: Annotated[Literal["rmsprop"], NAME] = "rmsprop"
    alpha: Coefficient = _default(optim.RMSProp, "alpha")
    """Coefficient of the running average of squares, at the reference batch size."""
    momentum: Coefficient = _default(optim.RMSProp, "momentum")
    """Heavy-ball momentum at the reference batch size."""
    eps: NonNegative = _default(optim.RMSProp, "eps")
    """Added to the root of the second moment."""
    centered: bool = _default(optim.RMSProp, "centered")
    """Divide by the standard deviation instead of the root of the second moment."""
    exponent: Annotated[float, AfterValidator(_half_or_one)] = _default(optim.RMSProp, "exponent")
    """Power of the second moment that divides the gradient."""
    bias_correction: Literal["none", "running_mean"] = _default(optim.RMSProp, "bias_correction")
    """none as published, or running_mean: weights 1/min(t, N)."""


class AdamBase(AdaptiveBase):
    """Fields that Adam and the optimizers based on it have in common."""

    betas: tuple[Coefficient, Coefficient] = _default(optim.Adam, "betas")
    """Coefficients of the two running averages at the reference batch size."""
    bias_correction: Literal["published", "running_mean"] = _default(optim.Adam, "bias_correction")
    """published: divide by 1 - beta^t; running_mean: weights 1/min(t, N)."""


class AdamConfig(AdamBase):
    """Adam (Kingma and Ba 2015), whose weight decay is a term of the gradient."""

    optimizer_class: ClassVar = optim.Adam

    name: Annotated[Literal["adam"], NAME] = "adam"
    eps: NonNegative = _default(optim.Adam, "eps")
    """Added to the root of the second moment."""


class AdamWConfig(AdamBase):
    """AdamW: Adam with a decoupled weight decay (Loshchilov and Hutter 2019)."""

    optimizer_class: ClassVar = optim.AdamW

    name: Annotated[Literal["adamw"], NAME] = "adamw"
    eps: NonNegative = _default(optim.AdamW, "eps")
    """Added to the root of the second moment."""


class LAMBConfig(AdamBase):
    """LAMB: AdamW's direction, with a step that follows the length of a layer's weights (You et al. 2020)."""

    optimizer_class: ClassVar = optim.LAMB

    name: Annotated[Literal["lamb"], NAME] = "lamb"
    eps: NonNegative = _default(optim.LAMB, "eps")
    """Added to the root of the second moment."""
    adapt_norm_and_bias: bool = _default(optim.LAMB, "adapt_norm_and_bias")
    """Adapt norms and biases too; else they follow AdamW."""


class QuenchConfig(OptimizerBase):
    """Quenching SGD: each element's own batch size Bstar and rate, from its own noise (McAllester, TTIC 31230)."""

    optimizer_class: ClassVar = optim.Quench
    takes_rule: ClassVar[bool] = False

    name: Annotated[Literal["quench"], NAME] = "quench"
    lr: Positive
    """lambda_eta, coefficient of the rate: 1/(32*L) in the theory, with L the largest curvature; the same at any batch size."""
    K: Count = _default(optim.Quench, "K")
    """Samples at the start of which only averages are taken, several times the batch size."""
    lambda_B: Positive = _default(optim.Quench, "lambda_B")
    """Coefficient of Bstar; 16 in the theory."""
    eps: Positive = _default(optim.Quench, "eps")
    """Added to the squared gradient in Bstar, so in the unit of that square."""
    sigma2: Literal["average", "sample"] = _default(optim.Quench, "sigma2")
    """Variance of a sample's gradient: from the spread of batch means, or exact from the squares of samples' gradients."""

    def reference_values(self) -> dict[str, Any]:
        """Return an empty dict, because Bstar and eta/B are per sample and need no scaling."""
        return {}


OptimizerConfig: TypeAlias = (
    SGDConfig | LARSConfig | AdagradConfig | RMSPropConfig | AdamConfig | AdamWConfig | LAMBConfig | QuenchConfig
)
OPTIMIZERS: tuple[type[OptimizerBase], ...] = get_args(OptimizerConfig)

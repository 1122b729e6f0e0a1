"""Sections of a config that name an optimizer."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import AfterValidator, Field, model_validator

from largebatch import optim
from largebatch.section import Coefficient, Count, NonNegative, Positive, Section

NAME = Field(description="Optimizer: sgd, lars, adagrad, rmsprop, adam, adamw, lamb or quench.")


def _half_or_one(value: float) -> float:
    if value not in (0.5, 1.0):
        raise ValueError("0.5 or 1")
    return value


class OptimizerBase(Section):
    """What every optimizer has."""

    takes_rule: ClassVar[bool] = True
    """Whether a scaling rule carries its learning rate to another batch size."""

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
    squares_samples: Count | Literal["all"] | None = None
    """Samples of an update that are squared, where squares are those of samples (second_moment, sigma2 or noise.per sample).
    None: a sixteenth of the update, and 16 at the least."""
    non_finite: Literal["stop", "skip", "roll_back"] = "stop"
    """At a NaN or infinite gradient: stop with the state before it; skip the update and count it; or go back to the last
    checkpoint and continue with other samples."""

    def reference_values(self) -> dict[str, Any]:
        """Return the values that follow the batch size, besides lr."""
        names = ("momentum", "betas", "alpha", "eps")
        return {name: getattr(self, name) for name in names if hasattr(self, name)}

    @abstractmethod
    def build(self, groups: list[dict[str, Any]], reference_size: int) -> torch.optim.Optimizer:
        """Return the optimizer over parameter groups, which carry their weight decay."""


class AdaptiveBase(OptimizerBase):
    """What every optimizer with a second moment has."""

    second_moment: Literal["batch", "sample", "micro_batch"] | None = None
    """Squares of what: the batch's mean gradient (as published), or that of the reference batch, estimated from micro-batches
    or samples. None: micro_batch where the batch is not the reference and the rule is linear, else batch."""


class SGDConfig(OptimizerBase):
    """Stochastic gradient descent."""

    name: Annotated[Literal["sgd"], NAME] = "sgd"
    momentum: Coefficient = 0.0
    """Momentum tuned at the reference batch size."""
    nesterov: bool = False
    """Nesterov's look-ahead momentum."""
    form: Literal["sum", "velocity", "average"] = "sum"
    """Where the learning rate enters: sum (torch.optim), velocity (inside v), average (running average of gradients)."""

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> Self:
        if self.nesterov and (self.momentum == 0 or self.form != "sum"):
            raise ValueError(
                f"nesterov needs momentum > 0 and form sum, got momentum {self.momentum:g} and form {self.form}"
            )
        return self

    def build(self, groups: list[dict[str, Any]], reference_size: int) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return optim.SGD(groups, self.lr, self.momentum, nesterov=self.nesterov, form=self.form)


class LARSConfig(OptimizerBase):
    """LARS: a layer's step follows the length of its weights (You et al. 2017)."""

    name: Annotated[Literal["lars"], NAME] = "lars"
    momentum: Coefficient = 0.9
    """Momentum tuned at the reference batch size; the learning rate enters the buffer."""
    trust_coefficient: Positive = 1e-3
    """How far a layer may move, relative to its length, at a learning rate of 1."""
    adapt_norm_and_bias: bool = False
    """Adapt norms and biases too; else their rate is lr itself."""

    def build(self, groups: list[dict[str, Any]], reference_size: int) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return optim.LARS(
            groups,
            self.lr,
            self.momentum,
            trust_coefficient=self.trust_coefficient,
            adapt_norm_and_bias=self.adapt_norm_and_bias,
        )


class AdagradConfig(AdaptiveBase):
    """Adagrad."""

    name: Annotated[Literal["adagrad"], NAME] = "adagrad"
    eps: NonNegative = 1e-10
    """Added to the root of the second moment."""

    def build(self, groups: list[dict[str, Any]], reference_size: int) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return optim.Adagrad(groups, self.lr, self.eps, reference_batch_size=reference_size)


class RMSPropConfig(AdaptiveBase):
    """RMSProp."""

    name: Annotated[Literal["rmsprop"], NAME] = "rmsprop"
    alpha: Coefficient = 0.99
    """Coefficient of the running average of squares, at the reference batch size."""
    momentum: Coefficient = 0.0
    """Heavy-ball momentum at the reference batch size."""
    eps: NonNegative = 1e-8
    """Added to the root of the second moment."""
    centered: bool = False
    """Divide by the standard deviation instead of the root of the second moment."""
    exponent: Annotated[float, AfterValidator(_half_or_one)] = 0.5
    """Power of the second moment that divides the gradient."""
    bias_correction: Literal["none", "running_mean"] = "none"
    """none as published, or running_mean: weights 1/min(t, N)."""

    def build(self, groups: list[dict[str, Any]], reference_size: int) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return optim.RMSProp(
            groups,
            self.lr,
            self.alpha,
            self.eps,
            momentum=self.momentum,
            centered=self.centered,
            exponent=self.exponent,
            bias_correction=self.bias_correction,
            reference_batch_size=reference_size,
        )


class AdamBase(AdaptiveBase):
    """What Adam and what is built on it have."""

    betas: tuple[Coefficient, Coefficient] = (0.9, 0.999)
    """Coefficients of the two running averages at the reference batch size."""
    bias_correction: Literal["published", "running_mean"] = "published"
    """published: divide by 1 - beta^t; running_mean: weights 1/min(t, N)."""


class AdamConfig(AdamBase):
    """Adam, with L2 weight decay (adam) or a decoupled one (adamw)."""

    name: Annotated[Literal["adam", "adamw"], NAME] = "adamw"
    eps: NonNegative = 1e-8
    """Added to the root of the second moment."""

    def build(self, groups: list[dict[str, Any]], reference_size: int) -> torch.optim.Optimizer:
        """Return the optimizer."""
        cls = optim.AdamW if self.name == "adamw" else optim.Adam
        return cls(
            groups,
            self.lr,
            self.betas,
            self.eps,
            bias_correction=self.bias_correction,
            reference_batch_size=reference_size,
        )


class LAMBConfig(AdamBase):
    """LAMB: AdamW's direction, with a step that follows the length of a layer's weights (You et al. 2020)."""

    name: Annotated[Literal["lamb"], NAME] = "lamb"
    eps: NonNegative = 1e-6
    """Added to the root of the second moment."""
    adapt_norm_and_bias: bool = False
    """Adapt norms and biases too; else they follow AdamW."""

    def build(self, groups: list[dict[str, Any]], reference_size: int) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return optim.LAMB(
            groups,
            self.lr,
            self.betas,
            self.eps,
            bias_correction=self.bias_correction,
            reference_batch_size=reference_size,
            adapt_norm_and_bias=self.adapt_norm_and_bias,
        )


class QuenchConfig(OptimizerBase):
    """Quenching SGD: each element's own batch size Bstar and rate, from its own noise (McAllester, TTIC 31230)."""

    takes_rule: ClassVar[bool] = False

    name: Annotated[Literal["quench"], NAME] = "quench"
    lr: Positive
    """lambda_eta, coefficient of the rate: 1/(32*L) in the theory, with L the largest curvature; the same at any batch size."""
    K: Count = 4096
    """Samples at the start of which only averages are taken, several times the batch size."""
    lambda_B: Positive = 16.0
    """Coefficient of Bstar; 16 in the theory."""
    eps: Positive = 1e-8
    """Added to the squared gradient in Bstar, so in the unit of that square."""
    sigma2: Literal["average", "sample"] = "average"
    """Variance of a sample's gradient: from the spread of batch means, or exact from the squares of samples' gradients."""

    def reference_values(self) -> dict[str, Any]:
        """Return nothing: Bstar and eta/B are per sample."""
        return {}

    def build(self, groups: list[dict[str, Any]], reference_size: int) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return optim.Quench(groups, self.lr, self.K, self.lambda_B, self.eps, self.sigma2)


OPTIMIZERS = (SGDConfig, LARSConfig, AdagradConfig, RMSPropConfig, AdamConfig, LAMBConfig, QuenchConfig)

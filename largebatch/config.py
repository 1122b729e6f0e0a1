"""The config of a run: its sections and what they mean. One YAML file is one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeAlias, Union, get_args

import torch
import yaml
from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from largebatch import optim
from largebatch.checkpoint import CheckpointConfig
from largebatch.data import SOURCES
from largebatch.data.loader import LoaderConfig
from largebatch.distributed import BackendConfig, Precision
from largebatch.models import MODELS
from largebatch.noise import NoiseConfig
from largebatch.scaling import AveragingRule, LrRule, Reference
from largebatch.schedule_config import SCHEDULES, ScheduleBase, WarmupConfig
from largebatch.section import Coefficient, Count, NonNegative, Positive, Section, UserError


def _half_or_one(value: float) -> float:
    if value not in (0.5, 1.0):
        raise ValueError("0.5 or 1")
    return value


class BatchConfig(Section):
    """Batch sizes, in samples over all ranks and accumulation steps."""

    reference_size: Count
    """Global batch size the hyper-parameters were tuned at."""
    size: Count
    """Global batch size to train at (at the start, where the batch grows)."""
    max_size: Count | None = None
    """Most samples of an update, where the batch grows (about N_train/10: Smith et al. 2018)."""
    micro_size: Count | None = None
    """Most samples of one forward pass on one rank; the rest is accumulated. None: a rank's whole share at once."""
    at_epoch_end: Literal["carry", "cut"] = "carry"
    """carry: a batch reaches into the next epoch; cut: each epoch ends with a smaller batch, at that batch's own rate."""
    growth: Literal["schedule", "adaptive"] = "schedule"
    """schedule: as schedule.realize says; adaptive: doubles and halves with the measured critical batch size, from size up
    to max_size or a tenth of the training set."""
    critical_share: Positive = 1.0
    """adaptive: batch size aimed at, in critical batch sizes."""


class OptimizerBase(Section):
    """What every optimizer has."""

    name: str
    """Optimizer: sgd, adagrad, rmsprop, adam or adamw."""
    lr: Positive
    """Learning rate tuned at the reference batch size."""
    weight_decay: NonNegative = 0.0
    """Weight decay."""
    decay_norm_and_bias: bool = False
    """Decay norms and biases too."""
    max_grad_norm: Positive | None = None
    """Clip the gradient's global norm to this."""
    non_finite: Literal["stop", "skip", "roll_back"] = "stop"
    """At a NaN or infinite gradient: stop with the state before it; skip the update and count it; or go back to the last
    checkpoint and continue with other samples."""

    def reference_values(self) -> dict[str, Any]:
        """Return the values that follow the batch size, besides lr."""
        names = ("momentum", "betas", "alpha", "eps")
        return {name: getattr(self, name) for name in names if hasattr(self, name)}

    def build(self, groups: list[dict[str, Any]], reference_size: int) -> torch.optim.Optimizer:
        """Return the optimizer over parameter groups, which carry their weight decay."""
        raise NotImplementedError


class AdaptiveBase(OptimizerBase):
    """What every optimizer with a second moment has."""

    second_moment: Literal["batch", "sample", "micro_batch"] | None = None
    """Squares of what: the batch's mean gradient (as published), or that of the reference batch, estimated from samples
    or micro-batches. None: sample where the batch is not the reference and the rule is linear, else batch."""


class SGDConfig(OptimizerBase):
    """Stochastic gradient descent."""

    name: Literal["sgd"] = "sgd"
    """Optimizer: sgd, adagrad, rmsprop, adam or adamw."""
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


class AdagradConfig(AdaptiveBase):
    """Adagrad."""

    name: Literal["adagrad"] = "adagrad"
    """Optimizer: sgd, adagrad, rmsprop, adam or adamw."""
    eps: NonNegative = 1e-10
    """Added to the root of the second moment."""

    def build(self, groups: list[dict[str, Any]], reference_size: int) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return optim.Adagrad(groups, self.lr, self.eps, reference_batch_size=reference_size)


class RMSPropConfig(AdaptiveBase):
    """RMSProp."""

    name: Literal["rmsprop"] = "rmsprop"
    """Optimizer: sgd, adagrad, rmsprop, adam or adamw."""
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


class AdamConfig(AdaptiveBase):
    """Adam, with L2 weight decay (adam) or a decoupled one (adamw)."""

    name: Literal["adam", "adamw"] = "adamw"
    """Optimizer: sgd, adagrad, rmsprop, adam or adamw."""
    betas: tuple[Coefficient, Coefficient] = (0.9, 0.999)
    """Coefficients of the two running averages at the reference batch size."""
    eps: NonNegative = 1e-8
    """Added to the root of the second moment."""
    bias_correction: Literal["published", "running_mean"] = "published"
    """published: divide by 1 - beta^t; running_mean: weights 1/min(t, N)."""

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


class ScalingConfig(Section):
    """How hyper-parameters follow the batch size. For coefficients: keep, half_life, length, or a number."""

    rule: LrRule = "linear"
    """Learning rate: linear in the batch size (the temperature is kept), sqrt (plain Adam and RMSProp), adascale (as far as
    the measured noise allows, with a clock of its own), or none."""
    momentum: AveragingRule | Coefficient = "keep"
    """Momentum; the learning rate follows it by (1 - mu)."""
    beta1: AveragingRule | Coefficient | None = None
    """Adam's beta1. None: kept, but of fixed length in samples under sqrt."""
    beta2: AveragingRule | Coefficient | None = None
    """Adam's beta2 and RMSProp's alpha. None: of fixed half-life in samples, of fixed length under sqrt."""


class EvaluateConfig(Section):
    """Evaluation on the validation set."""

    every_epochs: Positive = 1.0
    """Epochs between evaluations; there is one at the end in any case."""
    batch_size: Count = 512
    """Samples of one forward pass on one rank."""


class LogConfig(Section):
    """Metrics and trackers. metrics.jsonl is always written."""

    every_updates: Count = 10
    """Updates between two rows of metrics.jsonl."""
    trackers: list[Literal["wandb", "tensorboard"]] = Field(default_factory=list)
    """Further trackers: wandb, tensorboard."""
    project: str = "largebatch"
    """Project of Weights & Biases."""
    wandb_mode: Literal["online", "offline"] = "offline"
    """offline keeps the run in its folder, for `wandb sync` later."""


FACTORY = "package.module:factory"


def section_names(section: type[Section]) -> tuple[str, ...]:
    """Return the names that choose a section: the literal ones, or `FACTORY` where any import path does."""
    return get_args(section.model_fields["name"].annotation) or (FACTORY,)


def _by_name(sections: Sequence[type[Section]], default: str | None = None) -> Any:
    """Return the union of sections told apart by the key ``name``; names with a colon are import paths."""
    tag_of = {name: section_names(section)[0] for section in sections for name in section_names(section)}
    members = tuple(Annotated[section, Tag(section_names(section)[0])] for section in sections)

    def tag(value: Any) -> str | None:
        name = value.get("name", default) if isinstance(value, Mapping) else getattr(value, "name", default)
        if not isinstance(name, str):
            return None
        return FACTORY if ":" in name and FACTORY in tag_of else tag_of.get(name, name)

    # A union cannot be spelt in the source when its members come in a tuple.
    return Annotated[Union[members], Discriminator(tag)]  # noqa: UP007


OPTIMIZERS = (SGDConfig, AdagradConfig, RMSPropConfig, AdamConfig)
if TYPE_CHECKING:  # a union made at run time is no type to a checker
    DataConfig: TypeAlias = Any
    ModelConfig: TypeAlias = Any
    OptimizerConfig = OptimizerBase
    ScheduleConfig = ScheduleBase
else:
    DataConfig = _by_name(SOURCES)
    ModelConfig = _by_name(MODELS)
    OptimizerConfig = _by_name(OPTIMIZERS)
    ScheduleConfig = _by_name(SCHEDULES, default="constant")


class Run(Section):
    """One run."""

    data: DataConfig
    model: ModelConfig
    batch: BatchConfig
    optimizer: OptimizerConfig
    scaling: ScalingConfig = ScalingConfig()
    schedule: ScheduleConfig
    warmup: WarmupConfig = WarmupConfig()
    noise: NoiseConfig = NoiseConfig()
    loader: LoaderConfig = LoaderConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    backend: BackendConfig = BackendConfig()
    precision: Precision = "fp32"
    """Arithmetic: fp32, fp64, or autocast to bf16 or fp16."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the initial weights and of the order of samples."""

    def reference(self) -> Reference:
        """Return the tuned hyper-parameters with the rules that carry them to another batch size.

        Raises:
            UserError: if a rule is set for something this optimizer does not have.
        """
        values = self.optimizer.reference_values()
        uses = {
            "momentum": "momentum" in values,
            "beta1": "betas" in values,
            "beta2": "betas" in values or "alpha" in values,
        }
        for key, used in uses.items():
            if getattr(self.scaling, key) != ScalingConfig.model_fields[key].default and not used:
                raise UserError(
                    f"scaling.{key}: optimizer '{self.optimizer.name}' has no such coefficient; remove the key"
                )
        return Reference(
            self.batch.reference_size,
            self.optimizer.lr,
            **values,
            rule=self.scaling.rule,
            momentum_rule=self.scaling.momentum if uses["momentum"] else None,
            beta1_rule=self.scaling.beta1,
            beta2_rule=self.scaling.beta2,
        )

    def measures_noise(self) -> bool:
        """Return whether the gradient noise is measured: to log it, or because something follows it."""
        return self.noise.measure or self.batch.growth == "adaptive" or self.scaling.rule == "adascale"

    def tracked(self) -> Literal["sample", "micro_batch"] | None:
        """Return what squares are tracked, for the second moment or the noise; None for none."""
        return self.second_moment() or (self.noise.per if self.measures_noise() else None)

    def second_moment(self) -> Literal["sample", "micro_batch"] | None:
        """Return what squares the second moment is taken from; None for plain second moments, or none at all.

        Raises:
            UserError: if the scaling rule does not go with what was asked for.
        """
        if not isinstance(self.optimizer, AdaptiveBase):
            return None
        wanted = self.optimizer.second_moment
        if wanted is None:
            elsewhere = self.batch.size != self.batch.reference_size or self.grows()
            return "sample" if elsewhere and self.scaling.rule == "linear" else None
        if wanted == "batch":
            return None
        if self.scaling.rule == "sqrt":
            raise UserError(
                f"scaling.rule: sqrt is for plain second moments (optimizer.second_moment batch); with '{wanted}' they are "
                "those of the reference batch, which go with linear"
            )
        return wanted

    def grows(self) -> bool:
        """Return whether the batch size changes during the run."""
        grows_first = self.warmup.name != "none" and self.warmup.realize == "batch"
        return self.schedule.realize != "lr" or self.batch.growth == "adaptive" or grows_first

    def to_yaml(self) -> str:
        """Return the resolved config, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

"""The sections of a run's config. One YAML file describes one run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema, core_schema

from largebatch.checkpoint.folder import CheckpointConfig
from largebatch.config import yaml_text
from largebatch.config.optimizers import OPTIMIZERS, OptimizerConfig
from largebatch.config.schedules import ScheduleConfig, WarmupConfig
from largebatch.data import DataConfig
from largebatch.data.workers import LoaderConfig
from largebatch.distributed import BackendConfig, Precision
from largebatch.models import ModelConfig
from largebatch.scaling.rules import AveragingRule, LrRule
from largebatch.section import Coefficient, Count, Epochs, Positive, Section


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
    to max_size, at most a tenth of the training set."""
    critical_share: Positive = 1.0
    """adaptive: batch size aimed at, in critical batch sizes."""


class ScalingConfig(Section):
    """How hyper-parameters follow the batch size. For coefficients: keep, half_life, length, or a number."""

    rule: LrRule = "linear"
    """Learning rate: linear in the batch size (the temperature is kept), sqrt (plain Adam, RMSProp and LAMB), adascale (as
    far as the measured noise allows, with a clock of its own), or none, which is quench's only one and its default."""
    momentum: AveragingRule | Coefficient = "keep"
    """Momentum; the learning rate follows it by (1 - mu)."""
    beta1: AveragingRule | Coefficient | None = None
    """Adam's beta1. None: kept, but of fixed length in samples under sqrt."""
    beta2: AveragingRule | Coefficient | None = None
    """Adam's beta2 and RMSProp's alpha. None: of fixed half-life in samples under linear, of fixed length under sqrt, else
    kept."""


class NoiseConfig(Section):
    """Measuring the gradient noise while training."""

    measure: bool = False
    """Measure the gradient noise scale at every update; log it with the progress and efficiency of the batch size."""
    per: Literal["sample", "micro_batch"] = "micro_batch"
    """Squares of what, where the optimizer does not track any for its second moment."""
    average_samples: Count | None = None
    """Samples that the averages span. None: a twentieth of the run, and ten updates at least."""


class EvaluateConfig(Section):
    """Evaluation on the validation set."""

    every_epochs: Epochs = 1.0
    """Epochs between evaluations; there is one at the end in any case."""
    batch_size: Count = 512
    """Samples of one forward pass on one rank."""


def _is_project(name: str) -> str:
    if not 1 <= len(name) <= 128 or set(name) & set("/\\#?%:"):
        raise ValueError("1 to 128 characters, none of / \\ # ? % :")
    return name


class LogConfig(Section):
    """Metrics and trackers. metrics.jsonl is always written."""

    every_updates: Count = 10
    """Updates between two rows of metrics.jsonl."""
    trackers: list[Literal["wandb", "tensorboard"]] = Field(default_factory=list)
    """Further trackers: wandb, tensorboard."""
    project: Annotated[str, AfterValidator(_is_project)] = "largebatch"
    """Project of Weights & Biases, which takes 1 to 128 characters, none of / \\ # ? % :."""
    wandb_mode: Literal["online", "offline"] = "offline"
    """offline keeps the run in its folder, for `wandb sync` later."""


FACTORY = "package.module:factory"


def section_names(section: type[Section]) -> tuple[str, ...]:
    """Return the names that select a section class: its literal names, or `FACTORY` if it accepts any import path."""
    return get_args(section.model_fields["name"].annotation) or (FACTORY,)


@dataclass(frozen=True)
class ByName:
    """Selects the section class of a union by the key ``name``; a name with a colon is an import path.

    Args:
        default: the name to use for a section without one.
    """

    default: str | None = None

    def __get_pydantic_core_schema__(self, union: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return the core schema with which pydantic validates the union."""
        sections = get_args(union)
        tag_of = {name: section_names(section)[0] for section in sections for name in section_names(section)}

        def tag(value: Any) -> str | None:
            name = value.get("name", self.default) if isinstance(value, Mapping) else getattr(value, "name", None)
            if not isinstance(name, str):
                return None
            return FACTORY if ":" in name and FACTORY in tag_of else tag_of.get(name, name)

        choices = {section_names(section)[0]: handler.generate_schema(section) for section in sections}
        return core_schema.tagged_union_schema(choices, tag)


class Config(Section):
    """The config of one run."""

    data: Annotated[DataConfig, ByName()]
    model: Annotated[ModelConfig, ByName()]
    batch: BatchConfig
    optimizer: Annotated[OptimizerConfig, ByName()]
    scaling: ScalingConfig = ScalingConfig()
    schedule: Annotated[ScheduleConfig, ByName("constant")]
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

    @model_validator(mode="before")
    @classmethod
    def _no_rule_where_none_applies(cls, values: Any) -> Any:
        """Set the rule to ``none`` if none is given and the optimizer takes none, so that the resolved config shows it."""
        if not isinstance(values, Mapping):
            return values
        optimizer, scaling = values.get("optimizer"), values.get("scaling", {})
        name = optimizer.get("name") if isinstance(optimizer, Mapping) else getattr(optimizer, "name", None)
        without = [known for section in OPTIMIZERS if not section.takes_rule for known in section_names(section)]
        if name not in without or not isinstance(scaling, Mapping):
            return values
        return {**values, "scaling": {"rule": "none", **scaling}}

    def to_yaml(self) -> str:
        """Return the resolved config as YAML, including all defaults."""
        return yaml_text.dump(self.model_dump(mode="json"))

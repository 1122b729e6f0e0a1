"""Models: small reference networks, ResNets, a GPT, and other models by name or import path."""

from typing import TypeAlias, get_args

from largebatch.models.factory import FactoryModel
from largebatch.models.gpt import GPT, GPTConfig
from largebatch.models.norm import (
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    GhostBatchNorm3d,
    batch_norms,
    commit_batch_statistics,
    convert_batch_norm,
    discard_batch_statistics,
    norm_group_size,
)
from largebatch.models.resnet import ResNet, ResNet18Config, ResNet50Config, resnet18, resnet50
from largebatch.models.simple import CNN, MLP, CNNConfig, MLPConfig
from largebatch.section import Section

ModelConfig: TypeAlias = MLPConfig | CNNConfig | ResNet18Config | ResNet50Config | GPTConfig | FactoryModel
MODELS: tuple[type[Section], ...] = get_args(ModelConfig)

__all__ = [
    "CNN",
    "GPT",
    "MLP",
    "MODELS",
    "CNNConfig",
    "FactoryModel",
    "GPTConfig",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "MLPConfig",
    "ModelConfig",
    "ResNet",
    "ResNet18Config",
    "ResNet50Config",
    "batch_norms",
    "commit_batch_statistics",
    "convert_batch_norm",
    "discard_batch_statistics",
    "norm_group_size",
    "resnet18",
    "resnet50",
]

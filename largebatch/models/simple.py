"""Two small networks: a multilayer perceptron and a convolutional network for images of digits and clothes."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from largebatch.errors import UserError
from largebatch.models.norm import NormKind, make_norm
from largebatch.section import Count, Section, Width
from largebatch.task import Task

Activation = Literal["relu", "gelu", "tanh"]

_ACTIVATIONS: dict[Activation, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}


class MLP(nn.Sequential):
    """Linear layers with activations between them, applied to flattened inputs, with torch's default initialisation.

    Args:
        num_inputs: number of elements of one input, of any shape.
        hidden: widths of the hidden layers; an empty list makes a linear model.
        num_outputs: number of outputs.
        activation: activation function between the layers.
    """

    def __init__(self, num_inputs: int, hidden: list[int], num_outputs: int, activation: Activation = "relu") -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        for fan_in, fan_out in pairwise([num_inputs, *hidden]):
            layers += [nn.Linear(fan_in, fan_out), _ACTIVATIONS[activation]()]
        super().__init__(*layers, nn.Linear([num_inputs, *hidden][-1], num_outputs))


class CNN(nn.Module):
    """3 x 3 convolutions that each halve height and width, and a linear layer, with torch's default initialisation.

    Args:
        image_shape: (c, h, w).
        channels: number of output channels of each convolution.
        num_outputs: number of outputs.
        norm: kind of normalisation after each convolution.
        norm_group_size: number of samples per group if ``norm`` is ``batch``.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        channels: list[int],
        num_outputs: int,
        norm: NormKind = "none",
        norm_group_size: int = 32,
    ) -> None:
        super().__init__()
        fan_in, height, width = image_shape
        self.convs = nn.ModuleList()
        self.norms = nn.ModuleList()
        for fan_out in channels:
            # A normalisation layer has its own bias.
            self.convs.append(nn.Conv2d(fan_in, fan_out, 3, stride=2, padding=1, bias=norm == "none"))
            self.norms.append(make_norm(norm, fan_out, norm_group_size))
            fan_in, height, width = fan_out, math.ceil(height / 2), math.ceil(width / 2)
        self.fc = nn.Linear(fan_in * height * width, num_outputs)

    def forward(self, images: Tensor) -> Tensor:
        """Return (n, num_outputs) for images (n, c, h, w)."""
        features = images
        for conv, norm in zip(self.convs, self.norms, strict=True):
            features = F.relu(norm(conv(features)))
        return self.fc(features.flatten(1))


def image_shape(task: Task, model_name: str) -> tuple[int, int, int]:
    """Return a task's sample shape as (channels, height, width).

    Raises:
        UserError: if the samples are not images.
    """
    if task.kind == "language_modeling" or len(task.sample_shape) != 3:
        raise UserError(
            f"model.name: {model_name} takes images (channels, height, width), the data has samples of shape "
            f"{task.sample_shape}"
        )
    channels, height, width = task.sample_shape
    return channels, height, width


class MLPConfig(Section):
    """A multilayer perceptron on the flattened input."""

    name: Literal["mlp"] = "mlp"
    """The model."""

    hidden: list[Width] = Field(default=[128])
    """Widths of the hidden layers; an empty list makes a linear model."""

    activation: Activation = "relu"
    """Activation function between the layers."""

    def build(self, task: Task) -> MLP:
        """Return a newly initialised model.

        Raises:
            UserError: if the samples are sequences of tokens.
        """
        if task.kind == "language_modeling":
            raise UserError("model.name: mlp does not take sequences of tokens; gpt does")
        return MLP(math.prod(task.sample_shape), self.hidden, task.num_outputs, self.activation)


class CNNConfig(Section):
    """A small convolutional network: 65,322 parameters on images of 28 x 28 pixels in ten classes."""

    name: Literal["cnn"] = "cnn"
    """The model."""

    channels: list[Width] = Field(default=[32, 64, 64], min_length=1)
    """Number of output channels of each 3 x 3 convolution; each convolution halves height and width."""

    norm: NormKind = "none"
    """Normalisation after each convolution."""

    norm_group_size: Count = 32
    """Number of samples over which batch normalisation computes its statistics, independent of the batch size."""

    def build(self, task: Task) -> CNN:
        """Return a newly initialised model.

        Raises:
            UserError: if the samples are not images.
        """
        return CNN(image_shape(task, self.name), self.channels, task.num_outputs, self.norm, self.norm_group_size)

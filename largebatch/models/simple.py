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
    """Linear layers with an activation between them, on flattened inputs; torch's own initialisation.

    Args:
        num_inputs: numbers in one input, whatever its shape.
        hidden: widths of the hidden layers; none make it a linear model.
        num_outputs: numbers that come out.
        activation: between the layers.
    """

    def __init__(self, num_inputs: int, hidden: list[int], num_outputs: int, activation: Activation = "relu") -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        for fan_in, fan_out in pairwise([num_inputs, *hidden]):
            layers += [nn.Linear(fan_in, fan_out), _ACTIVATIONS[activation]()]
        super().__init__(*layers, nn.Linear([num_inputs, *hidden][-1], num_outputs))


class CNN(nn.Module):
    """3 x 3 convolutions that each halve the image, and a linear layer on what is left; torch's own initialisation.

    Args:
        image_shape: (c, h, w).
        channels: of each convolution.
        num_outputs: numbers that come out.
        norm: after each convolution.
        norm_group_size: samples whose statistics ``norm="batch"`` uses.
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
            # A normalisation brings a bias of its own.
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
    """Function between the layers."""

    def build(self, task: Task) -> MLP:
        """Return a freshly initialised model.

        Raises:
            UserError: for sequences of tokens.
        """
        if task.kind == "language_modeling":
            raise UserError("model.name: mlp does not take sequences of tokens; gpt does")
        return MLP(math.prod(task.sample_shape), self.hidden, task.num_outputs, self.activation)


class CNNConfig(Section):
    """A small convolutional network: 65,322 parameters on images of 28 x 28 pixels in ten classes."""

    name: Literal["cnn"] = "cnn"
    """The model."""

    channels: list[Width] = Field(default=[32, 64, 64], min_length=1)
    """Channels of each 3 x 3 convolution; each halves the image."""

    norm: NormKind = "none"
    """Normalisation after each convolution."""

    norm_group_size: Count = 32
    """Samples whose statistics batch normalisation uses, whatever the batch size."""

    def build(self, task: Task) -> CNN:
        """Return a freshly initialised model.

        Raises:
            UserError: if the samples are not images.
        """
        return CNN(image_shape(task, self.name), self.channels, task.num_outputs, self.norm, self.norm_group_size)

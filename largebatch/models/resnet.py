"""ResNet-18 and ResNet-50 with the parameter names of torchvision and the initialisation of Goyal et al.

Convolution weights are normal with variance 2/fan_out (He et al. 2015). Normalisation layers have gamma 1, except the last one
of every residual block, which has gamma 0, so that the residual branch is initially 0. The last linear layer has normal
weights with standard deviation 0.01 and bias 0.

References:
    He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv:1512.03385.
    Goyal et al., "Accurate, Large Minibatch SGD", 2017, arXiv:1706.02677, section 5.1.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from largebatch.models.norm import make_norm
from largebatch.models.simple import image_shape
from largebatch.section import Count, Section
from largebatch.task import Task

ResNetNorm = Literal["batch", "group"]
Stem = Literal["cifar", "imagenet"]


def conv3x3(fan_in: int, fan_out: int, stride: int = 1) -> nn.Conv2d:
    """Return a 3 x 3 convolution without bias, padded so that only the stride changes the image's size."""
    return nn.Conv2d(fan_in, fan_out, 3, stride=stride, padding=1, bias=False)


def conv1x1(fan_in: int, fan_out: int, stride: int = 1) -> nn.Conv2d:
    """Return a 1 x 1 convolution without bias."""
    return nn.Conv2d(fan_in, fan_out, 1, stride=stride, bias=False)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with a shortcut connection.

    Args:
        fan_in: number of input channels.
        width: number of output channels of both convolutions.
        stride: stride of the first convolution.
        norm: kind of normalisation.
        norm_group_size: number of samples per group of a batch norm.
    """

    expansion = 1

    def __init__(self, fan_in: int, width: int, stride: int, norm: ResNetNorm, norm_group_size: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(fan_in, width, stride)
        self.bn1 = make_norm(norm, width, norm_group_size)
        self.conv2 = conv3x3(width, width)
        self.bn2 = make_norm(norm, width, norm_group_size)
        self.downsample = shortcut(fan_in, width, stride, norm, norm_group_size)

    @property
    def last_norm(self) -> nn.Module:
        """The normalisation just before the addition."""
        return self.bn2

    def forward(self, features: Tensor) -> Tensor:
        """Return (n, width, h / stride, w / stride) for features (n, fan_in, h, w)."""
        out = F.relu(self.bn1(self.conv1(features)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + (features if self.downsample is None else self.downsample(features)))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions with a shortcut; the 3 x 3 one is strided, as in Goyal et al. and torchvision.

    Args:
        fan_in: number of input channels.
        width: number of output channels of the first two convolutions; the block has four times as many.
        stride: stride of the 3 x 3 convolution.
        norm: kind of normalisation.
        norm_group_size: number of samples per group of a batch norm.
    """

    expansion = 4

    def __init__(self, fan_in: int, width: int, stride: int, norm: ResNetNorm, norm_group_size: int) -> None:
        super().__init__()
        fan_out = width * self.expansion
        self.conv1 = conv1x1(fan_in, width)
        self.bn1 = make_norm(norm, width, norm_group_size)
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = make_norm(norm, width, norm_group_size)
        self.conv3 = conv1x1(width, fan_out)
        self.bn3 = make_norm(norm, fan_out, norm_group_size)
        self.downsample = shortcut(fan_in, fan_out, stride, norm, norm_group_size)

    @property
    def last_norm(self) -> nn.Module:
        """The normalisation just before the addition."""
        return self.bn3

    def forward(self, features: Tensor) -> Tensor:
        """Return (n, 4 * width, h / stride, w / stride) for features (n, fan_in, h, w)."""
        out = F.relu(self.bn1(self.conv1(features)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + (features if self.downsample is None else self.downsample(features)))


def shortcut(fan_in: int, fan_out: int, stride: int, norm: ResNetNorm, norm_group_size: int) -> nn.Module | None:
    """Return the projection shortcut of a block that changes the shape; None for an identity shortcut."""
    if stride == 1 and fan_in == fan_out:
        return None
    return nn.Sequential(conv1x1(fan_in, fan_out, stride), make_norm(norm, fan_out, norm_group_size))


class ResNet(nn.Module):
    """A residual network of four stages, whose blocks have widths of 64, 128, 256 and 512 channels.

    Args:
        block: type of residual block.
        depths: number of blocks in each stage.
        num_outputs: number of outputs.
        in_channels: number of channels of the images.
        stem: ``imagenet``, a 7 x 7 convolution and a max pooling layer that reduce height and width by a factor of 4, or
            ``cifar``, one 3 x 3 convolution.
        norm: kind of normalisation.
        norm_group_size: number of samples per group if ``norm`` is ``batch``.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        num_outputs: int,
        in_channels: int = 3,
        stem: Stem = "imagenet",
        norm: ResNetNorm = "batch",
        norm_group_size: int = 32,
    ) -> None:
        super().__init__()
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
            self.maxpool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            self.conv1 = conv3x3(in_channels, 64)
            self.maxpool = nn.Identity()
        self.bn1 = make_norm(norm, 64, norm_group_size)
        stages = []
        fan_in = 64
        for stage, depth in enumerate(depths):
            width = 64 * 2**stage
            blocks = []
            for position in range(depth):
                stride = 2 if stage > 0 and position == 0 else 1
                blocks.append(block(fan_in, width, stride, norm, norm_group_size))
                fan_in = width * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.fc = nn.Linear(fan_in, num_outputs)
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for module in self.modules():
            if isinstance(module, BasicBlock | Bottleneck):
                assert isinstance(module.last_norm.weight, Tensor)
                nn.init.zeros_(module.last_norm.weight)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return (n, num_outputs) for images (n, c, h, w)."""
        features = self.maxpool(F.relu(self.bn1(self.conv1(images))))
        features = self.layer4(self.layer3(self.layer2(self.layer1(features))))
        return self.fc(features.mean(dim=(2, 3)))


def resnet18(num_outputs: int, in_channels: int = 3, stem: Stem = "cifar", **norm: int | str) -> ResNet:
    """Return a ResNet-18, by default for small images; ``norm`` and ``norm_group_size`` are those of ResNet."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_outputs, in_channels, stem, **norm)  # type: ignore[arg-type]


def resnet50(num_outputs: int, in_channels: int = 3, stem: Stem = "imagenet", **norm: int | str) -> ResNet:
    """Return a ResNet-50, by default for large images; ``norm`` and ``norm_group_size`` are those of ResNet."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_outputs, in_channels, stem, **norm)  # type: ignore[arg-type]


class _ResNetConfig(Section):
    """Base class of the config sections of the two residual networks."""

    name: str
    """The model."""

    stem: Stem
    """First layers: cifar keeps the image's size, imagenet reduces height and width by a factor of 4."""

    norm: ResNetNorm = "batch"
    """Normalisation: batch over norm_group_size samples, or group over 16 channels of each sample."""

    norm_group_size: Count = 32
    """Number of samples over which batch normalisation computes its statistics, independent of the batch size."""


class ResNet18Config(_ResNetConfig):
    """ResNet-18 for images of 32 x 32 pixels: the first layer is a 3 x 3 convolution with stride 1, without max pooling."""

    name: Literal["resnet18"] = "resnet18"
    """The model."""

    stem: Stem = "cifar"
    """First layers: cifar keeps the image's size, imagenet reduces height and width by a factor of 4."""

    def build(self, task: Task) -> ResNet:
        """Return a newly initialised model.

        Raises:
            UserError: if the samples are not images.
        """
        in_channels = image_shape(task, self.name)[0]
        return resnet18(task.num_outputs, in_channels, self.stem, norm=self.norm, norm_group_size=self.norm_group_size)


class ResNet50Config(_ResNetConfig):
    """ResNet-50 for images of 224 x 224 pixels, as trained by Goyal et al."""

    name: Literal["resnet50"] = "resnet50"
    """The model."""

    stem: Stem = "imagenet"
    """First layers: cifar keeps the image's size, imagenet reduces height and width by a factor of 4."""

    def build(self, task: Task) -> ResNet:
        """Return a newly initialised model.

        Raises:
            UserError: if the samples are not images.
        """
        in_channels = image_shape(task, self.name)[0]
        return resnet50(task.num_outputs, in_channels, self.stem, norm=self.norm, norm_group_size=self.norm_group_size)

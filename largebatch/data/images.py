"""Images in memory, stored as bytes, and augmented and normalised batch by batch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from largebatch.data.hashing import uniforms
from largebatch.data.sampler import SampleKeys

Augment = Literal["none", "crop", "crop_flip"]


def crop_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, padding: int) -> Tensor:
    """Crop each zero-padded image at its own position, and mirror the crop horizontally if requested.

    Args:
        images: (n, c, h, w).
        top: first row of the crop in the padded image, int64 (n,) in [0, 2 * padding].
        left: first column of the crop in the padded image, int64 (n,) in [0, 2 * padding].
        flip: whether to mirror the crop, bool (n,).
        padding: width of the zero padding on every side, pixels, >= 0.

    Returns:
        (n, c, h, w), with the images' dtype.
    """
    num, channels, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    rows = top[:, None] + torch.arange(height)
    columns = torch.arange(width).expand(num, width)
    columns = left[:, None] + torch.where(flip[:, None], width - 1 - columns, columns)
    # A single gather on flattened pixels crops and mirrors.
    pixels = rows[:, :, None] * padded.shape[-1] + columns[:, None, :]
    pixels = pixels.view(num, 1, height * width).expand(num, channels, height * width)
    return padded.flatten(2).gather(2, pixels).view(num, channels, height, width)


@cache
def _scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    scale = 1 / (255 * torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))
    return scale, -255 * scale * torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return (images / 255 - mean) / std in float32.

    Args:
        images: uint8 (n, c, h, w).
        mean: mean of each channel, on the scale 0 to 1.
        std: standard deviation of each channel, on the scale 0 to 1, > 0.
    """
    scale, shift = _scale_and_shift(mean, std)
    return images.to(torch.float32).mul_(scale).add_(shift)


@dataclass(frozen=True)
class ImageSamples:
    """Images stored as bytes, a quarter of the memory of float32, and converted to float32 batch by batch.

    Args:
        images: uint8 (N, c, h, w).
        labels: int64 (N,).
        mean: mean of each channel, on the scale 0 to 1.
        std: standard deviation of each channel, on the scale 0 to 1.
        augment: ``crop`` pads and crops at random, ``crop_flip`` also mirrors images with probability 1/2.
        crop_padding: width of the zero padding on every side before the crop, pixels.
        seed: seed of the augmentation.
    """

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augment = "none"
    crop_padding: int = 4
    seed: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, keys: SampleKeys) -> tuple[Tensor, Tensor]:
        """Return (images float32 (n, c, h, w), labels int64 (n,))."""
        chosen = torch.from_numpy(keys.indices)
        images = self.images.index_select(0, chosen)
        if self.augment != "none":
            images = self._augmented(images, keys)
        return normalize(images, self.mean, self.std), self.labels.index_select(0, chosen)

    def _augmented(self, images: Tensor, keys: SampleKeys) -> Tensor:
        draws = uniforms(self.seed, keys.epochs, keys.indices, 3)
        places = torch.from_numpy((draws[:, :2] * (2 * self.crop_padding + 1)).astype(np.int64))
        flip = torch.from_numpy(draws[:, 2] < 0.5) & (self.augment == "crop_flip")
        return crop_flip(images, places[:, 0], places[:, 1], flip, self.crop_padding)

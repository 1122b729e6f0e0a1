"""Synthetic images of any shape and number, for speed measurements and dry runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from largebatch.data.hashing import sample_hashes
from largebatch.data.sampler import SampleKeys
from largebatch.data.source import DataSection, Source
from largebatch.section import NonNegative, NumSamples, Side, Width
from largebatch.task import Task

_NUM_OFFSETS = 1 << 22


@dataclass(frozen=True)
class SyntheticSamples:
    """Images composed of a coarse pattern for each class and noise when they are read; they are not stored.

    Drawing 150,000 normal numbers for an image of ImageNet's size would take longer than decoding a photograph. Instead, the
    noise is a window of one long fixed strip of normal numbers, at a position given by the sample's hash.

    Args:
        patterns: pattern of each class, float32 (num_classes, c, p, q) with p and q at most 8.
        noise: the strip, float32 (number of positions + c * h * w - 1,).
        image_shape: (c, h, w).
        num_samples: number of samples in this half of the data set.
        first: index of the first sample in the whole data set, so that training and validation have no sample in common.
        seed: seed of the data set.
    """

    patterns: Tensor
    noise: Tensor
    image_shape: tuple[int, int, int]
    num_samples: int
    first: int
    seed: int

    def __len__(self) -> int:
        return self.num_samples

    def __getitems__(self, keys: SampleKeys) -> tuple[Tensor, Tensor]:
        """Return (images float32 (n, c, h, w), labels int64 (n,)); sample i is of class i modulo num_classes."""
        channels, height, width = self.image_shape
        # The hash does not include the epoch: a sample is the same in every epoch.
        hashes = sample_hashes(self.seed, np.zeros_like(keys.indices), keys.indices + self.first)
        num_pixels = channels * height * width
        offsets = torch.from_numpy((hashes % np.uint64(len(self.noise) - num_pixels + 1)).astype(np.int64))
        labels = torch.from_numpy((keys.indices + self.first) % len(self.patterns))
        images = self.noise.unfold(0, num_pixels, 1).index_select(0, offsets).view(-1, channels, height, width)
        patterns = self.patterns.index_select(0, labels)
        return images.add_(F.interpolate(patterns, size=(height, width), mode="nearest")), labels


class SyntheticImages(DataSection):
    """Images generated from the seed: a pattern for each class plus noise. Memory use does not depend on their number."""

    name: Literal["synthetic_images"] = "synthetic_images"
    """The data set."""

    shape: tuple[Side, Side, Side] = (3, 32, 32)
    """Channels, height and width of an image."""

    num_classes: Width = 10
    """Number of classes."""

    num_samples: NumSamples = 50_000
    """Number of training images; ImageNet has 1281167."""

    num_val: NumSamples = 1_000
    """Number of validation images."""

    noise: NonNegative = 1.0
    """Standard deviation of the noise of a pixel; that of the class patterns is 1."""

    def load(self, seed: int) -> Source:
        """Return the images; the seed of the run fixes the patterns and the noise."""
        channels, height, width = self.shape
        generator = torch.Generator().manual_seed(seed)
        patterns = torch.randn(self.num_classes, channels, min(8, height), min(8, width), generator=generator)
        strip = self.noise * torch.randn(_NUM_OFFSETS + channels * height * width - 1, generator=generator)
        return Source(
            SyntheticSamples(patterns, strip, self.shape, self.num_samples, 0, seed),
            SyntheticSamples(patterns, strip, self.shape, self.num_val, self.num_samples, seed),
            Task("classification", self.shape, self.num_classes),
        )

"""Image data sets that fit into memory: digits, MNIST, Fashion-MNIST, CIFAR-10."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from largebatch.data.images import Augment, ImageSamples
from largebatch.data.source import DataSection, Source, TensorSamples, data_path, fixed_order, limited, validation_size
from largebatch.errors import UserError
from largebatch.section import Count
from largebatch.task import Task


class Digits(DataSection):
    """1797 handwritten digits of 8 x 8 pixels, which are part of scikit-learn and need no download."""

    name: Literal["digits"] = "digits"
    """The data set."""

    val_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Fraction of the images used for validation; the split is the same for every seed."""

    def load(self, seed: int) -> Source:
        """Return the images standardised by the mean and standard deviation of all pixels, shape (1, 8, 8)."""
        from sklearn.datasets import load_digits  # imported here because it takes a second

        digits = load_digits()
        pixels = torch.from_numpy(digits.images).to(torch.float32).unsqueeze(1)  # (1797, 1, 8, 8), values 0 to 16
        images = (pixels - 4.884) / 6.017
        labels = torch.from_numpy(digits.target).to(torch.int64)
        order = torch.from_numpy(fixed_order(len(labels)))
        num_val = validation_size(len(labels), self.val_fraction)
        val, train = order[:num_val], order[num_val:]
        return Source(
            TensorSamples(images[train], labels[train]),
            TensorSamples(images[val], labels[val]),
            Task("classification", (1, 8, 8), 10),
        )


class _ImageBytes(DataSection):
    """Base class of the image data sets in memory."""

    mean: ClassVar[tuple[float, ...]]
    std: ClassVar[tuple[float, ...]]

    name: str
    """The data set."""

    path: str
    """Folder with the files of the data set."""

    crop_padding: Annotated[int, Field(ge=0, le=2**14)] = 4
    """Width of the zero padding on every side before a random crop, pixels."""

    num_train: Count | None = None
    """Number of training images to use, from the first on, for a quick study; null for all."""

    def _declared(self, num_train: int, image_shape: tuple[int, ...]) -> tuple[int, Task]:
        return min(num_train, self.num_train or num_train), Task("classification", image_shape, 10)

    def _source(self, train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], augment: Augment, seed: int) -> Source:
        images, labels = train
        num_train = limited(len(labels), self.num_train)
        return Source(
            ImageSamples(images[:num_train], labels[:num_train], self.mean, self.std, augment, self.crop_padding, seed),
            ImageSamples(*val, self.mean, self.std),
            Task("classification", tuple(images.shape[1:]), 10),
        )


class _IdxImages(_ImageBytes):
    """Base class of MNIST and the data sets in its file format."""

    augment: Augment = "none"
    """Augmentation of the training images: crop pads and crops at random, crop_flip also mirrors with probability 1/2."""

    def declared(self) -> tuple[int, Task]:
        """Return the published number of training images and the task, which allow planning without the files."""
        return self._declared(60_000, (1, 28, 28))

    def load(self, seed: int) -> Source:
        """Return the train files as the training set and the t10k files as the validation set.

        Raises:
            UserError: if a file is missing or broken.
        """
        folder = data_path(self.path)
        return self._source(idx_pair(folder, "train"), idx_pair(folder, "t10k"), self.augment, seed)


class Mnist(_IdxImages):
    """MNIST: 60,000 handwritten digits of 28 x 28 pixels, from its four IDX files, with or without gzip compression."""

    mean: ClassVar = (0.1307,)
    std: ClassVar = (0.3081,)

    name: Literal["mnist"] = "mnist"
    """The data set."""


class FashionMnist(_IdxImages):
    """Fashion-MNIST: 60,000 photographs of clothes, 28 x 28 pixels, in the file format of MNIST."""

    mean: ClassVar = (0.2860,)
    std: ClassVar = (0.3530,)

    name: Literal["fashion_mnist"] = "fashion_mnist"
    """The data set."""


class Cifar10(_ImageBytes):
    """CIFAR-10: 50,000 colour photographs of 32 x 32 pixels in ten classes, from the original binary version."""

    mean: ClassVar = (0.4914, 0.4822, 0.4465)
    std: ClassVar = (0.2470, 0.2435, 0.2616)

    name: Literal["cifar10"] = "cifar10"
    """The data set."""

    augment: Augment = "crop_flip"
    """Augmentation of the training images: crop pads and crops at random, crop_flip also mirrors with probability 1/2."""

    def declared(self) -> tuple[int, Task]:
        """Return the published number of training images and the task, which allow planning without the files."""
        return self._declared(50_000, (3, 32, 32))

    def load(self, seed: int) -> Source:
        """Return data_batch_1 to data_batch_5 as the training set and test_batch as the validation set.

        Raises:
            UserError: if a file is missing or broken.
        """
        folder = data_path(self.path)
        if (folder / "cifar-10-batches-bin").is_dir():
            folder = folder / "cifar-10-batches-bin"
        parts = [cifar_batch(folder / f"data_batch_{part}.bin") for part in range(1, 6)]
        train = torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])
        return self._source(train, cifar_batch(folder / "test_batch.bin"), self.augment, seed)


def idx_pair(folder: Path, prefix: str) -> tuple[Tensor, Tensor]:
    """Read the images and labels of one half of MNIST.

    Args:
        folder: folder that contains the files.
        prefix: ``train`` or ``t10k``.

    Returns:
        Images uint8 (N, 1, 28, 28) and labels int64 (N,) in 0 to 9.

    Raises:
        UserError: naming the file, and the expected and the actual contents.
    """
    images_file, images = read_idx(folder, f"{prefix}-images-idx3-ubyte", num_dimensions=3)
    labels_file, labels = read_idx(folder, f"{prefix}-labels-idx1-ubyte", num_dimensions=1)
    if images.shape[1:] != (28, 28):
        raise UserError(
            f"data.path: '{images_file}' should hold images of 28 x 28 pixels, it says {images.shape[1]} x "
            f"{images.shape[2]}"
        )
    if len(images) != len(labels):
        raise UserError(
            f"data.path: '{images_file}' holds {len(images)} images, but '{labels_file.name}' {len(labels)} labels"
        )
    if labels.max() > 9:
        raise UserError(f"data.path: '{labels_file}' should hold labels 0 to 9, it holds {int(labels.max())}")
    return images.unsqueeze(1), labels.to(torch.int64)


def read_idx(folder: Path, file_name: str, num_dimensions: int) -> tuple[Path, Tensor]:
    """Read one IDX file of bytes: two zero bytes, type 8, number of dimensions, their sizes as big-endian int32, and the data.

    Args:
        folder: folder that contains the file.
        file_name: its name, without the suffix ``.gz`` of a compressed file.
        num_dimensions: number of dimensions that it must have.

    Returns:
        The file that was read, and its contents, uint8.

    Raises:
        UserError: if it is missing, not an IDX file with this number of dimensions, empty, truncated or too long.
    """
    candidates = [folder / file_name, folder / f"{file_name}.gz"]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise UserError(f"data.path: no file '{file_name}' (nor '{file_name}.gz') in '{folder}'")
    contents = _read_bytes(file)
    expected_magic = 0x0800 + num_dimensions
    magic = int.from_bytes(contents[:4], "big")
    if len(contents) < 4 or magic != expected_magic:
        raise UserError(f"data.path: '{file}' should begin with the number {expected_magic}, it begins with {magic}")
    header = 4 + 4 * num_dimensions
    shape = [int.from_bytes(contents[start : start + 4], "big") for start in range(4, header, 4)]
    if len(contents) != header + math.prod(shape) or 0 in shape:
        raise UserError(
            f"data.path: '{file}' announces {' x '.join(map(str, shape))} values and should have "
            f"{header + math.prod(shape)} bytes, it has {len(contents)}; fetch it again"
        )
    # A copy, because torch requires writable memory.
    return file, torch.from_numpy(np.frombuffer(contents, np.uint8, offset=header).copy()).view(shape)


def _read_bytes(file: Path) -> bytes:
    try:
        if file.suffix == ".gz":
            with gzip.open(file) as stream:
                return stream.read()
        return file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"data.path: '{file}' cannot be read ({error}); fetch it again") from error


def cifar_batch(file: Path) -> tuple[Tensor, Tensor]:
    """Read one file of CIFAR-10's binary version: records of one label byte and 3 x 32 x 32 pixel bytes.

    Returns:
        Images uint8 (N, 3, 32, 32) and labels int64 (N,).

    Raises:
        UserError: if it is missing, empty, not made of whole records, or has a label above 9.
    """
    if not file.is_file():
        raise UserError(f"data.path: no file '{file.name}' in '{file.parent}' (the binary version of CIFAR-10)")
    contents = _read_bytes(file)
    record = 1 + 3 * 32 * 32
    if not contents or len(contents) % record:
        raise UserError(
            f"data.path: '{file}' should be made of records of {record} bytes, it has {len(contents)} bytes, "
            f"{len(contents) % record} more than {len(contents) // record} records; fetch it again"
        )
    records = torch.from_numpy(np.frombuffer(contents, np.uint8).copy()).view(-1, record)
    labels = records[:, 0].to(torch.int64)
    if labels.max() > 9:
        raise UserError(f"data.path: '{file}' should hold labels 0 to 9, it holds {int(labels.max())}")
    return records[:, 1:].reshape(-1, 3, 32, 32), labels

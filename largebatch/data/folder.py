"""Folders of photographs with one folder per class: ImageNet's layout and its usual preprocessing."""

from __future__ import annotations

import math
import os
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from largebatch.data.hashing import uniforms
from largebatch.data.images import normalize
from largebatch.data.photograph import pillow, read_image
from largebatch.data.sampler import SampleKeys
from largebatch.data.source import Batch, DataSection, Source, data_path
from largebatch.errors import UserError
from largebatch.section import NumSamples, Side, Width
from largebatch.task import Task

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_CROP_ATTEMPTS = 10
_NUM_DRAWS = 2 * _CROP_ATTEMPTS + 3  # two for the size in each attempt, two for the position, one for mirroring


def random_resized_box(width: int, height: int, draws: np.ndarray) -> tuple[int, int, int, int]:
    """Return the box of Inception's random training crop: 8 to 100 % of an image's area, aspect ratio 3/4 to 4/3.

    Up to ten sizes are drawn until one fits into the image; otherwise the box is the largest centred one with a permitted
    aspect ratio.

    Args:
        width: width of the image, pixels, >= 1.
        height: height of the image, pixels, >= 1.
        draws: uniform numbers in [0, 1), (22,): ten for the areas, ten for the aspect ratios, one each for left and top.

    Returns:
        (left, top, right, bottom), pixels, right and bottom exclusive.

    References:
        Szegedy et al., "Going deeper with convolutions", CVPR 2015; the retries as in torchvision's RandomResizedCrop.
    """
    areas = width * height * (0.08 + (1 - 0.08) * draws[:_CROP_ATTEMPTS])
    log_aspects = math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * draws[_CROP_ATTEMPTS : 2 * _CROP_ATTEMPTS]
    for area, log_aspect in zip(areas, log_aspects, strict=True):
        crop_width = round(math.sqrt(area * math.exp(log_aspect)))
        crop_height = round(math.sqrt(area / math.exp(log_aspect)))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(draws[-2] * (width - crop_width + 1))
            top = int(draws[-1] * (height - crop_height + 1))
            return left, top, left + crop_width, top + crop_height
    crop_width = min(width, max(1, round(height * 4 / 3)))
    crop_height = min(height, max(1, round(width * 4 / 3)))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def center_box(width: int, height: int, image_size: int) -> tuple[float, float, float, float]:
    """Return the box of the validation crop of an image.

    The usual protocol resizes the shorter side to 256/224 of the crop and cuts out the centre. In the original image this is
    a centred square of 224/256 of the shorter side, which can be resized to its final size in one step.

    Args:
        width: width of the image, pixels.
        height: height of the image, pixels.
        image_size: side of the crop, pixels, if the shorter side were resized to round(image_size * 256 / 224).

    Returns:
        (left, top, right, bottom), pixels, not necessarily integers.
    """
    side = min(width, height) * image_size / round(image_size * 256 / 224)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


@dataclass(frozen=True)
class FolderSamples:
    """Photographs on disk, which are decoded, cropped and resized when they are read.

    Args:
        root: folder that contains the files.
        files: paths relative to ``root``, one array of bytes: a million Python strings would be copied into every worker.
        labels: int64 (N,).
        image_size: side of the resulting square, pixels.
        augment: whether to crop and mirror at random.
        seed: seed of the augmentation.
    """

    root: Path
    files: np.ndarray
    labels: Tensor
    image_size: int
    augment: bool
    seed: int
    may_miss: ClassVar[bool] = True

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, keys: SampleKeys) -> Batch:
        """Return (images float32 (n, 3, s, s), labels int64 (n,)), and {row: why} if a file cannot be read (input zeros)."""
        images = torch.empty(len(keys), self.image_size, self.image_size, 3, dtype=torch.uint8)
        draws = uniforms(self.seed, keys.epochs, keys.indices, _NUM_DRAWS)
        missing: dict[int, str] = {}
        for row, index in enumerate(keys.indices):
            try:
                image = read_image(self.root / os.fsdecode(self.files[index]))
            except UserError as error:
                missing[row] = str(error)
                images[row] = 0
                continue
            if self.augment:
                box: tuple[float, ...] = random_resized_box(*image.size, draws[row, :-1])
            else:
                box = center_box(*image.size, self.image_size)
            pixels = np.array(self._resized(image, box))
            images[row] = torch.from_numpy(pixels[:, ::-1].copy() if self.augment and draws[row, -1] < 0.5 else pixels)
        chosen = torch.from_numpy(keys.indices)
        inputs = normalize(images.permute(0, 3, 1, 2).contiguous(), IMAGENET_MEAN, IMAGENET_STD)
        labels = self.labels.index_select(0, chosen)
        return (inputs, labels, missing) if missing else (inputs, labels)

    def _resized(self, image: Image, box: tuple[float, ...]) -> Image:
        size = (self.image_size, self.image_size)
        return image.resize(size, resample=pillow().Resampling.BILINEAR, box=box)  # type: ignore[arg-type]


def class_names(folder: Path) -> list[str]:
    """Return the names of the class folders in a folder, sorted.

    Raises:
        UserError: if it is missing or has no folders.
    """
    if not folder.is_dir():
        raise UserError(
            f"data.path: no folder '{folder.name}' in '{folder.parent}' (expected train/CLASS and val/CLASS)"
        )
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise UserError(f"data.path: '{folder}' has no folders, one for each class, with images in them")
    return names


def list_images(folder: Path, names: list[str], classes: list[str]) -> tuple[np.ndarray, Tensor, Counter[str]]:
    """List the images of some classes, including those in subfolders, in the order of torchvision's ImageFolder.

    Args:
        folder: folder that contains a folder for each name.
        names: the folders to list.
        classes: all classes; the index of a name in this list is its label.

    Returns:
        Paths relative to ``folder`` as bytes (N,), labels int64 (N,), and the number of entries with the name of an image that
        are left out, by kind.

    Raises:
        UserError: if a class has no image, or if a folder cannot be listed.
    """
    files: list[bytes] = []
    labels: list[int] = []
    left_out: Counter[str] = Counter()
    label_of = {name: label for label, name in enumerate(classes)}
    for name in names:
        try:
            found = [os.fsencode(f"{name}/{file}") for file in _images_below(folder / name, left_out)]
        except OSError as error:
            raise UserError(f"data.path: '{error.filename}' cannot be looked into ({error.strerror})") from error
        if not found:
            raise UserError(f"data.path: class folder '{folder / name}' has no images ({', '.join(SUFFIXES)})")
        files += found
        labels += [label_of[name]] * len(found)
    return np.array(files), torch.tensor(labels), left_out


def _images_below(folder: Path, left_out: Counter[str]) -> list[str]:
    """Return the paths of a class's images in its folder; count other entries with the name of an image in ``left_out``."""
    by_folder: dict[str, list[str]] = {}

    def visit(prefix: str, above: tuple[tuple[int, int], ...]) -> None:
        place = os.stat(folder / prefix)
        if (place.st_dev, place.st_ino) in above:  # a link to a parent folder
            return
        above = (*above, (place.st_dev, place.st_ino))
        images = by_folder[prefix] = []
        with os.scandir(folder / prefix) as entries:
            for entry in entries:
                is_named = entry.name.lower().endswith(SUFFIXES)
                is_folder = _is_folder(entry)
                if entry.name.startswith("."):
                    left_out["hidden file"] += is_named and not is_folder
                elif is_folder and not is_named:
                    visit(f"{prefix}{entry.name}/", above)
                elif is_named and is_folder:
                    left_out["folder"] += 1
                elif is_named and not _is_file(entry):
                    left_out["pipe, socket or device"] += 1  # reading it might block forever
                elif is_named:
                    images.append(entry.name)

    visit("", ())
    ordered = sorted(by_folder, key=lambda prefix: prefix[:-1])
    return [prefix + name for prefix in ordered for name in sorted(by_folder[prefix])]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # for example a link to itself
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a file; True also if this is unknown (a dangling link), which counts as a broken image."""
    try:
        return entry.is_file() or stat.S_ISREG(entry.stat().st_mode)
    except OSError:
        return True


def _say_left_out(root: Path, left_out: Counter[str]) -> str:
    counts = ", ".join(f"{number:,} x {kind}" for kind, number in sorted(left_out.items()) if number)
    return f"data.path: left out in '{root}', named like images but none to read: {counts}"


class ImageFolder(DataSection):
    """Photographs in path/train/CLASS/ and path/val/CLASS/, with the usual preprocessing for ImageNet."""

    name: Literal["image_folder"] = "image_folder"
    """The data set."""

    path: str
    """Folder that contains train and val."""

    image_size: Side = 224
    """Side of the images that the model sees, pixels."""

    augment: bool = True
    """Train on random crops of the photographs (8 to 100 % of the area), mirrored with probability 1/2."""

    corrupt: Literal["stop", "skip"] = "stop"
    """Handling of a photograph that cannot be read: stop saves the run and ends it with the file's name; skip omits the
    photograph from its update or evaluation, reports it once, and continues."""

    train_samples: NumSamples | None = None
    """Expected number of photographs in train; together with num_classes, it allows planning without the folder."""

    num_classes: Width | None = None
    """Expected number of classes in train."""

    def declared(self) -> tuple[int, Task] | None:
        """Return the expected number of training photographs and the task, if the config gives them; otherwise None."""
        if self.train_samples is None or self.num_classes is None:
            return None
        return self.train_samples, Task("classification", (3, self.image_size, self.image_size), self.num_classes)

    def load(self, seed: int) -> Source:
        """Return the photographs, which are only read when batches are requested.

        Raises:
            UserError: if a folder is missing or empty, a validation class is not among the training classes, the photographs or
                classes in train are not as many as expected, or Pillow is not installed.
        """
        pillow()
        root = data_path(self.path)
        classes = class_names(root / "train")
        val_classes = class_names(root / "val")
        for name in val_classes:
            if name not in classes:
                raise UserError(f"data.path: class '{name}' of '{root / 'val'}' is not among the classes in train")
        files, labels, left_out = list_images(root / "train", classes, classes)
        for key, expected, found in (
            ("num_classes", self.num_classes, len(classes)),
            ("train_samples", self.train_samples, len(files)),
        ):
            if expected is not None and expected != found:
                raise UserError(f"data.{key}: expected {expected} in '{root / 'train'}', found {found}")
        val_files, val_labels, more = list_images(root / "val", val_classes, classes)
        left_out.update(more)
        return Source(
            FolderSamples(root / "train", files, labels, self.image_size, self.augment, seed),
            FolderSamples(root / "val", val_files, val_labels, self.image_size, False, seed),
            Task("classification", (3, self.image_size, self.image_size), len(classes)),
            () if not left_out.total() else (_say_left_out(root, left_out),),
        )

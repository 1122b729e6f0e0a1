"""Data sets, and the selection of the samples of each update."""

from typing import TypeAlias, get_args

from largebatch.data.digest import changed_parts, digest
from largebatch.data.factory import FactoryData, MapSamples
from largebatch.data.folder import FolderSamples, ImageFolder
from largebatch.data.hashing import uniforms
from largebatch.data.images import ImageSamples, crop_flip
from largebatch.data.seeding import seed_generators
from largebatch.data.source import DataSection, Samples, Source, TensorSamples
from largebatch.data.synthetic import SyntheticImages
from largebatch.data.text import Text
from largebatch.data.vision import Cifar10, Digits, FashionMnist, Mnist

DataConfig: TypeAlias = Digits | FashionMnist | Mnist | Cifar10 | ImageFolder | Text | SyntheticImages | FactoryData
SOURCES: tuple[type[DataSection], ...] = get_args(DataConfig)

__all__ = [
    "SOURCES",
    "Cifar10",
    "DataConfig",
    "Digits",
    "FactoryData",
    "FashionMnist",
    "FolderSamples",
    "ImageFolder",
    "ImageSamples",
    "MapSamples",
    "Mnist",
    "Samples",
    "Source",
    "SyntheticImages",
    "TensorSamples",
    "Text",
    "changed_parts",
    "crop_flip",
    "digest",
    "seed_generators",
    "uniforms",
]

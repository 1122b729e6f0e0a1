"""A digest of a data set in a few kilobytes, which is compared between ranks, and with the digest in a checkpoint.

The digest of a set in memory covers the shapes and contents of its tensors; that of a folder the names of all files and their
labels, the sizes of `_NUM_SIZES` files and the contents of a few; that of any other set the samples at `_NUM_READ` indices.
Integers and bytes are hashed. Floating-point numbers are averaged, and the means are compared with a tolerance: another
processor may round differently, and another version of a library may decode a photograph slightly differently.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from largebatch.data.folder import FolderSamples
from largebatch.data.images import ImageSamples
from largebatch.data.loader import samples_twice
from largebatch.data.seeding import random_states_kept
from largebatch.data.source import Samples, Source, TensorSamples
from largebatch.data.synthetic import SyntheticSamples
from largebatch.data.text import TextSamples
from largebatch.data.workers import LoaderConfig
from largebatch.section import leaves
from largebatch.task import Task

# Data sets that are fully described by their fields; of any other set, samples are read.
_BY_FIELDS = (TensorSamples, ImageSamples, TextSamples, SyntheticSamples, FolderSamples)
_NUM_BLOCKS = 64  # number of evenly spaced blocks of a large tensor that are read
_BLOCK_BYTES = 2**20  # most bytes of each block
_NUM_SIZES, _CONTENT_BYTES = 1024, 2**22  # most files of a folder whose size is read; bytes of contents that are read
_NUM_READ, _READ_SECONDS = 16, 1.0
HASHED = "#"  # prefix of hashes, which are not shown to users
# Relative to the root mean square: for means over a block, and for means of a sample that was computed or decoded.
_TOLERANCE, _TOLERANCE_READ = 1e-5, 1e-3


def digest(source: Source, loader: LoaderConfig) -> dict[str, Any]:
    """Return the digest of a data set as JSON-serializable values; its parts are ``train.samples``, ``train.files`` and so on.

    Args:
        source: the data set.
        loader: the run's data loader options, with which samples are read.

    Raises:
        UserError: if a sample cannot be read.
    """
    task = source.task
    return {
        "task": {"kind": task.kind, "sample_shape": list(task.sample_shape), "num_outputs": task.num_outputs},
        "train": _digest_of(source.train, loader, task),
        "val": _digest_of(source.val, loader, task),
    }


def is_same(ours: Any, theirs: Any, part: str = "") -> bool:
    """Return whether two values of one part of a digest describe the same data.

    Args:
        ours: a JSON-serializable value.
        theirs: the value to compare with it.
        part: name of the part, which determines how floating-point numbers are compared.
    """
    if not (isinstance(ours, list) and isinstance(theirs, list)):
        return bool(ours == theirs)
    if part.endswith(".samples_read"):  # the number of samples depends on the time that reading took
        return all(map(is_same, ours, theirs))
    if not all(isinstance(value, float) for value in (*ours, *theirs)) or len(ours) != len(theirs):
        return len(ours) == len(theirs) and all(map(is_same, ours, theirs))
    tolerance = _TOLERANCE if part else _TOLERANCE_READ
    return all(
        _is_close(ours[first : first + 3], theirs[first : first + 3], tolerance) for first in range(0, len(ours), 3)
    )


def changed_parts(ours: Any, theirs: Any) -> list[str]:
    """Return the parts in which a digest differs from that of another run; parts that only one of them has are ignored."""
    if not (isinstance(ours, Mapping) and isinstance(theirs, Mapping)):
        return []
    there = dict(leaves(theirs))
    return [part for part, value in leaves(ours) if part in there and not is_same(value, there[part], part)]


def _is_close(ours: list[float], theirs: list[float], tolerance: float) -> bool:
    scale = tolerance * max(abs(ours[-1]), abs(theirs[-1]))
    return all(a == b or abs(a - b) <= scale for a, b in zip(ours, theirs, strict=True))


def _digest_of(samples: Samples, loader: LoaderConfig, task: Task) -> dict[str, Any]:
    found: dict[str, Any] = {"samples": len(samples)}
    if not isinstance(samples, _BY_FIELDS):
        return found | _shape_and_read(samples, loader, task)
    for field in fields(samples):
        value = getattr(samples, field.name)
        if isinstance(value, Tensor):
            found[field.name] = _digest_of_tensor(value)
        elif isinstance(value, np.ndarray):
            found[field.name] = {"shape": _shape(value), "bytes": _hashed(np.ascontiguousarray(value).view(np.uint8))}
        elif isinstance(value, bool | int | float | str):
            found[field.name] = value
    if isinstance(samples, TextSamples):  # the windows are a mapped file, not a field
        found["windows"] = _digest_of_tensor(samples.windows)
    return found | (_digest_of_files(samples) if isinstance(samples, FolderSamples) else {})


def _shape(values: Tensor | np.ndarray) -> str:
    return f"{str(values.dtype).removeprefix('torch.')} {list(values.shape)}"


def _hashed(*contents: Any) -> str:
    state = hashlib.blake2b(digest_size=16)
    for content in contents:
        state.update(content)
    return HASHED + state.hexdigest()


def _digest_of_tensor(values: Tensor) -> dict[str, Any]:
    """Return the shape, and a hash of integers or, for floating-point numbers, three means of each block."""
    rows = values.reshape(1) if values.ndim == 0 else values
    most = max(1, _BLOCK_BYTES // max(1, rows[:1].nbytes))
    starts = [len(rows) * block // _NUM_BLOCKS for block in range(_NUM_BLOCKS + 1)]
    blocks = [rows[low : min(high, low + most)] for low, high in pairwise(starts) if low < high]
    if values.is_floating_point():
        return {"shape": _shape(values), "values": [mean for block in blocks for mean in _means(block)]}
    contents = (_bytes(block) for block in blocks)
    return {"shape": _shape(values), "bytes": _hashed(*contents)}


def _bytes(values: Tensor) -> np.ndarray:
    # contiguous() would not do: it does not change the strides of a single row.
    return values.detach().cpu().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).numpy()


def _means(values: Tensor) -> list[float]:
    """Return the mean, the mean weighted by position, and the root mean square; values that are not finite count as 0."""
    flat = values.detach().cpu().double().flatten().nan_to_num(0.0, 0.0, 0.0)
    if not len(flat):
        return [0.0, 0.0, 0.0]
    by_place = flat @ torch.linspace(0.0, 1.0, len(flat), dtype=torch.float64) / len(flat)
    return [float(f"{float(mean):.9g}") for mean in (flat.mean(), by_place, flat.square().mean().sqrt())]


def _digest_of_files(samples: FolderSamples) -> dict[str, str]:
    """Return hashes of the sizes of evenly spaced files, and of the contents of a few of them."""
    places = _spread(len(samples.files), _NUM_SIZES)
    files = [samples.root / os.fsdecode(samples.files[place]) for place in places]
    sizes = [_size(file) for file in files]
    num_read = max(4, int(_CONTENT_BYTES / max(1.0, sum(sizes) / len(sizes))))
    contents = (_contents(files[index]) for index in _spread(len(files), num_read))
    return {"file_sizes": _hashed(np.array(sizes, dtype=np.int64)), "file_contents": _hashed(*contents)}


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # reported when the file is read for training
        return -1


def _contents(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            return stream.read(_CONTENT_BYTES)
    except OSError:
        return b""


def _spread(num: int, most: int) -> list[int]:
    """Return at most ``most`` evenly spaced numbers from 0 to num - 1, including the first and the last."""
    if num <= most:
        return list(range(num))
    return [index * (num - 1) // (most - 1) for index in range(most)]


def _shape_and_read(samples: Samples, loader: LoaderConfig, task: Task) -> dict[str, Any]:
    """Return digests of the samples at some indices; only their shapes if a sample differs each time it is read."""
    places = _spread(len(samples), _NUM_READ)
    places = places[::4] + places[2::4] + places[1::4] + places[3::4]  # evenly spread, even if reading ends early
    deadline = time.monotonic() + _READ_SECONDS
    shapes, is_repeatable = "", True
    read: list[list[Any]] = []
    with random_states_kept():
        for place, pair in samples_twice(samples, places, loader, task.check):
            shapes = shapes or ", ".join(_shape(both[0]) for both in pair)
            is_repeatable &= all(torch.equal(both[0].nan_to_num(), both[1].nan_to_num()) for both in pair)
            read.append([place, *(_digest_of_sample(both[0]) for both in pair)])
            if time.monotonic() > deadline:
                break
    found = {"shape": shapes} if len({str(sample[1][0]) for sample in read}) == 1 else {}
    return found | ({"samples_read": read} if is_repeatable else {})


def _digest_of_sample(sample: Tensor) -> list[Any]:
    if sample.is_floating_point():
        return [list(sample.shape), _means(sample)]
    return [list(sample.shape), _hashed(_bytes(sample))]


def describe(value: Any) -> str | None:
    """Return a part's value as text for a message; None for values that are not readable, such as hashes."""
    if isinstance(value, str) and value.startswith(HASHED):
        return None
    if isinstance(value, list) and any(isinstance(entry, float | list) and entry for entry in value):
        return None
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)

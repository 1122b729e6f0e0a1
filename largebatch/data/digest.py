"""What tells one data set from another in a few kilobytes: compared between ranks, and with the data of a checkpoint.

Of a set in memory: its tensors' shapes and contents. Of a folder: the names of all files and their labels, the sizes of
`_NUM_SIZES` of them and the contents of a few. Of any other set: the samples at `_NUM_READ` places. Whole numbers and bytes
enter hashes. Floating-point numbers enter means that are compared with a tolerance: another processor may have rounded them
otherwise, and another version of a library may decode a photograph with other last digits.
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

# Sets whose fields say all there is to say of them; other sets may keep anything in theirs, and are read.
_BY_FIELDS = (TensorSamples, ImageSamples, TextSamples, SyntheticSamples, FolderSamples)
_NUM_BLOCKS = 64  # evenly spaced parts that a large tensor is looked at in
_BLOCK_BYTES = 2**20  # of each of them
_NUM_SIZES, _CONTENT_BYTES = 1024, 2**22  # files of a folder whose size is asked for; bytes of them that are read
_NUM_READ, _READ_SECONDS = 16, 1.0
HASHED = "#"  # begins what means nothing to a reader
# Relative to the root of the mean square: rounding of a mean over a block, and of a sample that was computed or decoded.
_TOLERANCE, _TOLERANCE_READ = 1e-5, 1e-3


def digest(source: Source, loader: LoaderConfig) -> dict[str, Any]:
    """Return what tells a data set from another, as JSON holds it; its parts are ``train.samples``, ``train.files`` and so on.

    Args:
        source: the data set.
        loader: how it is read in the run.

    Raises:
        UserError: for a sample that cannot be read.
    """
    task = source.task
    return {
        "task": {"kind": task.kind, "sample_shape": list(task.sample_shape), "num_outputs": task.num_outputs},
        "train": _digest_of(source.train, loader, task),
        "val": _digest_of(source.val, loader, task),
    }


def is_same(ours: Any, theirs: Any, part: str = "") -> bool:
    """Return whether two values of one part say the same data.

    Args:
        ours: a value that JSON holds.
        theirs: another.
        part: its name, which says how floating-point numbers are compared.
    """
    if not (isinstance(ours, list) and isinstance(theirs, list)):
        return bool(ours == theirs)
    if part.endswith(".samples_read"):  # as many as there was time for
        return all(map(is_same, ours, theirs))
    if not all(isinstance(value, float) for value in (*ours, *theirs)) or len(ours) != len(theirs):
        return len(ours) == len(theirs) and all(map(is_same, ours, theirs))
    tolerance = _TOLERANCE if part else _TOLERANCE_READ
    return all(
        _is_close(ours[first : first + 3], theirs[first : first + 3], tolerance) for first in range(0, len(ours), 3)
    )


def changed_parts(ours: Any, theirs: Any) -> list[str]:
    """Return the parts in which a digest differs from one that another run wrote; parts that one lacks are left out."""
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
    if isinstance(samples, TextSamples):  # which are mapped, and no field
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
    """Return the shape, and a hash of whole numbers or three means of each block of others."""
    rows = values.reshape(1) if values.ndim == 0 else values
    most = max(1, _BLOCK_BYTES // max(1, rows[:1].nbytes))
    starts = [len(rows) * block // _NUM_BLOCKS for block in range(_NUM_BLOCKS + 1)]
    blocks = [rows[low : min(high, low + most)] for low, high in pairwise(starts) if low < high]
    if values.is_floating_point():
        return {"shape": _shape(values), "values": [mean for block in blocks for mean in _means(block)]}
    contents = (_bytes(block) for block in blocks)
    return {"shape": _shape(values), "bytes": _hashed(*contents)}


def _bytes(values: Tensor) -> np.ndarray:
    # Not contiguous(): it leaves the strides of a single row as they are.
    return values.detach().cpu().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).numpy()


def _means(values: Tensor) -> list[float]:
    """Return the mean, the mean weighted by place, and the root of the mean square, of what is finite."""
    flat = values.detach().cpu().double().flatten().nan_to_num(0.0, 0.0, 0.0)
    if not len(flat):
        return [0.0, 0.0, 0.0]
    by_place = flat @ torch.linspace(0.0, 1.0, len(flat), dtype=torch.float64) / len(flat)
    return [float(f"{float(mean):.9g}") for mean in (flat.mean(), by_place, flat.square().mean().sqrt())]


def _digest_of_files(samples: FolderSamples) -> dict[str, str]:
    """Return hashes of the sizes of evenly spaced files, and of the contents of as many as are read in no time."""
    places = _spread(len(samples.files), _NUM_SIZES)
    files = [samples.root / os.fsdecode(samples.files[place]) for place in places]
    sizes = [_size(file) for file in files]
    num_read = max(4, int(_CONTENT_BYTES / max(1.0, sum(sizes) / len(sizes))))
    contents = (_contents(files[index]) for index in _spread(len(files), num_read))
    return {"file_sizes": _hashed(np.array(sizes, dtype=np.int64)), "file_contents": _hashed(*contents)}


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # is told of when it is to be trained on
        return -1


def _contents(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            return stream.read(_CONTENT_BYTES)
    except OSError:
        return b""


def _spread(num: int, most: int) -> list[int]:
    """Return numbers from 0 to num - 1, evenly spaced, with the first and the last; all of them where they are few."""
    if num <= most:
        return list(range(num))
    return [index * (num - 1) // (most - 1) for index in range(most)]


def _shape_and_read(samples: Samples, loader: LoaderConfig, task: Task) -> dict[str, Any]:
    """Return what the samples at some places are; only their shapes where the same sample is another at each reading."""
    places = _spread(len(samples), _NUM_READ)
    places = places[::4] + places[2::4] + places[1::4] + places[3::4]  # spread out, wherever the time ends
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
    """Return a part's value for a message; None for what means nothing to a reader."""
    if isinstance(value, str) and value.startswith(HASHED):
        return None
    if isinstance(value, list) and any(isinstance(entry, float | list) and entry for entry in value):
        return None
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)

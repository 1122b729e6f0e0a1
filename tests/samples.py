"""Samples of a source, by number."""

from __future__ import annotations

import gzip

import numpy as np
import pytest

from largebatch.data.sampler import SampleKeys


def keys(indices, epoch=0) -> SampleKeys:
    indices = np.asarray(indices, dtype=np.int64)
    return SampleKeys(np.full(len(indices), epoch, dtype=np.int64), indices)


def batch(samples, indices, epoch=0):
    return samples.__getitems__(keys(indices, epoch))


def everything(samples):
    return batch(samples, range(len(samples)))


# IDX files


def write_idx(folder, name, array, packed=False):
    array = np.asarray(array, dtype=np.uint8)
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    contents = header + array.tobytes()
    (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(contents) if packed else contents)


@pytest.fixture(params=[False, True], ids=["plain", "gz"])
def mnist_folder(request, tmp_path):
    rng = np.random.default_rng(0)
    for prefix, num in (("train", 20), ("t10k", 7)):
        write_idx(tmp_path, f"{prefix}-images-idx3-ubyte", rng.integers(0, 256, (num, 28, 28)), request.param)
        write_idx(tmp_path, f"{prefix}-labels-idx1-ubyte", np.arange(num) % 10, request.param)
    return tmp_path

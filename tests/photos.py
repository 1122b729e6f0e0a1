"""Photographs to read."""

from __future__ import annotations

import numpy as np

from largebatch.data.sampler import SampleKeys


def keys(indices, epoch=0) -> SampleKeys:
    indices = np.asarray(indices, dtype=np.int64)
    return SampleKeys(np.full(len(indices), epoch, dtype=np.int64), indices)

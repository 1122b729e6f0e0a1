"""Counter-based random numbers, which depend only on (seed, epoch, index).

The numbers of a stateful generator depend on earlier draws. Here each number is a hash of its own coordinates, so a sample is
augmented in the same way in an epoch, whichever rank, worker or micro-batch it belongs to.
"""

from __future__ import annotations

import numpy as np

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio: splitmix64's step


def mix(words: np.ndarray) -> np.ndarray:
    """Mix 64-bit words: a bijection in which flipping any input bit flips about half of the output bits.

    Args:
        words: uint64, any shape.

    Returns:
        uint64 of the same shape.

    References:
        The finaliser of splitmix64: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014,
        with Stafford's constants (variant 13).
    """
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def sample_hashes(seed: int, epochs: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Return one 64-bit hash of (seed, epoch, index) for each sample.

    Args:
        seed: any int; taken modulo 2**64.
        epochs: int64 (n,).
        indices: int64 (n,).

    Returns:
        uint64 (n,).
    """
    # The three coordinates are mixed in one after another, so that different ones with the same sum do not collide.
    start = mix(np.array([(seed + _GOLDEN) & _MASK], dtype=np.uint64))
    with_epoch = mix((start ^ epochs.astype(np.uint64)) + np.uint64(_GOLDEN))
    return mix((with_epoch ^ indices.astype(np.uint64)) + np.uint64(_GOLDEN))


def uniforms(seed: int, epochs: np.ndarray, indices: np.ndarray, num: int) -> np.ndarray:
    """Return ``num`` uniform numbers for each sample, a pure function of (seed, epoch, index, column).

    Args:
        seed: seed of the run, any int.
        epochs: int64 (n,).
        indices: int64 (n,).
        num: numbers per sample, >= 0.

    Returns:
        float64 (n, num) in [0, 1), multiples of 2**-53.
    """
    columns = np.arange(1, num + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    words = mix(sample_hashes(seed, epochs, indices)[:, None] + columns)
    return (words >> np.uint64(11)) * 2.0**-53

"""Vectors at unit length, and sums that are the same in any order."""

from __future__ import annotations

import math

import numpy as np


def normalized(vectors: np.ndarray) -> np.ndarray:
    """Return the rows, float [n, d], at unit length; zero rows stay zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)


def joined(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Join both sides of each pair at equal length, as one unit vector.

    float32 [n, d] twice -> float32 [n, 2d].
    """
    both = [normalized(images), normalized(texts)]
    return np.concatenate(both, axis=1) * np.float32(math.sqrt(0.5))


def summable(values: np.ndarray, bits: int) -> np.ndarray:
    """Return float64 values as the nearest multiples of 2^-bits.

    Sums of such are exact, hence the same in any order and grouping, while none is beyond
    2^(53 - bits).
    """
    found = np.rint(np.ldexp(values, bits))
    return np.ldexp(found, -bits, out=found)

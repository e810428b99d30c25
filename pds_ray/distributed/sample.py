"""A sample of vectors that lies in the object stores of the cluster, in parts."""

from __future__ import annotations

import numpy as np
import ray

from pds_ray.distributed import tasks

Parts = tuple[ray.ObjectRef, ray.ObjectRef]
"""Training vectors and weights of some shards."""


def gathered(parts: list[Parts]) -> tuple[np.ndarray, np.ndarray]:
    """Return a sample as float32 [n, width] and weights [n]; holds one part at a time besides."""
    weights = [tasks.fetch(reference) for _, reference in parts]
    ends = np.cumsum([len(weight) for weight in weights])
    sample = np.empty((ends[-1], tasks.fetch(parts[0][0]).shape[1]), np.float32)
    for (reference, _), weight, end in zip(parts, weights, ends, strict=True):
        sample[end - len(weight) : end] = tasks.fetch(reference)
    return sample, np.concatenate(weights)

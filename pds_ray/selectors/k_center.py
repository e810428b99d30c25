"""K-center (Gonzalez, 1985; Sener and Savarese, 2018): pairs that leave no pair far from all of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pds_ray.config import SelectConfig
from pds_ray.selectors.base import Candidates

DESCRIPTION = "greedy k-center (Gonzalez, 1985; Sener and Savarese, 2018): each as far as can be from all before it"


def select(candidates: Candidates, pairs: int, seed: int, config: SelectConfig) -> Iterator[int]:  # noqa: ARG001
    """The first pick is drawn; each further one is the pair farthest from its nearest pick.

    The joint embeddings have length 1: far is where the dot product is small.
    """
    pick = int(np.random.default_rng(seed).integers(len(candidates)))
    nearest = np.full(len(candidates), -np.inf, np.float32)  # dot product with the nearest pick
    for _ in range(pairs):
        yield pick
        np.maximum(nearest, candidates.joint_dots(candidates.joint(pick)), out=nearest)
        nearest[candidates.sisters(pick)] = np.inf
        pick = int(nearest.argmin())

"""K-center (Gonzalez, 1985; Sener and Savarese, 2018): no pair is far from all picks.

Greedy, within twice the optimum (docs/methods.md, "Selectors").
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pds_ray.config import SelectConfig
from pds_ray.selectors.base import Candidates

DESCRIPTION = (
    "greedy k-center (Gonzalez, 1985; Sener and Savarese, 2018): "
    "each as far as can be from all before it"
)


def select(
    candidates: Candidates,
    pairs: int,
    seed: int,
    config: SelectConfig,  # noqa: ARG001
) -> Iterator[int]:
    """Yield a pair drawn at random, then each time the pair farthest from its nearest pick.

    The joint embeddings have length 1, |x - y|^2 = 2 - 2 x.y: far is where the dot product is
    small.
    """
    pick = int(np.random.default_rng(seed).integers(len(candidates)))
    nearest = np.full(len(candidates), -np.inf, np.float32)  # dot product with the nearest pick
    for _ in range(pairs):
        yield pick
        np.maximum(nearest, candidates.joint_dots(candidates.joint(pick)), out=nearest)
        nearest[candidates.same_image(pick)] = np.inf
        pick = int(nearest.argmin())

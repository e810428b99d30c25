"""CLIP score (Hessel et al., 2021): the pairs whose image and caption agree best.

The score is 2.5 max(cos, 0), which orders as the cosine does (docs/methods.md, "Selectors").
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pds_ray.config import SelectConfig
from pds_ray.selectors.base import Candidates

DESCRIPTION = "CLIP score (Hessel et al., 2021): the highest cosines between image and caption"


def select(
    candidates: Candidates,
    pairs: int,
    seed: int,  # noqa: ARG001
    config: SelectConfig,  # noqa: ARG001
) -> Iterator[int]:
    """Yield the `pairs` pairs of highest cosine, highest first."""
    order = np.argsort(-candidates.similarity, kind="stable")
    yield from candidates.one_per_image(order)[:pairs].tolist()

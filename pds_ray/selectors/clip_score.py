"""The pairs whose image and caption agree best by the encoder's cosine (the CLIP score of Hessel et al., 2021)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pds_ray.config import SelectConfig
from pds_ray.selectors.base import Candidates

DESCRIPTION = "CLIP score (Hessel et al., 2021): the highest cosines between image and caption"


def select(candidates: Candidates, pairs: int, seed: int, config: SelectConfig) -> Iterator[int]:  # noqa: ARG001
    """The `pairs` pairs of highest cosine, highest first."""
    order = np.argsort(-candidates.similarity, kind="stable")
    yield from candidates.one_per_image(order)[:pairs].tolist()

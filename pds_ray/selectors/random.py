"""Pairs drawn at random: each pair is as likely as any other to be the first of its image."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pds_ray.config import SelectConfig
from pds_ray.selectors.base import Candidates

DESCRIPTION = "random: pairs in random order, the first of each image"


def select(
    candidates: Candidates,
    pairs: int,
    seed: int,
    config: SelectConfig,  # noqa: ARG001
) -> Iterator[int]:
    """Yield the first `pairs` of a seeded permutation that show a new image."""
    order = np.random.default_rng(seed).permutation(len(candidates))
    yield from candidates.one_per_image(order)[:pairs].tolist()

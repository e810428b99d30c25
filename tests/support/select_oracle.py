"""Small random candidates, and the joint embeddings that selectors never build."""

from __future__ import annotations

import numpy as np

from pds_ray import catalog
from pds_ray.config import SelectConfig
from pds_ray.selectors.base import Candidates


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def make_candidates(images: int, seed: int, dim: int = 6, noise: float = 0.8) -> Candidates:
    """One to three captions an image, near it; the pairs of an image do not lie side by side."""
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(images, dim))
    owner = rng.permutation(np.repeat(np.arange(images), rng.integers(1, 4, size=images)))
    text = image[owner] + rng.normal(size=(len(owner), dim)) * noise
    image, text = unit(image), unit(text)
    return Candidates(image, text, owner.astype(np.int64), (image[owner] * text).sum(axis=1))


def joint(candidates: Candidates) -> np.ndarray:
    """The matrix that is never built. float64 [N, 2 d]."""
    both = [candidates.image[candidates.owner], candidates.text]
    return np.concatenate(both, axis=1).astype(np.float64) / np.sqrt(2)


def picks(
    method: str, candidates: Candidates, pairs: int, seed: int = 0, **config: object
) -> list[int]:
    return list(catalog.selector(method).select(candidates, pairs, seed, SelectConfig(**config)))

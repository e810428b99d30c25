"""The embedding space in plain numpy: exact nearest rows, and its two principal components."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pds_ray.stages.products import nearest_rows
from pds_ray.stages.vectors import normalized


@dataclass
class Top:
    """The best k rows so far for each of B queries, best first."""

    cosine: np.ndarray
    """float32 [B, k], -inf where there is none yet."""
    row: np.ndarray
    """int64 [B, k], counted over all rows seen; -1 where there is none yet."""
    seen: int = 0
    """Number of rows seen."""


def no_rows(queries: int, k: int) -> Top:
    """Return a `Top` that has seen no rows."""
    return Top(np.full((queries, k), -np.inf, np.float32), np.full((queries, k), -1, np.int64))


def add_rows(top: Top, queries: np.ndarray, rows: np.ndarray, chunk: int = 16_384) -> None:
    """Update `top` with more rows: queries float32 [B, d], rows float32 [n, d].

    Of equal cosines the earlier row wins, whatever the block sizes.
    """
    unit = normalized(queries)
    k = top.cosine.shape[1]
    for start in range(0, len(rows), chunk):
        similarity = unit @ normalized(rows[start : start + chunk]).T
        values, places = [top.cosine], [top.row]
        # k is small: k passes are cheaper than a sort, and stable
        for _ in range(min(k, similarity.shape[1])):
            best = similarity.argmax(axis=1)[:, None]
            values.append(np.take_along_axis(similarity, best, axis=1))
            places.append(best + (top.seen + start))
            np.put_along_axis(similarity, best, -np.inf, axis=1)
        cosine, row = np.concatenate(values, axis=1), np.concatenate(places, axis=1)
        order = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
        top.cosine = np.take_along_axis(cosine, order, axis=1)
        top.row = np.take_along_axis(row, order, axis=1)
    top.seen += len(rows)


def covered(sample: np.ndarray, prototypes: np.ndarray) -> tuple[float, float]:
    """Return how near a sample is to its nearest prototypes, float32 [n, d], [B, d].

    That is the mean of the highest cosines, and their 5th percentile.
    """
    cosine, _ = nearest_rows(sample, prototypes)
    return float(cosine.mean()), float(np.percentile(cosine, 5))


@dataclass(frozen=True)
class Plane:
    """The first two principal components of some unit vectors."""

    mean: np.ndarray
    """float64 [d]."""
    axes: np.ndarray
    """float64 [2, d], orthonormal."""
    explained: tuple[float, float]
    """The share of the variance along each axis."""

    def project(self, vectors: np.ndarray) -> np.ndarray:
        """Return vectors [n, d], scaled to unit length, on the plane: float64 [n, 2]."""
        return (normalized(vectors).astype(np.float64) - self.mean) @ self.axes.T


def fit_plane(vectors: np.ndarray) -> Plane:
    """Fit a PCA to vectors [n, d] scaled to unit length, n > 0 and d > 1.

    Signs are fixed, so that the map of one run never flips.
    """
    unit = normalized(vectors).astype(np.float64)
    mean = unit.mean(axis=0)
    values, directions = np.linalg.eigh((unit - mean).T @ (unit - mean))
    axes = directions[:, [-1, -2]].T
    axes *= np.sign(axes[np.arange(2), np.abs(axes).argmax(axis=1)])[:, None]
    total = max(float(values.sum()), np.finfo(np.float64).tiny)
    return Plane(
        mean, axes, (max(float(values[-1]), 0.0) / total, max(float(values[-2]), 0.0) / total)
    )


def sample_places(sizes: list[int], limit: int, seed: int) -> list[np.ndarray]:
    """Return a seeded sample of at most `limit` rows: its rows in each shard, ascending.

    `sizes` are the numbers of rows of the shards.
    """
    total = sum(sizes)
    chosen = np.sort(np.random.default_rng(seed).choice(total, min(limit, total), replace=False))
    bounds = np.cumsum([0, *sizes])
    parts = np.split(chosen, np.searchsorted(chosen, bounds[1:-1]))
    return [part - low for part, low in zip(parts, bounds, strict=False)]

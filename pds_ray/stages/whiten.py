"""Whitening: each modality with variance of about one along every axis (docs/methods.md, "whiten").

    W = (S + r tr(S)/d I)^(-1/2),   z_n = W (x_n - m) / |W (x_n - m)|

x_n is an embedding at unit length, m and S are mean and covariance over all kept pairs: an image
counts as often as it has kept captions. Sums are taken in float64 over shards and added in shard
order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pds_ray.stages.vectors import normalized


@dataclass
class Moments:
    """Sums over the unit vectors of one modality."""

    count: int
    total: np.ndarray
    """float64 [d]: their sum."""
    products: np.ndarray
    """float64 [d, d]: the sum of their outer products with themselves."""


def no_moments(dim: int) -> Moments:
    """Return the neutral element of `add_moments`."""
    return Moments(0, np.zeros(dim), np.zeros((dim, dim)))


def moments(vectors: np.ndarray, weights: np.ndarray) -> Moments:
    """Sum over vectors, float32 [n, d], each as often as its weight says, integers [n]."""
    used = np.flatnonzero(weights)
    unit, times = normalized(vectors[used].astype(np.float64)), weights[used].astype(np.float64)
    return Moments(int(weights.sum()), times @ unit, (unit * times[:, None]).T @ unit)


def add_moments(total: Moments, part: Moments) -> None:
    """Add the sums of a shard; called in shard order, so that rounding never differs."""
    total.count += part.count
    total.total += part.total
    total.products += part.products


@dataclass(frozen=True)
class Whitening:
    """The whitening of one modality."""

    mean: np.ndarray
    """float32 [d]."""
    matrix: np.ndarray
    """float32 [d, d], symmetric."""

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """Return embeddings, float32 [n, d], whitened and at unit length. float32 [n, d]."""
        return normalized((normalized(vectors) - self.mean) @ self.matrix).astype(np.float32)


def whitening(sums: Moments, ridge: float) -> Whitening:
    """Return the whitening of these sums, with `ridge` times the mean variance on every axis.

    The symmetric root does not depend on the choice of principal axes, which is free where
    variances are equal. Without any variance the matrix is that of the identity.
    """
    mean = sums.total / max(sums.count, 1)
    covariance = sums.products / max(sums.count, 1) - np.outer(mean, mean)
    variances, axes = np.linalg.eigh((covariance + covariance.T) / 2)
    variances = np.maximum(variances, 0)  # rounding may leave tiny negative ones
    added = ridge * variances.mean()
    scale = 1 / np.sqrt(variances + added) if added > 0 else np.ones_like(variances)
    return Whitening(mean.astype(np.float32), ((axes * scale) @ axes.T).astype(np.float32))

"""K-means with FAISS, once per modality, on raw un-normalised vectors (methods.md A.1, step 7).

An image counts as often as it has kept captions: by weight, not by copies. Small data is used whole; of large data a
seeded sample is used that fits the memory budget. Each shard's sample depends on (seed, shard) alone.

As ablations there is one k-means alone, of either modality or of both joined; every pair then has one label for both
its sides, and matching has nothing left to decide.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from pds_ray.artifacts import MODALITIES
from pds_ray.config import ClusterConfig, ConfigError

MIN_ROWS_PER_CLUSTER = 39  # what FAISS, too, takes for the least that a fit needs


@dataclass(frozen=True)
class Fit:
    """A fitted k-means."""

    centroids: np.ndarray
    """float32 [K, d], in the clustered space (unit vectors' means if `normalize`)."""
    objective: float
    """Weighted sum of squared distances of the training vectors to their centroids."""
    rows: int
    """Training vectors used."""


def spaces(config: ClusterConfig) -> tuple[str, ...]:
    """What is clustered: image and text, or one of image, text and joint; a pair's image label is the first's."""
    return MODALITIES if config.modality == "separate" else (config.modality,)


def joined(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Both sides of each pair at equal length, as one unit vector. float32 [n, d] twice -> float32 [n, 2d]."""
    return np.concatenate([normalized(images), normalized(texts)], axis=1) * np.float32(math.sqrt(0.5))


def sample_share(rows: int, dim: int, config: ClusterConfig, clusters: int) -> float:
    """Share of the rows that fits the memory budget (float32, FAISS keeps one copy besides ours).

    Raises ConfigError if a sample that fits is too small for that many clusters.
    """
    row_bytes = 2 * 4 * dim
    share = min(1.0, config.memory_gib * 2**30 / row_bytes / max(rows, 1))
    if share < 1 and share * rows < MIN_ROWS_PER_CLUSTER * clusters:
        needed = math.ceil(MIN_ROWS_PER_CLUSTER * clusters * row_bytes / 2**30)
        raise ConfigError(
            f"cluster.memory_gib is {config.memory_gib} and holds {share * rows:,.0f} of {rows:,} vectors, too few to "
            f"fit {clusters:,} clusters; raise it to {needed}"
        )
    return share


def sample_rows(rows: int, share: float, seed: int, shard: str) -> np.ndarray:
    """Indices of the rows of a shard that are in the sample, ascending."""
    if share >= 1:
        return np.arange(rows)
    digest = hashlib.sha256(f"{seed}/{shard}".encode()).digest()
    return np.flatnonzero(np.random.default_rng(list(digest[:16])).random(rows) < share)


def normalized(vectors: np.ndarray) -> np.ndarray:
    """Rows at unit length; zero rows stay zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)


def fit(vectors: np.ndarray, weights: np.ndarray, clusters: int, seed: int, config: ClusterConfig) -> Fit:
    """Weighted Lloyd k-means. vectors float32 [n, d], weights float32 [n]; on the GPU if FAISS has one.

    Raises ValueError if there are fewer vectors of positive weight than clusters.
    """
    import faiss

    if np.count_nonzero(weights) < clusters:
        raise ValueError(f"{np.count_nonzero(weights)} vectors cannot make {clusters} clusters")
    gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
    training = np.ascontiguousarray(normalized(vectors) if config.normalize else vectors, np.float32)
    weights = np.ascontiguousarray(weights, np.float32)
    best: Fit | None = None
    for restart in range(config.restarts):  # not FAISS's nredo: its objective leaves the weights out
        kmeans = faiss.Kmeans(
            vectors.shape[1],
            clusters,
            niter=config.iterations,
            seed=seed + 1 + restart,
            min_points_per_centroid=1,  # few points per cluster are normal here: no warning
            max_points_per_centroid=max(1, -(-len(vectors) // clusters)),  # the sample is ours: no second, silent one
            gpu=gpus > 0,
            # as good a start as k-means++ at a fraction of its cost
            init_method=faiss.ClusteringInitMethod_AFK_MC2,
        )
        kmeans.train(training, weights=weights)
        distances, _ = kmeans.assign(training)
        objective = float(weights.astype(np.float64) @ distances)
        if best is None or objective < best.objective:
            best = Fit(np.array(kmeans.centroids), objective, len(vectors))
    assert best is not None
    return best


def assign(vectors: np.ndarray, centroids: np.ndarray, normalize: bool) -> np.ndarray:
    """Nearest centroid of each row. float32 [n, d], [K, d] -> int32 [n]."""
    import faiss

    if not len(vectors):
        return np.zeros(0, np.int32)
    rows = normalized(vectors) if normalize else vectors
    _, labels = faiss.knn(np.ascontiguousarray(rows, np.float32), centroids, 1)
    return labels[:, 0].astype(np.int32)

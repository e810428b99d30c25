"""K-means with FAISS, once per modality, on raw un-normalised vectors (methods.md A.1, step 7).

An image counts as often as it has kept captions: by weight, not by copies. Small data is used whole; of large data a
seeded sample is used that fits the memory budget. Each shard's sample depends on (seed, shard) alone.

Above FLAT_LIMIT clusters the fit has two levels: a coarse k-means of about sqrt(K) cells, then one k-means inside each
cell, with clusters in proportion to its weight. A vector's label is then the nearest centroid of its nearest cell: the
same rule for the sample, when it is fitted, and for all pairs, when they are labelled.

As ablations there is one k-means alone, of either modality or of both joined; every pair then has one label for both
its sides, and matching has nothing left to decide.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from pds_ray.config import ClusterConfig, ConfigError

FLAT_LIMIT = 100_000  # clusters fitted at one level
# Clusters begun from `seeds`, and the rows a cluster that these are chosen among. Each choice reads all these rows, so
# the time is as SEED_ROWS * K^2 * d: on a core 5 s at 500 clusters of 768 dimensions, hence 80 s at 2,000.
SEED_LIMIT, SEED_ROWS = 2_000, 20
OBJECTIVE_ROWS = 16_384  # summed at once
MIN_ROWS_PER_CLUSTER = 39  # what FAISS, too, takes for the least that a fit needs


@dataclass(frozen=True)
class Fit:
    """A fitted k-means."""

    centroids: np.ndarray
    """float32 [K, d], in the space of the training vectors."""
    objective: float
    """Weighted sum of squared distances of the training vectors to their centroids."""
    rows: int
    """Training vectors used."""


def joined(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Both sides of each pair at equal length, as one unit vector. float32 [n, d] twice -> float32 [n, 2d]."""
    return np.concatenate([normalized(images), normalized(texts)], axis=1) * np.float32(
        math.sqrt(0.5)
    )


def sample_share(rows: int, dim: int, config: ClusterConfig, clusters: int) -> float:
    """Share of the rows that fits the memory budget: half of it is for the sample as float32, half for the fit.

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


def fit(
    vectors: np.ndarray, weights: np.ndarray, clusters: int, seed: int, config: ClusterConfig
) -> Fit:
    """Weighted Lloyd k-means. vectors float32 [n, d], weights float32 [n]; on the GPU if FAISS has one.

    The vectors are taken as they are, `normalize` or not, and not copied. Raises ValueError if there are fewer vectors
    of positive weight than clusters.
    """
    if np.count_nonzero(weights) < clusters:
        raise ValueError(f"{np.count_nonzero(weights)} vectors cannot make {clusters} clusters")
    training = np.ascontiguousarray(vectors, np.float32)
    weights = np.ascontiguousarray(weights, np.float32)
    best: Fit | None = None
    for restart in range(
        config.restarts
    ):  # not FAISS's nredo: its objective leaves the weights out
        rng = np.random.default_rng([seed, restart])
        start = seeds(training, weights, clusters, rng) if clusters <= SEED_LIMIT else None
        fitted = lloyd(training, weights, clusters, start, seed + 1 + restart, config)
        if best is None or fitted.objective < best.objective:
            best = fitted
    assert best is not None
    return best


def lloyd(
    vectors: np.ndarray,
    weights: np.ndarray,
    clusters: int,
    start: np.ndarray | None,
    seed: int,
    config: ClusterConfig,
) -> Fit:
    """One fit from `start`, float32 [clusters, d], or else from what FAISS draws. The rest as of `fit`, contiguous."""
    import faiss

    gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
    kmeans = faiss.Kmeans(
        vectors.shape[1],
        clusters,
        niter=config.iterations,
        seed=seed,
        min_points_per_centroid=1,  # few points per cluster are normal here: no warning
        max_points_per_centroid=max(
            1, -(-len(vectors) // clusters)
        ),  # the sample is ours: no second, silent one
        gpu=gpus > 0,
        # FAISS's objective leaves the weights out: where they differ it may rest while theirs still falls
        early_stop_threshold=config.tolerance if (weights == weights[0]).all() else 0,
        init_method=faiss.ClusteringInitMethod_AFK_MC2,  # like k-means++, at a fraction of its cost
    )
    kmeans.train(vectors, weights=weights, init_centroids=start)
    _, labels = kmeans.assign(vectors)
    centroids = np.array(kmeans.centroids)
    return Fit(centroids, _objective(vectors, weights, centroids, labels), len(vectors))


def seeds(
    vectors: np.ndarray, weights: np.ndarray, clusters: int, rng: np.random.Generator
) -> np.ndarray:
    """Rows to begin a k-means from, by greedy k-means++. float32 [n, d], float32 [n] -> float32 [clusters, d].

    Each is the one of 2 + log(clusters) candidates, drawn by weight times squared distance to the seeds so far, that
    lowers their weighted sum most. Of many rows a sample is used, a uniform one, as weights count in it all the same.
    Rows repeat where too few are distinct by 2^-25 of the longest; those of weight 0 are never taken. At least one
    must be positive.
    """
    rows = np.flatnonzero(weights)
    if len(rows) > SEED_ROWS * clusters:
        rows = rng.choice(rows, SEED_ROWS * clusters, replace=False)
    weight = weights[rows].astype(np.float64)
    points = _whole(vectors[rows])
    squares = np.einsum("nd,nd->n", points, points)

    def nearer(candidates: np.ndarray, nearest: np.ndarray | float) -> np.ndarray:
        """Squared distances to the nearest seed if a candidate were one. float64 [candidates, n]."""
        apart = points[candidates] @ points.T
        apart *= -2
        apart += squares
        apart += squares[candidates, None]
        return np.minimum(apart, nearest, out=apart)

    chosen = [int(rng.choice(len(rows), p=weight / weight.sum()))]
    nearest = nearer(np.array(chosen), np.inf)[0]
    while len(chosen) < clusters:
        mass = np.cumsum(weight * nearest)
        drawn = np.searchsorted(
            mass, rng.random(2 + int(math.log(clusters))) * mass[-1], side="right"
        )
        candidates = np.minimum(
            drawn, len(rows) - 1
        )  # beyond the last if all that is left are copies of seeds
        apart = nearer(candidates, nearest)
        best = np.einsum("cn,n->c", apart, weight).argmin()
        chosen.append(int(candidates[best]))
        nearest = apart[best]
    return vectors[rows[chosen]]


def _whole(vectors: np.ndarray) -> np.ndarray:
    """Vectors about their mean, scaled to a norm of 2^25 at most and rounded. float32 [n, d] -> float64 [n, d].

    Squared distances of whole numbers below 2^53 are exact, in whatever order the threads of a matrix product add.
    """
    points = vectors.astype(np.float64)
    points -= points.mean(axis=0)
    longest = math.sqrt(np.einsum("nd,nd->n", points, points).max())
    points *= 2**25 / longest if longest else 0
    return np.rint(points, out=points)


def _objective(
    vectors: np.ndarray, weights: np.ndarray, centroids: np.ndarray, labels: np.ndarray
) -> float:
    """Weighted sum of squared distances. Not from FAISS's distances: their last bits depend on the threads."""
    total = 0.0
    for start in range(0, len(vectors), OBJECTIVE_ROWS):
        some = slice(start, start + OBJECTIVE_ROWS)
        apart = vectors[some].astype(np.float64) - centroids[labels[some]]
        total += float((np.einsum("nd,nd->n", apart, apart) * weights[some]).sum())
    return total


@dataclass(frozen=True)
class Cells:
    """The coarse level of a two-level fit."""

    coarse: np.ndarray
    """float32 [C, d]: the centroid of each cell."""
    starts: np.ndarray
    """int64 [C + 1]: cell c holds the clusters starts[c] to starts[c + 1], at least one."""


def fit_cells(
    vectors: np.ndarray, weights: np.ndarray, clusters: int, seed: int, config: ClusterConfig
) -> tuple[Cells, np.ndarray]:
    """The coarse level, and the cell of each training vector, int32 [n]. Arguments as of `fit`, weights positive.

    A cell that no training vector is nearest to is left out.
    """
    if len(vectors) < clusters:
        raise ValueError(f"{len(vectors)} vectors cannot make {clusters} clusters")
    coarse = fit(vectors, weights, round(math.sqrt(clusters)), seed, config).centroids
    filled, cell_of = np.unique(assign(vectors, coarse), return_inverse=True)
    allotted = allot(clusters, np.bincount(cell_of, weights), np.bincount(cell_of))
    return Cells(coarse[filled], np.concatenate([[0], np.cumsum(allotted)])), cell_of.astype(
        np.int32
    )


def allot(clusters: int, weights: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Clusters of each cell, in proportion to its weight by largest remainders, but from 1 to its rows. int64 [C].

    float64 [C], int64 [C], both positive; C <= clusters <= sum of the rows.
    """

    def shares(scale: float) -> np.ndarray:
        return np.clip(scale * weights, 1, rows)

    low, high = (
        0.0,
        2 * float((rows / weights).max()),
    )  # from where each cell has 1 to where it has all it can take
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if shares(middle).sum() <= clusters else (low, middle)
    share = shares(low)
    allotted = np.floor(share).astype(np.int64)
    remainder = np.where(allotted < rows, share - allotted, -1.0)
    order = np.argsort(-remainder, kind="stable")
    allotted[order[: clusters - int(allotted.sum())]] += 1
    return allotted


def assign(vectors: np.ndarray, centroids: np.ndarray, cells: Cells | None = None) -> np.ndarray:
    """Nearest centroid of each row, if there are cells of those in its nearest one.

    float32 [n, d], [K, d] -> int32 [n].
    """
    import faiss

    if not len(vectors):
        return np.zeros(0, np.int32)
    if cells is not None:
        labels = np.empty(len(vectors), np.int32)
        cell_of = assign(vectors, cells.coarse)
        for cell in np.unique(cell_of):
            mine = np.flatnonzero(cell_of == cell)
            start, end = cells.starts[cell], cells.starts[cell + 1]
            labels[mine] = start + assign(vectors[mine], centroids[start:end])
        return labels
    _, found = faiss.knn(np.ascontiguousarray(vectors, np.float32), centroids, 1)
    return found[:, 0].astype(np.int32)

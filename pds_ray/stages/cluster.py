"""K-means, once per modality, on raw un-normalised vectors (docs/methods.md, "cluster").

    images:    minimise  sum over images m    w_m |v_m - c_a(m)|^2,  w_m = kept captions of image m
    captions:  minimise  sum over kept pairs n    |t_n - c'_b(n)|^2

An image counts as often as it has kept captions: by weight, not by copies. Small data is used
whole; of large data a seeded sample is used that fits the memory budget. Each shard's sample
depends on (seed, shard) alone.

Fits are FAISS's here, on one node; `lloyd` has those over all nodes.

As ablations there is one k-means alone, of either modality or of both joined; every pair then has
one label for both its sides, and matching has nothing left to decide.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pds_ray.config import ClusterConfig, ConfigError

# Most clusters that begin from `seeds`, and the rows per cluster that these are chosen among. Each
# choice reads all these rows, so the time grows as SEED_ROWS * K^2 * d: on a core 5 s at 500
# clusters of 768 dimensions, hence 80 s at 2,000.
SEED_LIMIT, SEED_ROWS = 2_000, 20
OBJECTIVE_ROWS = 16_384  # summed at once
MIN_ROWS_PER_CLUSTER = 39  # the least that a fit needs, by FAISS's own rule
COUNT_S = 0.5  # between two looks at how far a fit is
FAISS_ADVICE = "pip install 'pds-ray[cpu]', or 'pds-ray[gpu]' for k-means on GPUs"

Tell = Callable[[str, int], object]


def require_faiss() -> None:
    """Raise ConfigError if FAISS is not installed: one of two extras brings it, not the base."""
    if importlib.util.find_spec("faiss") is None:
        raise ConfigError(f"k-means needs FAISS, which is not installed: {FAISS_ADVICE}")


@dataclass(frozen=True)
class Fit:
    """A fitted k-means."""

    centroids: np.ndarray
    """float32 [K, d], in the space of the training vectors."""
    objective: float
    """Weighted sum of squared distances of the training vectors to their centroids."""
    rows: int
    """Training vectors used."""
    distinct: int = 0
    """Different ones among them; no more are counted than clusters."""


def sample_share(rows: int, dim: int, config: ClusterConfig, clusters: int) -> float:
    """Return the share of the rows that fits the memory budget.

    Half of the budget is for the sample as float32, half for the fit: rows * dim * 8 bytes. Raises
    ConfigError if a sample that fits is too small for that many clusters.
    """
    row_bytes = 2 * 4 * dim
    share = min(1.0, config.memory_gib * 2**30 / row_bytes / max(rows, 1))
    if share < 1 and share * rows < MIN_ROWS_PER_CLUSTER * clusters:
        needed = math.ceil(MIN_ROWS_PER_CLUSTER * clusters * row_bytes / 2**30)
        raise ConfigError(
            f"cluster.memory_gib is {config.memory_gib} and holds {share * rows:,.0f} of {rows:,} "
            f"vectors, too few to fit {clusters:,} clusters; raise it to {needed}"
        )
    return share


def sample_rows(rows: int, share: float, seed: int, shard: str) -> np.ndarray:
    """Return the rows of a shard that are in the sample, ascending. int64 [m]."""
    if share >= 1:
        return np.arange(rows)
    digest = hashlib.sha256(f"{seed}/{shard}".encode()).digest()
    return np.flatnonzero(np.random.default_rng(list(digest[:16])).random(rows) < share)


def fit(
    vectors: np.ndarray,
    weights: np.ndarray,
    clusters: int,
    seed: int,
    config: ClusterConfig,
    tell: Tell = lambda _what, _iterations: None,
) -> Fit:
    """Fit a weighted Lloyd k-means, on the GPU if FAISS has one; keep the best restart.

    vectors float32 [n, d], weights float32 [n]. The vectors are taken as they are, `normalize` or
    not, and not copied. `tell` is called, in another thread, too, with what is waited for and the
    iterations done so far. Raises ValueError if there are fewer vectors of positive weight than
    clusters.
    """
    if np.count_nonzero(weights) < clusters:
        raise ValueError(f"{np.count_nonzero(weights)} vectors cannot make {clusters} clusters")
    training = np.ascontiguousarray(vectors, np.float32)
    weights = np.ascontiguousarray(weights, np.float32)

    def attempt(restart: int) -> Fit:
        before = restart * config.iterations
        tell(f"{clusters:,} seeds to be chosen", before)
        rng = np.random.default_rng([seed, restart])
        start = seeds(training, weights, clusters, rng) if clusters <= SEED_LIMIT else None

        def iterated(iterations: int) -> None:
            tell(f"{clusters:,} clusters to be fitted", before + iterations)

        return lloyd(training, weights, clusters, start, seed + 1 + restart, config, iterated)

    # not FAISS's nredo: its objective leaves the weights out
    best = min(map(attempt, range(config.restarts)), key=lambda fitted: fitted.objective)
    weighted = (training[row] for row in np.flatnonzero(weights))
    return replace(best, distinct=count_distinct(weighted, clusters))


def count_distinct(rows: Iterable[np.ndarray], most: int) -> int:
    """Count the different rows, [d] each, up to `most`: soon, in real data."""
    seen: set[bytes] = set()
    for row in rows:
        values = (row + 0.0).tobytes()  # -0.0 has become 0.0, which it equals
        seen.add(hashlib.blake2b(values, digest_size=16).digest())
        if len(seen) == most:
            break
    return len(seen)


def lloyd(
    vectors: np.ndarray,
    weights: np.ndarray,
    clusters: int,
    start: np.ndarray | None,
    seed: int,
    config: ClusterConfig,
    iterated: Callable[[int], object] = lambda _iterations: None,
) -> Fit:
    """Fit once from `start`, float32 [clusters, d], or else from seeds that FAISS draws.

    `iterated` is called, in another thread, with the iterations done so far. The other arguments
    are those of `fit`, contiguous.
    """
    import faiss

    gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
    kmeans = faiss.Kmeans(
        vectors.shape[1],
        clusters,
        niter=config.iterations,
        seed=seed,
        min_points_per_centroid=1,  # few points per cluster are normal here: no warning
        # the sample is ours: no second, silent one
        max_points_per_centroid=max(1, -(-len(vectors) // clusters)),
        gpu=gpus > 0,
        # FAISS's objective leaves the weights out: it may rest while the weighted one still falls
        early_stop_threshold=config.tolerance if (weights == weights[0]).all() else 0,
        init_method=faiss.ClusteringInitMethod_AFK_MC2,  # like k-means++, at a fraction of its cost
    )
    # as Kmeans.train does, which keeps to itself how far it is
    clustering = faiss.Clustering(vectors.shape[1], clusters, kmeans.cp)
    if start is not None:
        faiss.copy_array_to_vector(start.ravel(), clustering.centroids)
    with _counted(clustering.iteration_stats, config.iterations, iterated):
        clustering.train(vectors, kmeans.index, weights)
    centroids = faiss.vector_float_to_array(clustering.centroids).reshape(clusters, -1)
    kmeans.centroids = centroids
    _, labels = kmeans.assign(vectors)
    return Fit(centroids, _objective(vectors, weights, centroids, labels), len(vectors))


@contextmanager
def _counted(stats: Any, most: int, iterated: Callable[[int], object]) -> Iterator[None]:
    """Tell the length of FAISS's list of iterations now and then while the block fills it."""
    ended = threading.Event()

    def count() -> None:
        while not ended.wait(COUNT_S):
            iterated(min(stats.size(), most))  # FAISS may be moving the list just now

    counter = threading.Thread(target=count, daemon=True)
    counter.start()
    try:
        yield
    finally:
        ended.set()
        counter.join()


def seeds(
    vectors: np.ndarray, weights: np.ndarray, clusters: int, rng: np.random.Generator
) -> np.ndarray:
    """Choose rows to begin a k-means from, by greedy k-means++ (Arthur and Vassilvitskii, 2007).

    float32 [n, d], float32 [n] -> float32 [clusters, d]. Each seed is the one of 2 + log(clusters)
    candidates, drawn by weight times squared distance to the seeds so far, that lowers their
    weighted sum most. Of many rows a sample is used, a uniform one, as weights count in it all the
    same. Rows repeat where too few are distinct by 2^-25 of the longest; those of weight 0 are
    never taken. At least one must be positive.
    """
    # ours, as from FAISS's own k-means++ the objective is worse by more than 0.1 %: by 0.2 to 0.4 %
    # on the demo, by 12 % on clustered data, for the same CPU time (docs/methods.md, "cluster")
    rows = np.flatnonzero(weights)
    rows = rows[seed_rows(len(rows), clusters, rng)]
    return seeds_among(vectors[rows], weights[rows], clusters, rng)


def seed_rows(rows: int, clusters: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the rows that seeds are chosen among, int64 [m]: all, or SEED_ROWS per cluster."""
    most = SEED_ROWS * clusters
    return rng.choice(rows, most, replace=False) if rows > most else np.arange(rows)


def seeds_among(
    vectors: np.ndarray, weights: np.ndarray, clusters: int, rng: np.random.Generator
) -> np.ndarray:
    """Choose `seeds` among all rows, of positive weights."""
    weight = weights.astype(np.float64)
    points = _whole(vectors)
    squares = np.einsum("nd,nd->n", points, points)

    def nearer(candidates: np.ndarray, nearest: np.ndarray | float) -> np.ndarray:
        """Return squared distances to the nearest seed if a candidate were one.

        float64 [candidates, n].
        """
        apart = points[candidates] @ points.T
        apart *= -2
        apart += squares
        apart += squares[candidates, None]
        return np.minimum(apart, nearest, out=apart)

    chosen = [int(rng.choice(len(points), p=weight / weight.sum()))]
    nearest = nearer(np.array(chosen), np.inf)[0]
    while len(chosen) < clusters:
        mass = np.cumsum(weight * nearest)
        places = rng.random(2 + int(math.log(clusters))) * mass[-1]
        drawn = np.searchsorted(mass, places, side="right")
        # beyond the last row if only copies of seeds are left
        candidates = np.minimum(drawn, len(points) - 1)
        apart = nearer(candidates, nearest)
        best = np.einsum("cn,n->c", apart, weight).argmin()
        chosen.append(int(candidates[best]))
        nearest = apart[best]
    return vectors[chosen]


def _whole(vectors: np.ndarray) -> np.ndarray:
    """Centre vectors on their mean, scale them to a norm of at most 2^25 and round them.

    float32 [n, d] -> float64 [n, d]. Squared distances of whole numbers below 2^53 are exact, in
    whatever order the threads of a matrix product add.
    """
    points = vectors.astype(np.float64)
    points -= points.mean(axis=0)
    longest = math.sqrt(np.einsum("nd,nd->n", points, points).max())
    points *= 2**25 / longest if longest else 0
    return np.rint(points, out=points)


def _objective(
    vectors: np.ndarray, weights: np.ndarray, centroids: np.ndarray, labels: np.ndarray
) -> float:
    """Return the weighted sum of squared distances.

    Not from FAISS's distances: their last bits depend on the threads.
    """
    total = 0.0
    for start in range(0, len(vectors), OBJECTIVE_ROWS):
        some = slice(start, start + OBJECTIVE_ROWS)
        apart = vectors[some].astype(np.float64) - centroids[labels[some]]
        total += float((np.einsum("nd,nd->n", apart, apart) * weights[some]).sum())
    return total

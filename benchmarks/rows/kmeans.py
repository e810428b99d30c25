"""Row 1: k-means at the size of Flickr30K."""

from __future__ import annotations

import time

import numpy as np

from benchmarks.data import Concepts
from benchmarks.measure import BASELINE, OURS, Check, Found, Row, Runs, Task, at_least

DIM = 768
SLACK = 1e-3  # of the objective


def _size(task: Task) -> tuple[int, int]:
    """Return the numbers of vectors and clusters."""
    return (1_000, 10) if task.quick else (145_000, 500)


def prepare(task: Task) -> Found:
    concepts = Concepts(DIM, seed=0)
    np.save(task.data / "vectors.npy", concepts.vectors(concepts.draw(_size(task)[0])))
    return {}


def theirs(task: Task) -> Found:
    from benchmarks.baselines.pds import cluster

    vectors = np.load(task.data / "vectors.npy")
    began = time.perf_counter()
    centroids, _ = cluster(vectors, _size(task)[1])
    seconds = time.perf_counter() - began
    np.save(task.out / "centroids.npy", centroids)
    return {"seconds": seconds}


def ours(task: Task) -> Found:
    from pds_ray.config import ClusterConfig
    from pds_ray.stages.cluster import fit

    vectors = np.load(task.data / "vectors.npy")
    began = time.perf_counter()
    fitted = fit(vectors, np.ones(len(vectors), np.float32), _size(task)[1], 0, ClusterConfig())
    seconds = time.perf_counter() - began
    np.save(task.out / "centroids.npy", fitted.centroids)
    return {"seconds": seconds}


def after(task: Task) -> Found:
    """Return the mean squared distance of all vectors to their nearest centroid, for both sides."""
    from pds_ray.stages.products import assign

    vectors = np.load(task.data / "vectors.npy")
    found = {}
    for side in (BASELINE, OURS):
        centroids = np.load(task.out / f"{side}-0" / "centroids.npy").astype(np.float32)
        labels = assign(vectors, centroids)
        found[side] = float(
            np.square(vectors - centroids[labels]).sum(axis=1, dtype=np.float64).mean()
        )
    return found


def checks(runs: Runs, afterwards: Found) -> list[Check]:
    ratio = afterwards[OURS] / afterwards[BASELINE]
    objective = Check(
        f"objective no worse, within {SLACK:.1%}", f"{ratio:.4f} of theirs", ratio <= 1 + SLACK
    )
    return [at_least(runs, 30), objective]


ROW = Row(
    1,
    "k-means, 145,000 x 768, K = 500",
    "scikit-learn MiniBatchKMeans(batch_size=10000, n_init=20)",
    {BASELINE: theirs, OURS: ours},
    checks,
    prepare,
    after,
    "The fit alone, vectors in memory; the objective of both over all vectors, by one function.",
)

"""Row 12: labels and nearest rows, exactly, for 1,000 to 100,000 clusters."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from benchmarks.data import Concepts
from benchmarks.measure import BASELINE, OURS, Check, Found, Row, Runs, Task, at_least, factor

DIM = 768
TARGET, AIMED_AT = 5, 10_000
AVERAGED = 4  # vectors of a concept that make a centroid
NEAR = 1e-6  # cosines, and squared distances by their size, that float32 products confuse

Search = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _sizes(task: Task) -> dict[int, int]:
    """Return the numbers of clusters, and for each that of the vectors labelled or searched."""
    return {100: 400, 300: 200} if task.quick else {1_000: 10_000, 10_000: 10_000, 100_000: 4_000}


def prepare(task: Task) -> Found:
    concepts, sizes = Concepts(DIM, seed=0), _sizes(task)
    np.save(task.data / "rows.npy", concepts.vectors(concepts.draw(max(sizes.values()))))
    drawn = concepts.draw(max(sizes))
    centroids = sum(concepts.vectors(drawn) / AVERAGED for _ in range(AVERAGED))
    np.save(task.data / "centroids.npy", centroids)
    return {}


def _side(task: Task, labels: Search, nearest: Search) -> Found:
    rows, centroids = (np.load(task.data / f"{name}.npy") for name in ("rows", "centroids"))
    labels(rows[:100], centroids[:100])  # libraries start
    nearest(centroids[:100], rows[:100])
    found: Found = {}
    for clusters, count in _sizes(task).items():
        for name, search, pair in (
            ("labels", labels, (rows[:count], centroids[:clusters])),
            ("nearest", nearest, (centroids[:clusters], rows[:count])),
        ):
            began = time.perf_counter()
            answer = search(*pair)
            found[f"{name}_{clusters}"] = time.perf_counter() - began
            np.save(task.out / f"{name}_{clusters}.npy", answer)
    return {"seconds": sum(found.values()), **found}


def theirs(task: Task) -> Found:
    import faiss

    def nearest(queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        unit_queries, unit_rows = queries.copy(), rows.copy()
        faiss.normalize_L2(unit_queries)
        faiss.normalize_L2(unit_rows)
        index = faiss.IndexFlatIP(DIM)
        index.add(unit_rows)
        return index.search(unit_queries, 1)[1][:, 0]

    return _side(task, lambda rows, centroids: faiss.knn(rows, centroids, 1)[1][:, 0], nearest)


def ours(task: Task) -> Found:
    from pds_ray.stages import products

    return _side(
        task, products.assign, lambda queries, rows: products.nearest_rows(queries, rows)[1]
    )


def after(task: Task) -> Found:
    """Count the answers of both sides that differ, and those of ours that are further."""
    rows, centroids = (
        np.load(task.data / f"{name}.npy").astype(np.float64) for name in ("rows", "centroids")
    )
    differ = worse = asked = 0
    for name in _names(task):
        answers = [np.load(task.out / f"{side}-0" / f"{name}.npy") for side in (BASELINE, OURS)]
        other = np.flatnonzero(answers[0] != answers[1])
        asked, differ = asked + len(answers[0]), differ + len(other)
        if name.startswith("labels"):
            far = [np.square(rows[other] - centroids[found[other]]).sum(1) for found in answers]
        else:
            unit = [each / np.linalg.norm(each, axis=1)[:, None] for each in (rows, centroids)]
            far = [-(unit[1][other] * unit[0][found[other]]).sum(1) for found in answers]
        worse += int((far[1] > far[0] + NEAR).sum())
    return {"asked": asked, "differ": differ, "worse": worse}


def _names(task: Task) -> list[str]:
    return [f"{name}_{clusters}" for clusters in _sizes(task) for name in ("labels", "nearest")]


def checks(runs: Runs, after: Found) -> list[Check]:
    found = []
    for name in (key for key in runs[OURS][0] if key.startswith(("labels_", "nearest_"))):
        kind, clusters = name.split("_")
        what = f"{kind}, {int(clusters):,} clusters"
        if int(clusters) == AIMED_AT:
            check = at_least(runs, TARGET, f"faster: {what}", name)
        else:
            check = Check(what, f"{factor(runs, name=name):.2f}x", None)
        found.append(check)
    same = f"{after['differ']:,} of {after['asked']:,} differ, {after['worse']} of them further"
    return [*found, Check("the same answers but for ties", same, after["worse"] == 0)]


ROW = Row(
    12,
    f"labels and nearest rows among 1,000 to 100,000 clusters, {DIM} dimensions, one shard",
    "FAISS, all products in float32: faiss.knn for labels, IndexFlatIP for nearest rows",
    {BASELINE: theirs, OURS: ours},
    checks,
    prepare,
    after,
    notes="Vectors in memory; unit length and rounding count. 4,000 vectors at 100,000 clusters.",
)

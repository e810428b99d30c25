"""A k-means over all nodes: tasks label and sum parts of the sample, others add the sums up.

The parts stay in the object stores where they were sampled, and tasks run there. Sums are added up
in ranges of clusters and never come to the driver, which holds the centroids: each iteration sends
them to all nodes. Work that is lost with its node is done again from the centroids of its
iteration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np
import ray

from pds_ray.config import ClusterConfig
from pds_ray.distributed import pools, tasks
from pds_ray.distributed.in_flight import Doing, InFlight
from pds_ray.distributed.process import Result
from pds_ray.distributed.sample import Parts, gathered
from pds_ray.distributed.sizes import ADDED_TOGETHER, cluster_ranges, fit_tasks
from pds_ray.stages import cluster, products
from pds_ray.stages import lloyd as core


@dataclass(frozen=True)
class Work:
    """A sample that is shared out over the cluster."""

    space: str
    parts: list[Parts]
    extents: list[core.Extent]
    """Sizes of the parts."""
    groups: list[list[core.Slice]]
    """The rows of each task."""
    bounds: list[int]
    """Bounds of the ranges of clusters whose sums are added up side by side."""
    share: pools.Share
    in_flight: InFlight

    @property
    def rows(self) -> int:
        """Training vectors."""
        return sum(part.rows for part in self.extents)

    def start(
        self,
        function: Callable[..., Any],
        *given: Any,
        each: Sequence[tuple[Any, ...]] = (),
        results: int = 1,
    ) -> list[Any]:
        """Start `function(rows, doing, *given, *own)` on the rows of each group.

        `each` has what is a group's own. Returns the references of each.
        """
        started = []
        for number, group in enumerate(self.groups):
            own = each[number] if each else ()
            numbers = sorted({part for part, _, _ in group})
            here = [(numbers.index(part), start, end) for part, start, end in group]
            arrays = chain.from_iterable(self.parts[part] for part in numbers)
            values = (*given, *own)
            arguments = (function, here, self.space, self.in_flight, len(values), *values, *arrays)
            started.append(tasks.in_store(_on_rows, *arguments, results=results, share=self.share))
        return started

    def wait_for(self, references: Sequence[ray.ObjectRef]) -> list[Any]:
        """Return values of some tasks."""
        return [tasks.wait_for(reference, f"{self.space} vectors") for reference in references]


def _on_rows(
    function: Callable[..., Any],
    slices: list[core.Slice],
    space: str,
    in_flight: InFlight,
    count: int,
    *values: Any,
) -> Any:
    """Call `function` with rows of some parts; `count` of the values are for itself."""
    given, arrays = values[:count], values[count:]
    rows = [
        (arrays[2 * place][start:end], arrays[2 * place + 1][start:end])
        for place, start, end in slices
    ]
    total = sum(len(vectors) for vectors, _ in rows)
    with in_flight.doing(f"{total:,} {space} vectors to be labelled") as doing:
        return function(rows, doing, *given)


def _labels(rows: core.Rows, doing: Doing, centroids: np.ndarray, device: str) -> np.ndarray:
    """Label rows; report after each slice that there is progress."""
    prepared, found = products.as_centroids(centroids, device), []
    for number, labels in enumerate(core.label(rows, prepared), 1):
        doing.reach(number)
        found.append(labels)
    return np.concatenate(found)


def _sums(
    rows: core.Rows,
    doing: Doing,
    centroids: np.ndarray,
    exponent: int,
    bounds: list[int],
    device: str,
) -> tuple[Any, ...]:
    """Return the sums of each range of clusters, and at last the objective of each block."""
    labels = _labels(rows, doing, centroids, device)
    found = core.sums(rows, labels, exponent).split(bounds)
    return *found, core.objectives(rows, labels, centroids)


def _objectives(rows: core.Rows, doing: Doing, centroids: np.ndarray, device: str) -> list[float]:
    return core.objectives(rows, _labels(rows, doing, centroids, device), centroids)


def _nearest(
    rows: core.Rows, _doing: Doing, centres: np.ndarray, device: str, known: np.ndarray | None
) -> tuple[np.ndarray, list[float]]:
    """Return squared distances to the nearest centre, and the mass of each block."""
    found = core.nearest(rows, products.as_centroids(centres, device), known)
    return found, core.masses(rows, found)


def _drawn(rows: core.Rows, _doing: Doing, distances: np.ndarray, draws: core.Draws) -> np.ndarray:
    return core.drawn(rows, distances, draws)


def share_out(
    parts: list[Parts], space: str, clusters: int, width: int, in_flight: InFlight
) -> Work:
    """Return a sample of vectors of some width as it is shared out for a k-means.

    Raises ValueError if there are fewer vectors than clusters.
    """
    looks = [tasks.in_store(core.extent, *part) for part in parts]
    extents = [tasks.wait_for(look, f"{space} vectors") for look in looks]
    rows = [part.rows for part in extents]
    if sum(rows) < clusters:
        raise ValueError(f"{sum(rows)} vectors cannot make {clusters} clusters")
    share = pools.products()
    count = fit_tasks(sum(rows), clusters, width, share.places, share.device)
    ranges = cluster_ranges(clusters, width)
    return Work(
        space,
        parts,
        extents,
        core.slices(rows, count),
        [clusters * number // ranges for number in range(ranges + 1)],
        pools.of_few(share, count),
        in_flight,
    )


def fit(
    work: Work, seed: int, config: ClusterConfig, iterated: Callable[[int], object]
) -> cluster.Fit:
    """Fit a weighted Lloyd k-means; keep the best restart.

    `iterated` is called with the iterations done so far.
    """
    exponent, clusters = core.exponent(work.extents), work.bounds[-1]

    def attempt(restart: int) -> tuple[ray.ObjectRef, float]:
        done, before = restart * config.iterations, math.inf
        centroids = ray.put(_again(partial(_start, work, clusters, seed, restart)))
        for iteration in range(1, config.iterations + 1):
            iterate = partial(_iterate, work, centroids, exponent)
            centroids, now = _again(iterate)
            iterated(done + iteration)
            if core.resting(before, now, config.tolerance):
                break
            before = now
        return centroids, _again(partial(_objective, work, centroids))

    best, objective = min(map(attempt, range(config.restarts)), key=lambda fitted: fitted[1])
    distinct = _again(partial(_count_distinct, work, clusters))
    return cluster.Fit(ray.get(best), objective, work.rows, distinct)


def _again(step: Callable[[], Result]) -> Result:
    """Return `step()`; it is called again where machines are lost, as Ray tries crashes again."""
    return tasks.again_where_lost(step, crashes=0)


def _iterate(work: Work, centroids: ray.ObjectRef, exponent: int) -> tuple[ray.ObjectRef, float]:
    """Return the means of what is nearest to each centroid, and the objective before."""
    ranges = list(pairwise(work.bounds))
    given = (centroids, exponent, work.bounds, work.share.device)
    answers = work.start(_sums, *given, results=len(ranges) + 1)
    means = [
        tasks.in_store(core.means, bounds, exponent, *_added(list(own)), results=2)
        for bounds, *own in zip(ranges, *(answer[:-1] for answer in answers), strict=True)
    ]
    objective = math.fsum(chain.from_iterable(work.wait_for([answer[-1] for answer in answers])))
    found = [np.concatenate(work.wait_for(side)) for side in zip(*means, strict=True)]
    # put by the driver, as an object that a task made is lost with its node, and to make it again
    # would take all iterations before
    return ray.put(core.with_copies(*found)), objective


def _added(parts: list[ray.ObjectRef]) -> list[ray.ObjectRef]:
    """Add sums up until there are few."""
    step = ADDED_TOGETHER
    while len(parts) > step:
        some = (parts[start : start + step] for start in range(0, len(parts), step))
        parts = [tasks.in_store(core.add, *each) for each in some]
    return parts


def _objective(work: Work, centroids: ray.ObjectRef) -> float:
    """Return the weighted sum of squared distances to the nearest centroids."""
    found = work.start(_objectives, centroids, work.share.device)
    return math.fsum(chain.from_iterable(work.wait_for(found)))


def _count_distinct(work: Work, most: int) -> int:
    tasks.await_all([vectors for vectors, _ in work.parts])  # which the task fetches itself
    return ray.get(tasks.in_store(_distinct, work.parts, most))


def _distinct(parts: list[Parts], most: int) -> int:
    vectors = (tasks.fetch(reference) for reference, _ in parts)  # one part at a time
    return cluster.count_distinct(chain.from_iterable(vectors), most)


# ---- the start ---------------------------------------------------------------------------------


def _start(work: Work, clusters: int, seed: int, restart: int) -> np.ndarray:
    """Choose rows to begin from, float32 [clusters, d].

    Few are the seeds of `cluster.seeds`, chosen on one node. Many are drawn in rounds: the first
    ones uniformly, the others by weight times squared distance to those of earlier rounds.
    """
    rng = np.random.default_rng([seed, restart])
    if clusters <= cluster.SEED_LIMIT:
        rows = cluster.seed_rows(work.rows, clusters, rng)
        parts = _picked(work, rows)
        tasks.await_all(list(chain.from_iterable(parts)))  # which the task fetches itself
        return ray.get(tasks.in_store(_seeds, parts, rows, clusters, rng))
    first, *others = core.round_sizes(clusters)
    picked = _picked(work, rng.choice(work.rows, first, replace=False))
    chosen = np.concatenate(work.wait_for([vectors for vectors, _ in picked]))
    found, distances = [chosen], [None] * len(work.groups)
    for count in others:
        each = [(known,) for known in distances]
        centres = ray.put(chosen)  # once, not for each task
        looks = work.start(_nearest, centres, work.share.device, each=each, results=2)
        distances, masses = [look[0] for look in looks], work.wait_for([look[1] for look in looks])
        draws = core.draw(chain.from_iterable(masses), count, rng)
        ends = accumulate(map(len, masses), initial=0)
        own = [
            (known, draws.of(*blocks))
            for known, blocks in zip(distances, pairwise(ends), strict=True)
        ]
        chosen = np.concatenate(work.wait_for(work.start(_drawn, each=own)))
        found.append(chosen)
    return np.concatenate(found)


def _picked(work: Work, rows: np.ndarray) -> list[Parts]:
    """Return some rows of the sample, ascending, in parts."""
    ends = np.cumsum([part.rows for part in work.extents])
    part, rows = np.searchsorted(ends, np.sort(rows), side="right"), np.sort(rows)
    found = []
    for number in np.unique(part):
        own = rows[part == number] - (ends[number] - work.extents[number].rows)
        found.append(tuple(tasks.in_store(_rows, own, *work.parts[number], results=2)))
    return found


def _rows(
    rows: np.ndarray, vectors: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    return vectors[rows], weights[rows]


def _seeds(
    parts: list[Parts], rows: np.ndarray, clusters: int, rng: np.random.Generator
) -> np.ndarray:
    """Choose seeds among rows, which `parts` hold, in the order in which they were drawn."""
    vectors, weights = gathered(parts)
    place = np.argsort(np.argsort(rows))
    return cluster.seeds_among(vectors[place], weights[place], clusters, rng)

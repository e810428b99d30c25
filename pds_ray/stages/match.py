"""Matching: one image cluster with one text cluster (docs/methods.md, "match").

    T[i, j] = number of kept pairs with image cluster i and text cluster j
    sigma   = argmax over permutations of  sum over i of T[i, sigma(i)]

Labels are table positions, so an empty cluster is an empty row and shifts nothing. A match of
clusters that share no pair is an empty match.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import scipy.sparse as sp
from scipy.optimize import linear_sum_assignment
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

from pds_ray.config import MatchConfig
from pds_ray.stages.vectors import summable

DENSE_LIMIT = 5_000
KEEP_EMPTY_BELOW = 300  # pairs; the published code keeps empty matches in small sets only
COSINE_BITS = 32
"""Sums of cosines are multiples of 2^-32: exact up to a sum of 2^21, of two million pairs at least.

Beyond it the bytes still depend on no number of workers: tasks are grouped alike on any cluster.
"""

Counts = tuple[np.ndarray, np.ndarray]
"""A part of a sparse contingency table: cells i * K + j, int64, ascending, and counts, int64."""


@dataclass(frozen=True)
class Table:
    """A contingency table of K x K clusters, in parts that need not be in memory together."""

    clusters: int
    """K."""
    cells: int
    """Cells with a pair, in all parts."""
    pairs: int
    parts: Iterable[Counts]
    """Ranges of image clusters, in order."""


def count_pairs(image_cluster: np.ndarray, text_cluster: np.ndarray, clusters: int) -> Counts:
    """Count the contingency table of some pairs: labels int32 [n] twice, -1 where pruned."""
    kept = image_cluster >= 0
    packed = image_cluster[kept].astype(np.int64) * clusters + text_cluster[kept]
    cells, counts = np.unique(packed, return_counts=True)
    return cells, counts.astype(np.int64)


def merge_counts(*parts: Counts) -> Counts:
    """Sum some contingency tables."""
    cells = np.concatenate([part[0] for part in parts])
    order = np.argsort(cells, kind="stable")  # which merges what is in order already
    cells = cells[order]
    first = np.flatnonzero(np.diff(cells, prepend=-1))
    counts = np.concatenate([part[1] for part in parts])[order]
    return cells[first], np.add.reduceat(counts, first) if len(first) else counts


def split_counts(counts: Counts, bounds: Sequence[int], clusters: int) -> list[Counts]:
    """Return the parts of a table between each two bounds of image clusters, which ascend."""
    places = np.searchsorted(counts[0], np.asarray(bounds, np.int64) * clusters)
    return [(counts[0][start:end], counts[1][start:end]) for start, end in pairwise(places)]


def size_of(counts: Counts) -> tuple[int, int]:
    """Return the number of cells and of pairs of a part of a table."""
    return len(counts[0]), int(counts[1].sum())


def table_of(parts: Sequence[Counts], clusters: int) -> Table:
    """Return the table that parts in memory are ranges of."""
    sizes = [size_of(part) for part in parts]
    return Table(clusters, sum(size[0] for size in sizes), sum(size[1] for size in sizes), parts)


def assign_clusters(table: Table, solver: str = "auto") -> tuple[np.ndarray, np.ndarray]:
    """Return the text cluster matched to each image cluster, and the pairs that the two share.

    The first is a permutation; int64 [K] twice. Dense and sparse reach the same total; where
    several assignments do, the choice is the solver's.
    """
    if solver == "dense" or (solver == "auto" and table.clusters <= DENSE_LIMIT):
        return _assign_dense(table)
    return _assign_sparse(table)


def _assign_dense(table: Table) -> tuple[np.ndarray, np.ndarray]:
    # negative and to be minimised: to maximise, the solver would work on a negative copy
    costs = np.zeros((table.clusters, table.clusters))
    for cells, counts in table.parts:
        costs.reshape(-1)[cells] = -counts
    image, text_of = linear_sum_assignment(costs)
    return text_of, -costs[image, text_of].astype(np.int64)


class _Given(sp.csr_array):
    """An array that is given away: the solver copies others before it begins."""

    def astype(self, dtype: type, **_: object) -> sp.csr_array:
        return super().astype(dtype, copy=False)


def _assign_sparse(table: Table) -> tuple[np.ndarray, np.ndarray]:
    """Assign with a private dummy column of weight 0 per image cluster: a full matching exists."""
    graph, own = _graph(table), np.arange(table.clusters)
    matched = min_weight_full_bipartite_matching(graph)[1].astype(np.int64)
    shared = -1 - graph[own, matched].astype(np.int64)
    # those on their dummy share no pair with a free text cluster: they take the free ones in order
    left_over = np.flatnonzero(matched >= table.clusters)
    matched[left_over] = np.setdiff1d(own, matched[matched < table.clusters])
    return matched, shared


def _graph(table: Table) -> _Given:
    """Return a table with its dummy columns for the solver, 12 bytes per cell: [K, 2K].

    The solver takes no zero weights: everything is shifted by 1, the same for every full matching.
    Weights are negative and to be minimised: to maximise, it would work on a negative copy.
    """
    clusters = table.clusters
    weights = np.full(table.cells + clusters, -1.0)
    columns = np.empty(table.cells + clusters, np.int32)
    lengths, done = np.ones(clusters, np.int64), 0
    for cells, counts in table.parts:
        row, column = np.divmod(cells, clusters)
        place = np.arange(done, done + len(cells)) + row  # after the dummy of each row before
        columns[place] = column
        weights[place] -= counts
        lengths += np.bincount(row, minlength=clusters)
        done += len(cells)
    ends = np.cumsum(lengths)
    columns[ends - 1] = clusters + np.arange(clusters)
    starts = np.concatenate([[0], ends]).astype(sp.get_index_dtype(maxval=len(weights)))
    return _Given((weights, columns, starts), shape=(clusters, 2 * clusters))


def matched_cosines(
    image_cluster: np.ndarray, text_cluster: np.ndarray, similarity: np.ndarray, text_of: np.ndarray
) -> np.ndarray:
    """Return the summed cosines of the pairs that matched clusters share, float64 [K].

    Labels int32 [n] twice (-1 where pruned), cosines float32 [n]. Sums of such sums are exact up
    to 2^21.
    """
    shared = (image_cluster >= 0) & (text_of[image_cluster] == text_cluster)
    image = image_cluster[shared]
    sums = np.bincount(image, weights=similarity[shared], minlength=len(text_of))
    return summable(sums, COSINE_BITS)


def matched_clusters(
    text_of: np.ndarray, shared: np.ndarray, cosines: np.ndarray, pairs: int, config: MatchConfig
) -> dict[str, np.ndarray]:
    """Return the matched clusters as columns of couples.parquet, empty matches only if kept.

    The text cluster of each image cluster, int64 [K], the pairs that they share, int64 [K], and
    the summed cosines of these, float64 [K].
    """
    empty = shared == 0
    kept = ~empty | keeps_empty(pairs, config)
    return {
        "image_cluster": np.flatnonzero(kept).astype(np.int32),
        "text_cluster": text_of[kept].astype(np.int32),
        "shared": shared[kept],
        "pairless": empty[kept],
        "mean_cosine": (cosines / np.maximum(shared, 1))[kept],
    }


def keeps_empty(pairs: int, config: MatchConfig) -> bool:
    """Return whether empty matches stay in, as their two clusters' means."""
    return config.pairless == "keep" or (config.pairless == "auto" and pairs < KEEP_EMPTY_BELOW)

"""Matching: one image cluster with one text cluster (docs/methods.md, "match").

    T[i, j] = number of kept pairs with image cluster i and text cluster j
    sigma   = argmax over permutations of  sum over i of T[i, sigma(i)]

Labels are table positions, so an empty cluster is an empty row and shifts nothing. A match of
clusters that share no pair is an empty match.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import scipy.sparse as sp
from scipy.optimize import linear_sum_assignment
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

from pds_ray.config import MatchConfig

DENSE_LIMIT = 5_000
KEEP_EMPTY_BELOW = 300  # pairs; the published code keeps empty matches in small sets only

Counts = tuple[np.ndarray, np.ndarray, np.ndarray]
"""A sparse contingency table: cells, counts and summed cosines.

Cells are i * K + j, int64, ascending; counts int64; summed cosines float64.
"""


def count_pairs(
    image_cluster: np.ndarray, text_cluster: np.ndarray, similarity: np.ndarray, clusters: int
) -> Counts:
    """Count the contingency table of some pairs.

    Labels int32 [n] twice (-1 where pruned), cosines float32 [n].
    """
    kept = image_cluster >= 0
    packed = image_cluster[kept].astype(np.int64) * clusters + text_cluster[kept]
    cells, inverse, counts = np.unique(packed, return_inverse=True, return_counts=True)
    cosines = np.bincount(inverse, weights=similarity[kept], minlength=len(cells))
    return cells, counts.astype(np.int64), cosines


def merge_counts(parts: list[Counts]) -> Counts:
    """Sum a few contingency tables; a cell's cosines are added in the order of the tables."""
    cells = np.concatenate([part[0] for part in parts])
    unique, inverse = np.unique(cells, return_inverse=True)
    counts = np.zeros(len(unique), np.int64)
    np.add.at(counts, inverse, np.concatenate([part[1] for part in parts]))
    weights = np.concatenate([part[2] for part in parts])
    return unique, counts, np.bincount(inverse, weights=weights, minlength=len(unique))


def sum_counts(parts: Iterable[Counts]) -> Counts:
    """Sum any number of contingency tables: `merge_counts` of all of them, bit for bit.

    Counts of known cells are added in place; new cells wait until they are half as many as the
    known ones, so that little more than the sum is held and all merges together cost O(n).
    """
    last = np.iinfo(np.int64).max  # a cell beyond all others: every search ends at one
    known: list[np.ndarray] = [np.array([last]), np.zeros(1, np.int64), np.zeros(1)]
    new: list[Counts] = []
    waiting = 0

    def add_new() -> None:
        merged = merge_counts(new)
        place = np.searchsorted(known[0], merged[0])
        for column, theirs in enumerate(merged):
            known[column] = np.insert(known[column], place, theirs)
        new.clear()

    for cells, counts, cosines in parts:
        place = np.searchsorted(known[0], cells)
        hit = known[0][place] == cells
        known[1][place[hit]] += counts[hit]
        known[2][place[hit]] += cosines[hit]
        new.append((cells[~hit], counts[~hit], cosines[~hit]))
        waiting += len(new[-1][0])
        if 2 * waiting > len(known[0]):
            add_new()
            waiting = 0
    if new:
        add_new()
    return known[0][:-1], known[1][:-1], known[2][:-1]


def assign_clusters(
    cells: np.ndarray, counts: np.ndarray, clusters: int, solver: str = "auto"
) -> np.ndarray:
    """Return the text cluster matched to each image cluster: a permutation, int64 [K].

    Dense and sparse reach the same total; where several assignments do, the choice is the solver's.
    """
    if solver == "dense" or (solver == "auto" and clusters <= DENSE_LIMIT):
        table = np.zeros(clusters * clusters)
        table[cells] = counts
        return linear_sum_assignment(table.reshape(clusters, clusters), maximize=True)[1]
    return _assign_sparse(cells, counts, clusters)


def _assign_sparse(cells: np.ndarray, counts: np.ndarray, clusters: int) -> np.ndarray:
    """Assign with a private dummy column of weight 0 per image cluster: a full matching exists."""
    own = np.arange(clusters)
    # the cells are in the order of a CSR array already
    ends = np.searchsorted(cells, (own + 1) * clusters)
    # the solver takes no zero weights: everything is shifted by 1, the same for every full matching
    weights = np.insert(counts + 1.0, ends, 1.0)
    columns = np.insert((cells % clusters).astype(np.int32), ends, clusters + own)
    starts = np.concatenate([[0], ends + own + 1])
    graph = sp.csr_array((weights, columns, starts), shape=(clusters, 2 * clusters))
    matched = min_weight_full_bipartite_matching(graph, maximize=True)[1].astype(np.int64)
    # those on their dummy share no pair with a free text cluster: they take the free ones in order
    left_over = np.flatnonzero(matched >= clusters)
    matched[left_over] = np.setdiff1d(own, matched[matched < clusters])
    return matched


def matched_clusters(
    cells: np.ndarray,
    counts: np.ndarray,
    cosines: np.ndarray,
    text_of: np.ndarray,
    pairs: int,
    config: MatchConfig,
) -> dict[str, np.ndarray]:
    """Return the matched clusters as columns of couples.parquet, empty matches only if kept."""
    image_cluster = np.arange(len(text_of))
    wanted = image_cluster * len(text_of) + text_of
    found = np.minimum(np.searchsorted(cells, wanted), max(len(cells) - 1, 0))
    hit = (cells[found] == wanted) if len(cells) else np.zeros(len(wanted), bool)
    shared = np.where(hit, counts[found], 0) if len(cells) else np.zeros(len(wanted), np.int64)
    total = np.where(hit, cosines[found], 0.0) if len(cells) else np.zeros(len(wanted))
    empty = shared == 0
    kept = ~empty | keeps_empty(pairs, config)
    return {
        "image_cluster": image_cluster[kept].astype(np.int32),
        "text_cluster": text_of[kept].astype(np.int32),
        "shared": shared[kept],
        "pairless": empty[kept],
        "mean_cosine": (total / np.maximum(shared, 1))[kept],
    }


def keeps_empty(pairs: int, config: MatchConfig) -> bool:
    """Return whether empty matches stay in, as their two clusters' means."""
    return config.pairless == "keep" or (config.pairless == "auto" and pairs < KEEP_EMPTY_BELOW)

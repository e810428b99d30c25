"""Matching: one image cluster with one text cluster (docs/methods.md, "match").

    T[i, j] = number of kept pairs with image cluster i and text cluster j
    sigma   = argmax over permutations of  sum over i of T[i, sigma(i)], by stages/assign.py

Labels are table positions, so an empty cluster is an empty row and shifts nothing. A match of
clusters that share no pair is an empty match.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pds_ray.config import MatchConfig
from pds_ray.stages.vectors import summable

KEEP_EMPTY_BELOW = 300  # pairs; the published code keeps empty matches in small sets only
COSINE_BITS = 32
"""Sums of cosines are multiples of 2^-32: exact up to a sum of 2^21, of two million pairs at least.

Beyond it the bytes still depend on no number of workers: tasks are grouped alike on any cluster.
"""

Counts = tuple[np.ndarray, np.ndarray]
"""A part of a sparse contingency table: cells i * K + j, int64, ascending, and counts, int64."""

NO_CELLS: Counts = (np.zeros(0, np.int64), np.zeros(0, np.int64))


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

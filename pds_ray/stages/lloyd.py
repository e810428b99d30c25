"""Lloyd's algorithm on a sample in parts; any sharing of its rows gives the same bytes.

    a_n  = argmin over k of |x_n - c_k|                                   products.assign, exact
    S_k  = sum over n with a_n = k of  w_n round(x_n 2^e),   W_k = sum of w_n     whole numbers
    c_k  = S_k / (W_k 2^e)                                                one float32 per value

Weights are whole numbers above 0: kept captions. The exponent e depends on the weight and the
largest value of the whole sample, so that no sum overflows int64: sums are exact in any order. The
objective is summed per block of BLOCK_ROWS rows, and the blocks' sums are added exactly: the same
bytes on CPUs of one kind, as NumPy's order within a block depends on the width of their registers.

Vectors are finite: embeddings that are not never reach a store.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pds_ray.stages import products

BLOCK_ROWS = 4_096  # summed at once, into one float64 of the objective
LABELLED_ROWS = 65_536  # labelled at once: a device holds no more of them, however long a slice is
SUM_BITS = 62  # of the size of a sum, which int64 holds with its sign
SPLIT = np.float32(2.0**-10)  # share by which the copy of a centroid is moved, as FAISS does
START_ROUNDS = 10  # of draws; fewer cost a percent of the objective at 4,000 clusters

Rows = list[tuple[np.ndarray, np.ndarray]]
"""Vectors float32 [m, d] and weights float32 [m] of some slices, each cut at whole blocks."""
Slice = tuple[int, int, int]
"""Rows of a part: its number, the first row and the end."""


# ---- sharing out -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Extent:
    """The size of a sample, or of a part of it."""

    rows: int
    weight: int
    """Sum of the weights."""
    largest: float
    """The largest absolute value."""


def extent(vectors: np.ndarray, weights: np.ndarray) -> Extent:
    """Return the size of a part: float32 [n, d], float32 [n]."""
    largest = max(vectors.max(initial=0), -vectors.min(initial=0))
    return Extent(len(vectors), int(weights.sum(dtype=np.float64)), float(largest))


def exponent(sample: Sequence[Extent]) -> int:
    """Return e: values times 2^e, rounded, have sums below 2^SUM_BITS for any choice of the rows.

    With |x| < 2^a and a total weight below 2^b that is SUM_BITS - a - b. A rounded value is off by
    2^(a + b - SUM_BITS - 1) at most: 2^-33 of the largest one for 400 million captions.
    """
    _, value_bits = math.frexp(max(part.largest for part in sample))
    return SUM_BITS - value_bits - sum(part.weight for part in sample).bit_length()


def slices(rows: Sequence[int], count: int) -> list[list[Slice]]:
    """Share out the rows of parts, in order, to at most `count` lists of about as many.

    `rows` are those of each part. A part is cut at whole blocks only.
    """
    total, before = sum(rows), 0
    shared: list[list[Slice]] = [[] for _ in range(count)]
    for part, length in enumerate(rows):
        for start in range(0, length, BLOCK_ROWS):
            end = min(start + BLOCK_ROWS, length)
            mine = shared[(2 * before + end - start) * count // (2 * total)]
            before += end - start
            if mine and mine[-1][0] == part:
                mine[-1] = part, mine[-1][1], end
            else:
                mine.append((part, start, end))
    return [mine for mine in shared if mine]


def blocks(rows: Rows) -> Iterator[tuple[np.ndarray, np.ndarray, slice]]:
    """Yield vectors and weights of each block, and its place among the rows of all slices."""
    before = 0
    for vectors, weights in rows:
        for start in range(0, len(vectors), BLOCK_ROWS):
            some = slice(start, start + BLOCK_ROWS)
            end = min(start + BLOCK_ROWS, len(vectors))
            yield vectors[some], weights[some], slice(before + start, before + end)
        before += len(vectors)


# ---- an iteration ------------------------------------------------------------------------------


def label(rows: Rows, centroids: products.Vectors) -> Iterator[np.ndarray]:
    """Yield the nearest centroid of each row, int32 [m], LABELLED_ROWS at once."""
    for vectors, _ in rows:
        for start in range(0, len(vectors), LABELLED_ROWS):
            yield products.assign(vectors[start : start + LABELLED_ROWS], centroids)


def objectives(rows: Rows, labels: np.ndarray, centroids: np.ndarray) -> list[float]:
    """Return the weighted sum of squared distances to the centroids of each block."""
    return [
        float((_apart(vectors, centroids[labels[place]]) * weights).sum())
        for vectors, weights, place in blocks(rows)
    ]


def _apart(vectors: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the squared distance of each row to that of `others`, float64 [m]."""
    apart = vectors.astype(np.float64) - others
    return np.einsum("nd,nd->n", apart, apart)


@dataclass(frozen=True)
class Sums:
    """Sums of vectors per cluster, of those clusters that have any."""

    cluster: np.ndarray
    """int64 [m], ascending."""
    vector: np.ndarray
    """int64 [m, d]: values times a power of two."""
    weight: np.ndarray
    """int64 [m]."""

    def split(self, bounds: Sequence[int]) -> list[Sums]:
        """Cut them into ranges of clusters, which begin and end at `bounds`."""
        places = np.searchsorted(self.cluster, bounds)
        return [
            Sums(self.cluster[start:end], self.vector[start:end], self.weight[start:end])
            for start, end in pairwise(places)
        ]


def sums(rows: Rows, labels: np.ndarray, exponent: int) -> Sums:
    """Sum the vectors of each cluster; int32 [m] are the labels of all rows."""
    from scipy.sparse import csc_array

    total = _empty(np.unique(labels).astype(np.int64), rows[0][0].shape[1])
    for vectors, weights, place in blocks(rows):
        own, cluster = np.unique(labels[place], return_inverse=True)
        count = weights.astype(np.int64)
        chosen = csc_array((count, cluster, np.arange(len(cluster) + 1)), (len(own), len(cluster)))
        where = np.searchsorted(total.cluster, own)
        scaled = np.ldexp(vectors.astype(np.float64), exponent)
        total.vector[where] += chosen @ np.rint(scaled, out=scaled).astype(np.int64)
        total.weight[where] += chosen @ np.ones(len(cluster), np.int64)
    return total


def _empty(clusters: np.ndarray, dim: int) -> Sums:
    return Sums(clusters, np.zeros((len(clusters), dim), np.int64), np.zeros_like(clusters))


def add(*parts: Sums) -> Sums:
    """Add sums up."""
    clusters = np.unique(np.concatenate([part.cluster for part in parts]))
    total = _empty(clusters, parts[0].vector.shape[1])
    for part in parts:
        where = np.searchsorted(clusters, part.cluster)
        total.vector[where] += part.vector
        total.weight[where] += part.weight
    return total


def means(bounds: tuple[int, int], exponent: int, *parts: Sums) -> tuple[np.ndarray, np.ndarray]:
    """Return centroids and weights of a range of clusters, float32 [m, d] and int64 [m].

    An empty cluster has zeros.
    """
    start, end = bounds
    total = add(_empty(np.arange(start, end), parts[0].vector.shape[1]), *parts)
    weight = np.maximum(total.weight, 1)[:, None]
    return np.ldexp(total.vector / weight, -exponent).astype(np.float32), total.weight


def with_copies(centroids: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Give each empty cluster a copy of the centroid of a heavy one, moved a little.

    float32 [K, d], which is written to, and int64 [K]. The first empty cluster has that of the
    heaviest, the next one that of the second, of equals the first; after the last comes the first
    again. Even dimensions of a copy are larger by SPLIT, odd ones smaller. The centroid itself
    stays the mean of its rows.
    """
    empty = np.flatnonzero(weights == 0)
    heavy = np.argsort(-weights, kind="stable")[: len(weights) - len(empty)]
    factors = np.where(np.arange(centroids.shape[1]) % 2, 1 - SPLIT, 1 + SPLIT)
    centroids[empty] = centroids[np.resize(heavy, len(empty))] * factors.astype(np.float32)
    return centroids


def resting(before: float, now: float, tolerance: float) -> bool:
    """Return whether an iteration changed the objective by a smaller share than the tolerance."""
    # no change is a share of 0, also of an objective of 0, as where no row is off its centroid
    return tolerance > 0 and (now == before or abs(before - now) < tolerance * before)


# ---- a start for many clusters -----------------------------------------------------------------


def nearest(rows: Rows, centres: products.Vectors, known: np.ndarray | None) -> np.ndarray:
    """Return the squared distance of each row to its nearest centre, float64 [m].

    `known` are those to earlier centres, None if there are none.
    """
    labels = np.concatenate(list(label(rows, centres)))
    found = np.concatenate(
        [_apart(vectors, centres.raw[labels[place]]) for vectors, _, place in blocks(rows)]
    )
    return found if known is None else np.minimum(found, known)


def masses(rows: Rows, distances: np.ndarray) -> list[float]:
    """Return the weighted sum of squared distances, float64 [m], of each block."""
    return [float((distances[place] * weights).sum()) for _, weights, place in blocks(rows)]


@dataclass(frozen=True)
class Draws:
    """Places in the mass of blocks, ascending."""

    block: np.ndarray
    """int64 [count]: its number."""
    mass: np.ndarray
    """float64 [count]: the mass of the rows before in that block."""

    def of(self, first: int, end: int) -> Draws:
        """Return those in some blocks, which are numbered from 0."""
        some = slice(*np.searchsorted(self.block, (first, end)))
        return Draws(self.block[some] - first, self.mass[some])


def draw(mass: Iterable[float], count: int, rng: np.random.Generator) -> Draws:
    """Draw places in the mass of all blocks, one in each of `count` equal shares of it."""
    ends = np.cumsum(np.fromiter(mass, np.float64))
    places = (np.arange(count) + rng.random(count)) * (ends[-1] / count)
    block = np.minimum(np.searchsorted(ends, places, side="right"), len(ends) - 1)
    return Draws(block, places - np.concatenate([[0.0], ends])[block])


def drawn(rows: Rows, distances: np.ndarray, draws: Draws) -> np.ndarray:
    """Return the vectors at the places drawn, float32 [count, d].

    If only copies of earlier centres are left they are copies, too.
    """
    found = []
    for number, (vectors, weights, place) in enumerate(blocks(rows)):
        wanted = draws.mass[slice(*np.searchsorted(draws.block, (number, number + 1)))]
        ends = np.cumsum(distances[place] * weights)
        row = np.searchsorted(ends, wanted, side="right")
        found.append(vectors[np.minimum(row, len(ends) - 1)])
    return np.concatenate(found)


def round_sizes(clusters: int) -> list[int]:
    """Return how many centres are drawn in each round, none of them zero."""
    ends = [clusters * number // START_ROUNDS for number in range(START_ROUNDS + 1)]
    return [end - start for start, end in pairwise(ends) if end > start]

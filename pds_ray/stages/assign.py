"""The assignment: which clusters are matched so that matches share as many pairs as possible.

A small table is solved whole. Of a large one a core of cells is solved, and its prices tell
whether any cell beside it could do better. That is column generation (Ahuja, Magnanti and Orlin,
Network Flows, 1993, chapters 12 and 17) on an assignment and its dual, whose values are the same:

    maximise  sum over i of T[i, sigma(i)]        minimise  sum over i of u[i] + sum over j of v[j]
              sigma a permutation                           u[i] + v[j] >= T[i, j],  u, v >= 0

Prices u, v that are best for the core, and that no other cell exceeds, are best for the whole
table: the assignment of the core reaches the same value, so that no other reaches more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import scipy.sparse as sp
from scipy.optimize import linear_sum_assignment
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

from pds_ray.stages.match import Counts, Table, merge_counts

DENSE_LIMIT = 5_000
CORE_LIMIT = 100_000_000
"""Cells of the largest table that is solved whole, 15 bytes each, and about those of a core."""
BLOCK_CELLS = 1 << 20  # looked at together

Assigned = tuple[np.ndarray, np.ndarray]
"""The text cluster matched to each image cluster, a permutation, and the pairs that the two share.

int64 [K] twice.
"""
Prices = tuple[np.ndarray, np.ndarray]
"""Prices of image clusters and of text clusters, in pairs: int64 [K] twice."""


def is_dense(clusters: int, solver: str) -> bool:
    """Return whether `--match.solver` solves a table with all its empty cells."""
    return solver == "dense" or (solver == "auto" and clusters <= DENSE_LIMIT)


def assign_clusters(table: Table, solver: str = "auto") -> Assigned:
    """Return the best assignment, of the whole table at once.

    Dense and sparse reach the same total; where several assignments do, the choice is the solver's.
    """
    if is_dense(table.clusters, solver):
        return _assign_dense(table)
    graph = _graph(table)
    return _assigned(graph, _solve(graph))


def assign_by_core(clusters: int, grow: Callable[[Prices, int], Table]) -> Assigned:
    """Return the best assignment of a table of which only a core need be in one memory.

    The core is empty at first. `grow(prices, most)` grows each range of it by `grown`, and returns
    the whole core. The assignment reaches the total of the whole table; where several do, it may be
    another than that of `assign_clusters`. It is the same however the table is cut into ranges.

    This ends, as nothing leaves the core: each time it gains a cell, or the time is the last. It
    takes half of the room that is left; beyond CORE_LIMIT it grows by a cell per image cluster at
    most each time.
    """
    prices, cells = (np.zeros(clusters, np.int64),) * 2, 0
    found = np.arange(clusters), np.zeros(clusters, np.int64)
    while True:
        most = max(1, (CORE_LIMIT - cells) // (2 * clusters))
        core = grow(prices, most)
        if core.cells == cells:
            return found
        found, prices = _solve_core(core)
        cells = core.cells


def _solve_core(core: Table) -> tuple[Assigned, Prices]:
    """Return the best assignment of a core, and prices that prove it."""
    graph = _graph(core)
    matched = _solve(graph)
    return _assigned(graph, matched), _prices(graph, matched)


def grown(core: Counts, part: Counts, prices: Prices, most: int) -> Counts:
    """Return a range of the core with cells of the table that exceed the sum of their prices.

    At most `most` of each image cluster: half of them exceed their prices most, half are drawn by
    lot. Those that exceed them most may all be of the same few text clusters. But of n cells, few
    exceed prices that are the best for r drawn ones and whatever else: 2 K n / r in the mean
    (Clarkson, Las Vegas algorithms for linear and integer programming, 1995).
    """
    cells, counts = part
    clusters, found = len(prices[1]), [core]
    for start, end in _blocks(cells, clusters):
        row, column = np.divmod(cells[start:end], clusters)
        excess = counts[start:end] - prices[0][row] - prices[1][column]
        places = np.flatnonzero(excess > 0)  # none of the core
        row, excess, lot = row[places], excess[places], _lots(cells[start:end][places])
        chosen = _first(most - most // 2, row, lot, -excess)
        chosen[~chosen] = _first(most // 2, row[~chosen], lot[~chosen])
        places = start + places[chosen]
        found.append((cells[places], counts[places]))
    return merge_counts(*found)


def _blocks(cells: np.ndarray, clusters: int) -> Iterator[tuple[int, int]]:
    """Return the bounds of blocks of whole image clusters."""
    first = cells[::BLOCK_CELLS] // clusters * clusters
    return pairwise([*np.unique(np.searchsorted(cells, first)).tolist(), len(cells)])


def _first(most: int, row: np.ndarray, *keys: np.ndarray) -> np.ndarray:
    """Return which are the first of their row by some keys, the last of which decides, bool [n]."""
    order = np.lexsort((*keys, row))
    found = np.zeros(len(row), bool)
    found[order[np.arange(len(row)) - np.searchsorted(row, row) < most]] = True
    return found


def _lots(cells: np.ndarray) -> np.ndarray:
    """Return a number for each cell as if it was drawn, uint64 [n]: SplitMix64's."""
    found = cells.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    found = (found ^ (found >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    found = (found ^ (found >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return found ^ (found >> np.uint64(31))


def _assign_dense(table: Table) -> Assigned:
    # negative and to be minimised: to maximise, the solver would work on a negative copy
    costs = np.zeros((table.clusters, table.clusters))
    for part in table.parts:
        for cells, counts in _small(part):
            costs.reshape(-1)[cells] = -counts
    image, text_of = linear_sum_assignment(costs)
    return text_of, -costs[image, text_of].astype(np.int64)


class _Given(sp.csr_array):
    """An array that is given away: the solver copies others before it begins."""

    def astype(self, dtype: type, **_: object) -> sp.csr_array:
        return super().astype(dtype, copy=False)


def _graph(table: Table) -> _Given:
    """Return a table for the solver, 12 bytes per cell: [K, 2K].

    Each image cluster has a private dummy column of weight 0: a full matching exists. The solver
    takes no zero weights: everything is shifted by 1, the same for every full matching. Weights are
    negative and to be minimised: to maximise, it would work on a negative copy.
    """
    clusters = table.clusters
    weights = np.full(table.cells + clusters, -1.0)
    columns = np.empty(table.cells + clusters, np.int32)
    lengths, done = np.ones(clusters, np.int64), 0
    for part in table.parts:
        for cells, counts in _small(part):
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


def _small(part: Counts) -> Iterator[Counts]:
    """Yield blocks of a part, so that what is computed of them takes little memory."""
    cells, counts = part
    for start in range(0, len(cells), BLOCK_CELLS):
        block = slice(start, start + BLOCK_CELLS)
        yield cells[block], counts[block]


def _solve(graph: _Given) -> np.ndarray:
    """Return the column matched to each row, int64 [K]."""
    return min_weight_full_bipartite_matching(graph)[1].astype(np.int64)


def _shared(graph: _Given, matched: np.ndarray) -> np.ndarray:
    """Return the pairs of each match, int64 [K]: none with a dummy."""
    return -1 - graph[np.arange(len(matched)), matched].astype(np.int64)


def _assigned(graph: _Given, matched: np.ndarray) -> Assigned:
    clusters = len(matched)
    # those on their dummy share no pair with a free text cluster: they take the free ones in order
    text_of = matched.copy()
    text_of[matched >= clusters] = np.setdiff1d(np.arange(clusters), matched)
    return text_of, _shared(graph, matched)


def _prices(graph: _Given, matched: np.ndarray) -> Prices:
    """Return the prices half-way between the lowest and the highest ones of text clusters.

    Either end would do, but in the middle fewer cells exceed them: the lowest cover few cells of a
    weak image cluster, the highest few of a weak text cluster. Half-way between two solutions of
    differences v[j] - v[k] <= c lies another, rounded down, too.
    """
    clusters, shared = len(matched), _shared(graph, matched)
    price = (_lowest(graph, matched, shared) + _highest(graph, matched, shared)) // 2
    return shared - price[matched], price[:clusters]


def _lowest(graph: _Given, matched: np.ndarray, shared: np.ndarray) -> np.ndarray:
    """Return the lowest prices of all columns at which no row would rather have another: int64.

    From 0 on, a price rises to the most that any row would gain by its column. Those are longest
    paths, by Bellman and Ford: in each round on from the columns whose prices rose. It ends after K
    rounds, as no cycle of exchanges gains anything. If one did, prices would rise until a row would
    rather have its dummy, which no other has.
    """
    owner = np.full(graph.shape[1], -1)
    owner[matched] = rows = np.arange(len(matched))
    price = np.zeros(graph.shape[1], np.int64)
    while len(rows):
        before = price.copy()
        for some, lengths, places in _rows_of(graph, rows):
            gained = np.repeat(shared[some] - price[matched[some]], lengths)
            worth = -1 - graph.data[places].astype(np.int64) - gained
            np.maximum.at(price, graph.indices[places], worth)
        rows = owner[price > before]
        if (rows < 0).any():
            raise ArithmeticError("a matching of the solver is not the best")
    return price


def _highest(graph: _Given, matched: np.ndarray, shared: np.ndarray) -> np.ndarray:
    """Return the highest such prices of columns: int64; of a dummy always 0.

    From what its match shares, a price falls as its row gains at least what it would by any other
    column: in each round on from the columns whose prices fell.
    """
    gained, price = np.zeros(len(matched), np.int64), np.zeros(graph.shape[1], np.int64)
    price[matched] = shared
    fell = np.ones(len(price), bool)
    while fell.any():
        rows = np.flatnonzero(np.logical_or.reduceat(fell[graph.indices], graph.indptr[:-1]))
        fell[:] = False
        for some, lengths, places in _rows_of(graph, rows):
            worth = -1 - graph.data[places].astype(np.int64) - price[graph.indices[places]]
            wanted = np.maximum.reduceat(worth, np.cumsum(lengths) - lengths)
            more = wanted > gained[some]
            gained[some[more]] = wanted[more]
            price[matched[some]] = shared[some] - gained[some]
            fell[matched[some[more]]] = True
    return price


def _rows_of(
    graph: _Given, rows: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield some of the rows, the number of cells of each, and where these cells are."""
    lengths = np.diff(graph.indptr)[rows].astype(np.int64)
    block = np.cumsum(lengths) // BLOCK_CELLS
    for some in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(block)) + 1):
        length = lengths[some]
        first = graph.indptr[rows[some]] - (np.cumsum(length) - length)
        yield rows[some], length, np.repeat(first, length) + np.arange(length.sum())

"""The assignment against exhaustive search, another solver, and duality of linear programs."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from pds_ray.stages import assign, match


def sparse(table: np.ndarray, cuts: tuple[int, ...] = ()) -> match.Table:
    """Return the table in parts, cut before these image clusters."""
    cells = np.flatnonzero(table)
    counts = cells.astype(np.int64), table.reshape(-1)[cells].astype(np.int64)
    clusters = len(table)
    bounds = [0, *sorted(cuts), clusters]
    return match.table_of(match.split_counts(counts, bounds, clusters), clusters)


def total(table: np.ndarray, text_of: np.ndarray) -> int:
    return int(table[np.arange(len(table)), text_of].sum())


def assert_permutation(text_of: np.ndarray, clusters: int) -> None:
    assert sorted(text_of.tolist()) == list(range(clusters))


TABLES = st.integers(1, 6).flatmap(
    lambda k: st.lists(
        st.one_of(st.just(0), st.integers(0, 5), st.integers(0, 10**6)),
        min_size=k * k,
        max_size=k * k,
    ).map(lambda values: np.array(values, np.int64).reshape(k, k))
)


@settings(max_examples=60)
@given(TABLES, st.lists(st.integers(0, 6), max_size=3))
def test_both_solvers_reach_the_best_total(table, places):
    """However the table is cut into parts, with the same answer."""
    clusters = len(table)
    best = max(total(table, np.array(p)) for p in itertools.permutations(range(clusters)))
    cuts = tuple(place % (clusters + 1) for place in places)
    for solver in ("dense", "sparse", "auto"):
        text_of, shared = assign.assign_clusters(sparse(table, cuts), solver)
        assert_permutation(text_of, clusters)
        assert total(table, text_of) == best
        assert shared.dtype == np.int64
        np.testing.assert_array_equal(shared, table[np.arange(clusters), text_of])
        whole, _ = assign.assign_clusters(sparse(table), solver)
        np.testing.assert_array_equal(text_of, whole)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("clusters", [50, 400])
def test_solvers_agree_on_large_skewed_tables(clusters, seed):
    """A contingency table: few heavy cells, many light ones, empty rows and columns."""
    rng = np.random.default_rng(seed)
    table = np.zeros((clusters, clusters), np.int64)
    weights = rng.zipf(1.6, 6 * clusters).clip(max=10**5)
    np.add.at(
        table,
        (rng.integers(0, clusters, len(weights)), rng.integers(0, clusters, len(weights))),
        weights,
    )
    table[rng.integers(0, clusters, 3)] = 0
    table[:, rng.integers(0, clusters, 3)] = 0
    dense, _ = assign.assign_clusters(sparse(table), "dense")
    thin, _ = assign.assign_clusters(sparse(table), "sparse")
    assert_permutation(dense, clusters)
    assert_permutation(thin, clusters)
    assert total(table, dense) == total(table, thin)


@pytest.mark.parametrize("solver", ["dense", "sparse"])
def test_perfectly_paired_clusters_give_the_permutation(solver):
    planted = np.random.default_rng(0).permutation(30)
    table = np.zeros((30, 30), np.int64)
    table[np.arange(30), planted] = np.random.default_rng(1).integers(1, 9, 30)
    np.testing.assert_array_equal(assign.assign_clusters(sparse(table), solver)[0], planted)


@pytest.mark.parametrize("solver", ["dense", "sparse"])
def test_empty_rows_and_columns_shift_nothing(solver):
    """Image clusters 0, 3 and text clusters 1, 4 are empty; the others are paired beyond doubt."""
    planted = {1: 3, 2: 0, 4: 2}
    table = np.zeros((5, 5), np.int64)
    for image, text in planted.items():
        table[image, text] = 7
    text_of, _ = assign.assign_clusters(sparse(table), solver)
    assert_permutation(text_of, 5)
    assert {image: text_of[image] for image in planted} == planted


@pytest.mark.parametrize("solver", ["dense", "sparse"])
def test_an_empty_table_is_still_matched(solver):
    text_of, shared = assign.assign_clusters(sparse(np.zeros((4, 4), np.int64)), solver)
    assert_permutation(text_of, 4)
    assert shared.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("ranges", [1, 20])
@pytest.mark.parametrize("solver", ["dense", "sparse"])
def test_the_driver_holds_no_more_than_what_is_solved(solver, ranges, monkeypatch):
    """Float64 per cell of the dense table; of the sparse one as well, with int32 and 3 flags."""
    monkeypatch.setattr(assign, "BLOCK_CELLS", 1 << 12)
    clusters = 1_000
    rng = np.random.default_rng(0)
    cells = np.unique(rng.integers(0, clusters**2, 400_000))
    counts = cells, rng.integers(1, 9, len(cells))
    bounds = np.linspace(0, clusters, ranges + 1).astype(int)
    parts = match.split_counts(counts, bounds, clusters)
    tracemalloc.start()
    fetched = ((cells.copy(), counts.copy()) for cells, counts in parts)
    table = match.Table(clusters, len(cells), int(counts[1].sum()), fetched)
    assign.assign_clusters(table, solver)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    one_part = 2 * 8 * len(cells) / ranges
    if solver == "dense":
        held = 8 * clusters**2 + one_part
    else:  # the flags come when all parts are in their place
        held = max(15 * (len(cells) + clusters), 12 * (len(cells) + clusters) + one_part)
    assert peak <= held + 500 * clusters


class Ranges:
    """Ranges of a table and of its core, in memory; it remembers prices and sizes."""

    def __init__(self, table: match.Table) -> None:
        self.parts = list(table.parts)
        self.cores = [match.NO_CELLS] * len(self.parts)
        self.clusters = table.clusters
        self.prices: list[assign.Prices] = []
        self.cells: list[int] = []

    def grow(self, prices: assign.Prices, most: int) -> match.Table:
        self.prices.append(prices)
        self.cores = [
            assign.grown(core, part, prices, most)
            for core, part in zip(self.cores, self.parts, strict=True)
        ]
        core = match.table_of(self.cores, self.clusters)
        self.cells.append(core.cells)
        return core


def by_core(
    table: np.ndarray, limit: int, cuts: tuple[int, ...] = (), block: int = assign.BLOCK_CELLS
) -> tuple[np.ndarray, Ranges]:
    """Return the best assignment of a table that is too large for `limit`; check it by its dual."""
    ranges, clusters = Ranges(sparse(table, cuts)), len(table)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assign, "CORE_LIMIT", limit)
        patch.setattr(assign, "BLOCK_CELLS", block)
        text_of, shared = assign.assign_by_core(clusters, ranges.grow)
    assert_permutation(text_of, clusters)
    assert shared.dtype == np.int64
    np.testing.assert_array_equal(shared, table[np.arange(clusters), text_of])
    assert shared.sum() == table[linear_sum_assignment(table, maximize=True)].sum()
    image, text = ranges.prices[-1]
    assert [price.dtype for price in (image, text)] == [np.int64, np.int64]
    assert min(image.min(), text.min()) >= 0
    assert (image[:, None] + text >= table).all(), "feasible"
    np.testing.assert_array_equal(image + text[text_of], shared)  # complementary slackness
    assert image.sum() + text.sum() == shared.sum(), "the same value"
    return text_of, ranges


@settings(max_examples=100)
@given(
    TABLES, st.integers(0, 40), st.lists(st.integers(0, 6), max_size=3), st.sampled_from([1, 3, 99])
)
def test_a_core_reaches_the_best_total(table, limit, places, block):
    """However small the core, and however the table is cut, with the same answer."""
    text_of, whole = by_core(table, limit)
    cuts = tuple(place % (len(table) + 1) for place in places)
    cut, ranges = by_core(table, limit, cuts, block)
    np.testing.assert_array_equal(cut, text_of)
    assert ranges.cells == whole.cells


def planted(rng: np.random.Generator, clusters: int) -> np.ndarray:
    """Each cluster has a partner, strong or weak, among light cells."""
    table = rng.poisson(1.0, (clusters, clusters))
    table[np.arange(clusters), rng.permutation(clusters)] += rng.zipf(1.5, clusters).clip(max=1_000)
    return table


def tied(rng: np.random.Generator, clusters: int) -> np.ndarray:
    return rng.integers(0, 3, (clusters, clusters))


def popular(rng: np.random.Generator, clusters: int) -> np.ndarray:
    """All want the same few text clusters, so that no core of heavy cells matches many."""
    share = 50 / (1 + np.arange(clusters))
    return rng.poisson(np.outer(rng.permutation(share), rng.permutation(share)))


def uneven(rng: np.random.Generator, clusters: int) -> np.ndarray:
    """Some rows and columns are empty, some have only light cells."""
    table = rng.zipf(1.6, (clusters, clusters)).clip(max=10**6) * rng.integers(
        0, 2, (clusters,) * 2
    )
    table[rng.integers(0, clusters, 5)] = 0
    table[:, rng.integers(0, clusters, 5)] = 0
    light = rng.integers(0, clusters, clusters // 4)
    table[light] = np.minimum(table[light], 1)
    return table


def chained(rng: np.random.Generator, clusters: int) -> np.ndarray:
    """Each cluster shares with the next more than with its own: the greedy choice is wrong."""
    table = np.diag(np.full(clusters, 9)) + np.diag(np.full(clusters - 1, 10), 1)
    table[0] += np.arange(clusters)
    return table[rng.permutation(clusters)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("made", [planted, tied, popular, uneven, chained])
@pytest.mark.parametrize("cells", [2, 8])
def test_a_core_grows_until_it_is_large_enough(made, cells, seed):
    """It begins with half as many cells per image cluster as there is room for."""
    clusters = 120
    table = made(np.random.default_rng(seed), clusters)
    _, ranges = by_core(table, cells * clusters, (30, 60, 61))
    assert (np.diff(ranges.cells)[:-1] > 0).all()
    assert ranges.cells[-1] == ranges.cells[-2], "it looked once more, and found nothing"
    assert cells == 2 or ranges.cells[0] <= cells * clusters / 2


def test_prices_add_the_cells_that_a_heavy_core_lacks():
    """All prefer the same two text clusters; the others' cells are found by prices alone."""
    clusters = 40
    table = np.ones((clusters, clusters), np.int64) + np.eye(clusters, dtype=np.int64)
    table[:, :2] = 100
    _, ranges = by_core(table, 2 * clusters)
    assert len(ranges.cells) >= 4
    assert ranges.cells[0] == clusters


@given(TABLES)
def test_lowest_and_highest_prices_are_what_clusters_add(table):
    """The lowest are worth another of a cluster (Leonard, 1983), the highest the only one."""
    clusters, graph = len(table), assign._graph(sparse(table))
    matched = assign._solve(graph)
    shared = assign._shared(graph, matched)
    lowest, highest = (
        assign._lowest(graph, matched, shared),
        assign._highest(graph, matched, shared),
    )
    assert not lowest[clusters:].any()
    assert not highest[clusters:].any()
    reached = linear_sum_assignment(table, maximize=True)
    for column in range(clusters):
        more = np.hstack([table, table[:, [column]]])
        without = np.delete(table, column, axis=1)
        for price, other in ((lowest, more), (-highest, without)):
            rows, columns = linear_sum_assignment(other, maximize=True)
            assert price[column] == other[rows, columns].sum() - table[reached].sum()


def test_a_matching_that_is_not_the_best_has_no_prices():
    graph = assign._graph(sparse(np.array([[5, 1], [1, 5]])))
    with pytest.raises(ArithmeticError, match="is not the best"):
        assign._prices(graph, np.array([1, 0]))
    with pytest.raises(ArithmeticError, match="is not the best"):
        assign._prices(graph, np.array([0, 3]))


@given(TABLES, st.integers(0, 10**6), st.integers(1, 7), st.sampled_from([1, 4, 99]))
def test_a_core_grows_by_cells_that_exceed_their_prices(table, seed, most, block):
    rng, clusters = np.random.default_rng(seed), len(table)
    prices = tuple(rng.integers(0, 6, (2, clusters)))
    (part,) = sparse(table).parts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assign, "BLOCK_CELLS", block)
        cells, counts = assign.grown(match.NO_CELLS, part, prices, most)
    np.testing.assert_array_equal(counts, table.reshape(-1)[cells])
    assert (np.diff(cells) > 0).all()
    excess = table - prices[0][:, None] - prices[1]
    excess[table == 0] = 0
    chosen = np.zeros(table.shape, bool)
    chosen.reshape(-1)[cells] = True
    assert (excess[chosen] > 0).all()
    for row, mine in zip(excess, chosen, strict=True):
        assert mine.sum() == min(most, (row > 0).sum())
        heaviest = np.sort(row)[::-1][: min(most - most // 2, mine.sum())]
        np.testing.assert_array_equal(np.sort(row[mine])[::-1][: len(heaviest)], heaviest)


def test_cells_are_drawn_evenly():
    """Each column of equal cells, in a pattern, is chosen about as often."""
    clusters = 300
    (part,) = sparse(np.ones((clusters, clusters), np.int64)).parts
    free = np.zeros((2, clusters), np.int64)
    cells, _ = assign.grown(match.NO_CELLS, part, (free[0], free[1]), 60)
    often = np.bincount(cells % clusters, minlength=clusters)
    assert often.sum() == 60 * clusters
    variance = 60 * 0.8
    assert ((often - 60) ** 2).sum() / variance < clusters + 5 * (
        2 * clusters
    ) ** 0.5  # chi squared


def test_cells_beyond_32_bits():
    """K * K is beyond 32 bits for K = 100,000."""
    clusters = 100_000
    image, text = np.array([99_998, 99_999]), np.array([99_999, 99_998])
    cells = np.sort(np.concatenate([image * clusters + text, image * clusters + image]))
    table = match.table_of(
        match.split_counts((cells, np.array([4, 5, 5, 3])), [0, 99_999, clusters], clusters),
        clusters,
    )
    ranges = Ranges(table)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assign, "CORE_LIMIT", 2)
        text_of, shared = assign.assign_by_core(clusters, ranges.grow)
    np.testing.assert_array_equal(np.flatnonzero(shared), image)
    np.testing.assert_array_equal(text_of[image], text)


def test_the_driver_holds_a_core_alone():
    """15 bytes per cell of the largest core, and vectors of a number per cluster."""
    clusters, limit = 2_000, 400_000
    rng = np.random.default_rng(0)
    table = rng.poisson(1.0, (clusters, clusters))
    table[np.arange(clusters), rng.permutation(clusters)] += 50
    ranges, peaks = Ranges(sparse(table, tuple(range(100, clusters, 100)))), []

    def grow(prices: assign.Prices, most: int) -> match.Table:
        """Grow the core elsewhere, as tasks do."""
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        core = ranges.grow(prices, most)
        tracemalloc.start()
        return core

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assign, "CORE_LIMIT", limit)
        patch.setattr(assign, "BLOCK_CELLS", 1_000)
        tracemalloc.start()
        assign.assign_by_core(clusters, grow)
        tracemalloc.stop()
    assert ranges.cells[-1] <= limit < table.size / 5
    assert max(peaks) <= 15 * (ranges.cells[-1] + clusters) + 300 * clusters

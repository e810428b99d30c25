"""Matching against exhaustive search, a dense table and planted permutations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pds_ray.config import MatchConfig
from pds_ray.stages import match, prototypes


def sparse(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    cells = np.flatnonzero(table)
    return cells.astype(np.int64), table.reshape(-1)[cells].astype(np.int64)


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
@given(TABLES)
def test_both_solvers_reach_the_best_total(table):
    clusters = len(table)
    best = max(total(table, np.array(p)) for p in itertools.permutations(range(clusters)))
    for solver in ("dense", "sparse", "auto"):
        text_of = match.assign_clusters(*sparse(table), clusters, solver)
        assert_permutation(text_of, clusters)
        assert total(table, text_of) == best


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
    dense = match.assign_clusters(*sparse(table), clusters, "dense")
    thin = match.assign_clusters(*sparse(table), clusters, "sparse")
    assert_permutation(dense, clusters)
    assert_permutation(thin, clusters)
    assert total(table, dense) == total(table, thin)


@pytest.mark.parametrize("solver", ["dense", "sparse"])
def test_perfectly_paired_clusters_give_the_permutation(solver):
    planted = np.random.default_rng(0).permutation(30)
    table = np.zeros((30, 30), np.int64)
    table[np.arange(30), planted] = np.random.default_rng(1).integers(1, 9, 30)
    np.testing.assert_array_equal(match.assign_clusters(*sparse(table), 30, solver), planted)


@pytest.mark.parametrize("solver", ["dense", "sparse"])
def test_empty_rows_and_columns_shift_nothing(solver):
    """Image clusters 0, 3 and text clusters 1, 4 are empty; the others are paired beyond doubt."""
    planted = {1: 3, 2: 0, 4: 2}
    table = np.zeros((5, 5), np.int64)
    for image, text in planted.items():
        table[image, text] = 7
    text_of = match.assign_clusters(*sparse(table), 5, solver)
    assert_permutation(text_of, 5)
    assert {image: text_of[image] for image in planted} == planted


@pytest.mark.parametrize("solver", ["dense", "sparse"])
def test_an_empty_table_is_still_matched(solver):
    nothing = np.zeros(0, np.int64)
    assert_permutation(match.assign_clusters(nothing, nothing, 4, solver), 4)


def labelled(seed: int, pairs: int, clusters: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, clusters, pairs).astype(np.int32)
    text = rng.integers(0, clusters, pairs).astype(np.int32)
    pruned = rng.random(pairs) < 0.2
    image[pruned] = text[pruned] = -1
    return image, text, rng.uniform(-1, 1, pairs).astype(np.float32)


@settings(max_examples=30)
@given(
    st.integers(0, 10**6),
    st.integers(0, 200),
    st.integers(1, 9),
    st.lists(st.integers(0, 200), max_size=4),
)
def test_counts_equal_a_dense_table_however_the_shards_are_cut(seed, pairs, clusters, places):
    image, text, similarity = labelled(seed, pairs, clusters)
    counts = np.zeros((clusters, clusters), np.int64)
    cosines = np.zeros((clusters, clusters))
    kept = image >= 0
    np.add.at(counts, (image[kept], text[kept]), 1)
    np.add.at(cosines, (image[kept], text[kept]), similarity[kept].astype(np.float64))

    edges = sorted({0, pairs, *(place % (pairs + 1) for place in places)})
    edges = edges if len(edges) > 1 else [0, 0]
    parts = [
        match.count_pairs(image[a:b], text[a:b], similarity[a:b], clusters)
        for a, b in itertools.pairwise(edges)
    ]
    merged = match.merge_counts(parts)
    one_by_one = match.sum_counts(iter(parts))
    for cells, counted, summed in (merged, one_by_one):
        assert (np.diff(cells) > 0).all()
        np.testing.assert_array_equal(cells, np.flatnonzero(counts))
        np.testing.assert_array_equal(counted, counts.reshape(-1)[cells])
        np.testing.assert_allclose(summed, cosines.reshape(-1)[cells], atol=1e-9)
    for at_once, column in zip(merged, one_by_one, strict=True):
        assert at_once.tobytes() == column.tobytes()
    assert [column.dtype for column in one_by_one] == [np.int64, np.int64, np.float64]


@pytest.mark.parametrize("clusters", [3, 40])
def test_many_tables_are_added_in_their_order(clusters):
    """Cosines of such different size that adding them in another order would round otherwise."""
    rng = np.random.default_rng(clusters)
    parts, expected = [], {}
    for _ in range(200):
        cells = np.sort(
            rng.choice(clusters**2, rng.integers(0, clusters**2 // 3), replace=False)
        ).astype(np.int64)
        parts.append(
            (cells, rng.integers(1, 9, len(cells)), 10.0 ** rng.uniform(-8, 8, len(cells)))
        )
        for cell, count, cosine in zip(*parts[-1], strict=True):
            counted, summed = expected.get(cell, (0, 0.0))
            expected[cell] = counted + count, summed + cosine
    cells, counts, cosines = match.sum_counts(parts)
    assert cells.tolist() == sorted(expected)
    assert [(count, cosine) for count, cosine in zip(counts, cosines, strict=True)] == [
        expected[c] for c in cells
    ]


def test_cell_numbers_do_not_overflow():
    """K * K is beyond 32 bits for K = 100,000."""
    cells, counts, _ = match.count_pairs(
        np.array([99_999], np.int32), np.array([99_998], np.int32), np.zeros(1, np.float32), 100_000
    )
    assert (cells.tolist(), counts.tolist()) == ([99_999 * 100_000 + 99_998], [1])


@pytest.mark.parametrize(
    ("policy", "pairs", "kept"),
    [
        ("keep", 10_000, True),
        ("drop", 2, False),
        ("auto", 100, True),
        ("auto", 299, True),
        ("auto", 300, False),
        ("auto", 500, False),
    ],
)
def test_empty_matches_stay_by_policy(policy, pairs, kept):
    table = np.array([[4, 0, 0], [0, 0, 1], [0, 0, 0]])
    cells, counts = sparse(table)
    text_of = np.array([0, 2, 1])
    found = match.matched_clusters(
        cells, counts, np.array([2.0, 0.25]), text_of, pairs, MatchConfig(pairless=policy)
    )
    assert found["image_cluster"].tolist() == ([0, 1, 2] if kept else [0, 1])
    assert found["text_cluster"].tolist() == ([0, 2, 1] if kept else [0, 2])
    assert found["shared"].tolist() == ([4, 1, 0] if kept else [4, 1])
    assert found["pairless"].tolist() == ([False, False, True] if kept else [False, False])
    assert found["mean_cosine"].tolist() == ([0.5, 0.25, 0] if kept else [0.5, 0.25])


def test_without_filter_the_matches_are_the_same():
    cells, counts = sparse(np.array([[4, 0, 0], [0, 0, 1], [0, 0, 0]]))
    for pairless, pairs in (("auto", 299), ("auto", 300), ("keep", 300), ("drop", 2)):
        plain, unfiltered = (
            match.matched_clusters(
                cells,
                counts,
                np.ones(2),
                np.array([0, 2, 1]),
                pairs,
                MatchConfig(pairless=pairless, filter=on),
            )
            for on in (True, False)
        )
        assert {name: column.tolist() for name, column in plain.items()} == {
            name: column.tolist() for name, column in unfiltered.items()
        }


def test_matches_of_an_empty_table():
    nothing = np.zeros(0, np.int64)
    found = match.matched_clusters(
        nothing, nothing, np.zeros(0), np.array([1, 0]), 2, MatchConfig(pairless="keep")
    )
    assert found["pairless"].all()
    assert found["shared"].tolist() == [0, 0]


@settings(max_examples=30)
@given(TABLES, st.integers(0, 10**6))
def test_matches_look_up_the_right_cells(table, seed):
    clusters = len(table)
    text_of = np.random.default_rng(seed).permutation(clusters)
    cells, counts = sparse(table)
    found = match.matched_clusters(
        cells, counts, counts * 0.5, text_of, clusters, MatchConfig(pairless="keep")
    )
    expected = table[np.arange(clusters), text_of]
    np.testing.assert_array_equal(found["shared"], expected)
    np.testing.assert_array_equal(found["pairless"], expected == 0)
    np.testing.assert_array_equal(found["mean_cosine"], np.where(expected > 0, 0.5, 0))


@pytest.mark.parametrize(("clusters", "expected"), [(300, 299), (299, 299), (100, 100)])
def test_a_forced_empty_match(clusters, expected):
    """Image and text cluster 0 have a row each, but with partners that share four rows.

    From 300 pairs on the match is left out, below it stays as its two means; never a NaN.
    """
    rng = np.random.default_rng(2)
    others = np.repeat(np.arange(1, clusters), 4)
    image = np.concatenate([others, [0], [1]]).astype(np.int32)
    text = np.concatenate([others, [1], [0]]).astype(np.int32)
    vectors = rng.standard_normal((2, len(image), 6)).astype(np.float32)
    cells, counts, cosines = match.merge_counts(
        [match.count_pairs(image, text, np.ones(len(image)), clusters)]
    )
    text_of = match.assign_clusters(cells, counts, clusters)
    np.testing.assert_array_equal(text_of, np.arange(clusters))
    found = match.matched_clusters(cells, counts, cosines, text_of, clusters, MatchConfig())
    assert len(found["shared"]) == expected
    assert found["pairless"].sum() == (expected == clusters)
    pairs = prototypes.Matches(found["image_cluster"], found["text_cluster"], found["pairless"])
    keys = [str(i) for i in range(len(image))]
    made = prototypes.means(
        prototypes.shard_sums(
            prototypes.ShardPairs(
                "s", keys, vectors[0], np.arange(len(keys)), vectors[1], image, text
            ),
            pairs,
            clusters,
        )
    )
    assert len(made.match) == expected
    assert np.isfinite(made.image).all()
    assert np.isfinite(made.text).all()
    assert np.isfinite(made.cosine).all()

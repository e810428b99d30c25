"""Contingency tables against dense ones, and what becomes of matches."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pds_ray.config import MatchConfig
from pds_ray.stages import assign, match, prototypes


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
    st.integers(1, 4),
)
def test_counts_equal_a_dense_table_however_the_shards_are_cut(seed, pairs, clusters, places, cuts):
    image, text, similarity = labelled(seed, pairs, clusters)
    counts = np.zeros((clusters, clusters), np.int64)
    kept = image >= 0
    np.add.at(counts, (image[kept], text[kept]), 1)

    edges = sorted({0, pairs, *(place % (pairs + 1) for place in places)})
    edges = edges if len(edges) > 1 else [0, 0]
    shards = [slice(a, b) for a, b in itertools.pairwise(edges)]
    parts = [match.count_pairs(image[mine], text[mine], clusters) for mine in shards]
    cells, counted = match.merge_counts(match.merge_counts(*parts[:2]), *parts[2:])
    assert [column.dtype for column in (cells, counted)] == [np.int64, np.int64]
    np.testing.assert_array_equal(cells, np.flatnonzero(counts))
    np.testing.assert_array_equal(counted, counts.reshape(-1)[cells])
    assert match.size_of((cells, counted)) == ((counts > 0).sum(), kept.sum())

    bounds = np.linspace(0, clusters, cuts + 1).astype(int)
    for place, (mine, found) in enumerate(match.split_counts((cells, counted), bounds, clusters)):
        rows = slice(bounds[place], bounds[place + 1])
        dense = np.zeros_like(counts)
        dense[rows] = counts[rows]
        np.testing.assert_array_equal(mine, np.flatnonzero(dense))
        np.testing.assert_array_equal(found, dense.reshape(-1)[mine])

    text_of = np.random.default_rng(seed).permutation(clusters)
    sums = [match.matched_cosines(image[m], text[m], similarity[m], text_of) for m in shards]
    for cluster in range(clusters):
        shared = (image == cluster) & (text == text_of[cluster])
        exact = math.fsum(similarity[shared].tolist())
        assert sum(sums)[cluster] == pytest.approx(exact, abs=len(sums) * 2.0**-32)
    assert sum(sums).tobytes() == sum(reversed(sums)).tobytes()


def test_cell_numbers_do_not_overflow():
    """K * K is beyond 32 bits for K = 100,000."""
    cells, counts = match.count_pairs(
        np.array([99_999], np.int32), np.array([99_998], np.int32), 100_000
    )
    assert (cells.tolist(), counts.tolist()) == ([99_999 * 100_000 + 99_998], [1])
    parts = match.split_counts((cells, counts), [0, 99_999, 100_000], 100_000)
    assert [len(part[0]) for part in parts] == [0, 1]


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
    text_of, shared, cosines = np.array([0, 2, 1]), np.array([4, 1, 0]), np.array([2.0, 0.25, 0])
    found = match.matched_clusters(text_of, shared, cosines, pairs, MatchConfig(pairless=policy))
    assert found["image_cluster"].tolist() == ([0, 1, 2] if kept else [0, 1])
    assert found["text_cluster"].tolist() == ([0, 2, 1] if kept else [0, 2])
    assert found["shared"].tolist() == ([4, 1, 0] if kept else [4, 1])
    assert found["pairless"].tolist() == ([False, False, True] if kept else [False, False])
    assert found["mean_cosine"].tolist() == ([0.5, 0.25, 0] if kept else [0.5, 0.25])


def test_without_filter_the_matches_are_the_same():
    columns = np.array([0, 2, 1]), np.array([4, 1, 0]), np.array([1.0, 1.0, 0])
    for pairless, pairs in (("auto", 299), ("auto", 300), ("keep", 300), ("drop", 2)):
        plain, unfiltered = (
            match.matched_clusters(*columns, pairs, MatchConfig(pairless=pairless, filter=on))
            for on in (True, False)
        )
        assert {name: column.tolist() for name, column in plain.items()} == {
            name: column.tolist() for name, column in unfiltered.items()
        }


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
    table = match.table_of([match.count_pairs(image, text, clusters)], clusters)
    text_of, shared = assign.assign_clusters(table)
    np.testing.assert_array_equal(text_of, np.arange(clusters))
    cosines = match.matched_cosines(image, text, np.ones(len(image), np.float32), text_of)
    found = match.matched_clusters(text_of, shared, cosines, clusters, MatchConfig())
    np.testing.assert_array_equal(found["mean_cosine"], found["shared"] > 0)
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

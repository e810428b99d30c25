"""Lloyd's algorithm in parts against brute force, scikit-learn and Python's whole numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.cluster import KMeans

from pds_ray.stages import lloyd, products

FINITE = {"allow_nan": False, "allow_infinity": False}


def sample(seed: int, rows: int = 200, dim: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((rows, dim)) * 3 + rng.standard_normal(dim)
    return vectors.astype(np.float32), rng.integers(1, 6, rows).astype(np.float32)


def in_parts(vectors: np.ndarray, weights: np.ndarray, *ends: int) -> lloyd.Rows:
    return list(zip(np.split(vectors, ends), np.split(weights, ends), strict=True))


def iterate(
    parts: lloyd.Rows, centroids: np.ndarray, groups: int = 1, ranges: int = 1
) -> tuple[np.ndarray, float]:
    """Do an iteration as tasks do it: rows in groups, sums in ranges of clusters."""
    clusters = len(centroids)
    exponent = lloyd.exponent([lloyd.extent(*part) for part in parts])
    bounds = [clusters * number // ranges for number in range(ranges + 1)]
    found, objectives = [], []
    for group in lloyd.slices([len(weights) for _, weights in parts], groups):
        rows = [(parts[part][0][a:b], parts[part][1][a:b]) for part, a, b in group]
        labels = np.concatenate(list(lloyd.label(rows, products.as_centroids(centroids))))
        found.append(lloyd.sums(rows, labels, exponent).split(bounds))
        objectives += lloyd.objectives(rows, labels, centroids)
    means = [
        lloyd.means((start, end), exponent, *own)
        for start, end, own in zip(bounds, bounds[1:], zip(*found, strict=True), strict=False)
    ]
    joined = [np.concatenate(side) for side in zip(*means, strict=True)]
    return lloyd.with_copies(*joined), math.fsum(objectives)


def squared_distances(vectors: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    apart = vectors.astype(np.float64)[:, None] - centroids.astype(np.float64)[None]
    return (apart**2).sum(axis=2)


def brute_force(
    vectors: np.ndarray, weights: np.ndarray, centroids: np.ndarray
) -> tuple[np.ndarray, float]:
    distances = squared_distances(vectors, centroids)
    labels = distances.argmin(axis=1)
    moved = [
        np.average(vectors[labels == label], axis=0, weights=weights[labels == label])
        if (labels == label).any()
        else np.full(vectors.shape[1], np.nan)
        for label in range(len(centroids))
    ]
    return np.array(moved), float((distances.min(axis=1) * weights).sum())


@pytest.mark.parametrize("seed", range(6))
def test_iterations_are_those_of_brute_force(seed: int) -> None:
    vectors, weights = sample(seed)
    ours, parts = vectors[:7], in_parts(vectors, weights, 50, 51, 120)
    theirs, objectives = vectors[:7].astype(np.float64), []
    for _ in range(10):
        ours, objective = iterate(parts, ours)
        theirs, expected = brute_force(vectors, weights, theirs)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
        assert objective == pytest.approx(expected, rel=1e-6)
        objectives.append(objective)
    assert objectives == sorted(objectives, reverse=True)
    assert ours.dtype == np.float32


def test_an_iteration_rounds_each_mean_once() -> None:
    """Values of 24 bits within 2^10 of the largest lose nothing in sums: the mean is exact."""
    vectors, weights = sample(7)
    found, _ = iterate(in_parts(vectors, weights), vectors[:4])
    labels = squared_distances(vectors, vectors[:4]).argmin(axis=1)
    for label in range(4):
        mine = labels == label
        exact = [
            math.fsum(np.float64(vectors[mine, column]) * weights[mine])
            / weights[mine].sum(dtype=np.float64)
            for column in range(vectors.shape[1])
        ]
        np.testing.assert_array_equal(found[label], np.array(exact).astype(np.float32))


def test_scikit_learn_goes_the_same_way() -> None:
    vectors, weights = sample(8, rows=500)
    start, parts = vectors[:9], in_parts(vectors, weights, 200)
    ours = start
    for _ in range(12):
        ours, _ = iterate(parts, ours)
    theirs = KMeans(9, init=start, n_init=1, max_iter=12, tol=0, algorithm="lloyd").fit(
        vectors.astype(np.float64), sample_weight=weights
    )
    np.testing.assert_allclose(ours, theirs.cluster_centers_, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 4, 50])
@pytest.mark.parametrize("ranges", [1, 3])
def test_any_grouping_gives_the_same_bytes(
    groups: int, ranges: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So do parts in another order: each is cut into the same blocks."""
    monkeypatch.setattr(lloyd, "BLOCK_ROWS", 16)
    vectors, weights = sample(9)
    parts = in_parts(vectors, weights, 50, 51, 120)
    expected, objective = iterate(parts, vectors[:7])
    for permuted in (parts, parts[::-1]):
        found, same = iterate(permuted, vectors[:7], groups, ranges)
        assert found.tobytes() == expected.tobytes()
        assert same == objective


def test_a_weight_counts_as_copies() -> None:
    vectors, weights = sample(10)
    copies = np.repeat(vectors, weights.astype(int), axis=0)
    weighted, objective = iterate(in_parts(vectors, weights), vectors[:7])
    copied, same = iterate(in_parts(copies, np.ones(len(copies), np.float32)), vectors[:7])
    assert weighted.tobytes() == copied.tobytes()
    assert objective == pytest.approx(same, rel=1e-12)


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=12).filter(any),
    st.integers(1, 20),
)
def test_slices_hold_each_row_once_in_order(rows: list[int], count: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lloyd, "BLOCK_ROWS", 8)
        shared = lloyd.slices(rows, count)
    assert 1 <= len(shared) <= count
    assert all(shared)
    found = [(part, row) for own in shared for part, a, b in own for row in range(a, b)]
    assert found == [(part, row) for part, length in enumerate(rows) for row in range(length)]
    assert all(
        a % 8 == 0 and (b % 8 == 0 or b == rows[part]) for own in shared for part, a, b in own
    )
    sizes = [sum(b - a for _, a, b in own) for own in shared]
    assert max(sizes) <= sum(rows) / count + 8


@given(
    arrays(
        np.float32,
        st.tuples(st.integers(1, 12), st.integers(1, 4)),
        elements=st.floats(width=32, **FINITE),
    ),
    st.sampled_from([1, 3, 2**24]),
    st.booleans(),
)
def test_no_sum_overflows(vectors: np.ndarray, weight: int, alike: bool) -> None:
    """In Python's whole numbers they are the same, even if all rows are of one cluster."""
    if alike:
        vectors = np.repeat(np.abs(vectors).max(axis=0, keepdims=True), len(vectors), axis=0)
    weights = np.full(len(vectors), weight, np.float32)
    rows = [(vectors, weights)]
    exponent = lloyd.exponent([lloyd.extent(*rows[0])])
    found = lloyd.sums(rows, np.zeros(len(vectors), np.int32), exponent)
    exact = [
        sum(weight * round(math.ldexp(float(value), exponent)) for value in column)
        for column in vectors.T
    ]
    assert found.vector.tolist() == [exact]
    assert all(abs(total) <= 2**62 for total in exact)
    assert found.weight.tolist() == [weight * len(vectors)]
    mean, _ = lloyd.means((0, 1), exponent, found)
    assert np.isfinite(mean).all()
    largest = np.abs(vectors).max()
    off = np.abs(mean[0] - vectors.astype(np.float64).mean(axis=0))
    assert (off <= largest * 2.0**-23 + 2.0**-149).all()


def test_sums_added_up_are_those_of_all_rows() -> None:
    vectors, weights = sample(11)
    labels = np.random.default_rng(0).integers(0, 30, 200).astype(np.int32)
    whole = lloyd.sums([(vectors, weights)], labels, 20)
    parts = [
        lloyd.sums([(vectors[some], weights[some])], labels[some], 20)
        for some in (slice(0, 3), slice(3, 90), slice(90, 200))
    ]
    added = lloyd.add(*parts)
    for name in ("cluster", "vector", "weight"):
        np.testing.assert_array_equal(getattr(added, name), getattr(whole, name))
    assert len(parts[0].cluster) <= 3, "of those clusters alone that have any"


def test_empty_clusters_are_near_the_heaviest() -> None:
    centroids = np.array([[0, 0], [8, 8], [0, 0], [4, -4], [0, 0], [0, 0]], np.float32)
    weights = np.array([0, 2, 0, 9, 0, 0])
    found = lloyd.with_copies(centroids.copy(), weights)
    up, down = 1 + 2.0**-10, 1 - 2.0**-10
    expected = [
        [4 * up, -4 * down], [8, 8], [8 * up, 8 * down], [4, -4], [4 * up, -4 * down],
        [8 * up, 8 * down],
    ]  # fmt: skip
    np.testing.assert_array_equal(found, np.array(expected, np.float32))


def test_an_empty_cluster_takes_a_part_of_a_heavy_one() -> None:
    """Started from two equal centroids, as from duplicates, both have rows an iteration later."""
    vectors, weights = sample(12, rows=100)
    centroids, before = iterate(in_parts(vectors, weights), np.repeat(vectors[:1], 2, axis=0))
    for _ in range(10):
        centroids, now = iterate(in_parts(vectors, weights), centroids)
    labels = squared_distances(vectors, centroids).argmin(axis=1)
    assert set(labels) == {0, 1}
    assert now < 0.9 * before


def test_duplicates_and_as_many_clusters_as_rows_reach_zero() -> None:
    data = np.repeat(np.array([[0, 0], [9, 0], [0, 1e-3]], np.float32), 4, axis=0)
    ones = np.ones(12, np.float32)
    centroids = data.copy()
    for _ in range(3):
        centroids, objective = iterate(in_parts(data, ones, 5), centroids, groups=2)
    assert objective == 0
    vectors, weights = sample(13, rows=40)
    found, objective = iterate(in_parts(vectors, weights), vectors)
    assert objective == 0
    np.testing.assert_array_equal(found, vectors)


def test_a_fit_rests_at_a_small_change() -> None:
    assert lloyd.resting(100.0, 99.5, 0.01)
    assert not lloyd.resting(100.0, 99.0, 0.01)
    assert not lloyd.resting(100.0, 100.0, 0)
    assert not lloyd.resting(math.inf, 100.0, 0.5), "the first iteration has none before"
    assert not lloyd.resting(math.inf, 0.0, 0.5), "nor has one that finds all rows at rest"
    assert lloyd.resting(0.0, 0.0, 1e-4), "no change, of no objective"
    assert not lloyd.resting(0.0, 0.0, 0)
    assert not lloyd.resting(0.0, 1e-20, 1e-4)


def start(parts: lloyd.Rows, clusters: int, groups: int, seed: int) -> np.ndarray:
    """Draw centres in rounds as tasks do, the first ones being the first rows."""
    shared = lloyd.slices([len(weights) for _, weights in parts], groups)
    rows = [[(parts[p][0][a:b], parts[p][1][a:b]) for p, a, b in own] for own in shared]
    first, *others = lloyd.round_sizes(clusters)
    rng = np.random.default_rng(seed)
    found, known = [np.concatenate([vectors for vectors, _ in parts])[:first]], [None] * len(rows)
    for count in others:
        centres = products.as_centroids(found[-1])
        known = [lloyd.nearest(own, centres, k) for own, k in zip(rows, known, strict=True)]
        masses = [lloyd.masses(own, k) for own, k in zip(rows, known, strict=True)]
        draws = lloyd.draw([each for own in masses for each in own], count, rng)
        ends = np.cumsum([0, *map(len, masses)])
        found.append(
            np.concatenate(
                [
                    lloyd.drawn(own, k, draws.of(int(a), int(b)))
                    for own, k, a, b in zip(rows, known, ends, ends[1:], strict=False)
                ]
            )
        )
    return np.concatenate(found)


@pytest.mark.parametrize("groups", [1, 2, 4, 50])
def test_a_start_is_of_rows_and_the_same_for_any_grouping(
    groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lloyd, "BLOCK_ROWS", 16)
    vectors, weights = sample(14)
    parts = in_parts(vectors, weights, 50, 51, 120)
    found = start(parts, 40, groups, 0)
    assert found.tobytes() == start(parts, 40, 1, 0).tobytes()
    assert found.shape == (40, 5)
    assert {row.tobytes() for row in found} <= {row.tobytes() for row in vectors}
    assert len({row.tobytes() for row in found}) > 35, "rows that are taken have no mass"
    assert found.tobytes() != start(parts, 40, 1, 1).tobytes()


def test_centres_are_drawn_by_weight_and_squared_distance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Shares of 30,000 draws among six rows, of blocks of two."""
    monkeypatch.setattr(lloyd, "BLOCK_ROWS", 2)
    vectors = np.array([[0], [1], [2], [3], [1], [5]], np.float32)
    weights = np.array([1, 4, 2, 1, 1, 3], np.float32)
    rows = [(vectors[:3], weights[:3]), (vectors[3:], weights[3:])]
    distances = lloyd.nearest(rows, products.as_centroids(vectors[:1]), None)
    np.testing.assert_array_equal(distances, [0, 1, 4, 9, 1, 25])
    further = lloyd.nearest(rows, products.as_centroids(vectors[5:]), distances)
    np.testing.assert_array_equal(further, [0, 1, 4, 4, 1, 0])
    draws = lloyd.draw(lloyd.masses(rows, distances), 30_000, np.random.default_rng(0))
    found = lloyd.drawn(rows, distances, draws)[:, 0]
    mass = {1: 4 + 1, 2: 8, 3: 9, 5: 75}
    for value, expected in mass.items():
        assert (found == value).mean() == pytest.approx(expected / 97, abs=1e-3)
    assert not (found == 0).any()


def test_a_start_where_few_rows_differ_has_copies() -> None:
    data = np.repeat(np.array([[0, 0], [9, 0]], np.float32), 20, axis=0)
    found = start([(data, np.ones(40, np.float32))], 10, 2, 0)
    assert found.shape == (10, 2)
    assert set(map(tuple, found)) == {(0, 0), (9, 0)}

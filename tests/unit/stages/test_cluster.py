"""K-means against scikit-learn's, copies of rows and brute force."""

from __future__ import annotations

import sys

import faiss
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from pds_ray.config import ClusterConfig, ConfigError
from pds_ray.stages import cluster, vectors

CONFIG = ClusterConfig(iterations=50, tolerance=0, restarts=5)

FINITE = {"allow_nan": False, "allow_infinity": False, "allow_subnormal": False}


def blobs(seed: int = 0, count: int = 8, each: int = 60, dim: int = 6) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((count, dim)) * 10
    return np.concatenate([centre + rng.standard_normal((each, dim)) for centre in centres]).astype(
        np.float32
    )


def squared_distances(vectors: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    a, b = vectors.astype(np.float64), centroids.astype(np.float64)
    return ((a[:, None] - b[None]) ** 2).sum(axis=2)


def objective(vectors: np.ndarray, weights: np.ndarray, centroids: np.ndarray) -> float:
    return float((squared_distances(vectors, centroids).min(axis=1) * weights).sum())


@pytest.mark.parametrize(
    ("data", "clusters", "slack"),
    [
        pytest.param(blobs(), 8, 1.02, id="blobs"),
        pytest.param(
            np.random.default_rng(1).standard_normal((600, 5)).astype(np.float32),
            10,
            1.05,
            id="random",
        ),
        pytest.param(
            np.random.default_rng(2).random((300, 16)).astype(np.float32),
            30,
            1.05,
            id="many clusters",
        ),
    ],
)
def test_as_good_as_scikit_learn(data, clusters, slack):
    ones = np.ones(len(data), np.float32)
    ours = cluster.fit(data, ones, clusters, 0, CONFIG)
    theirs = KMeans(clusters, n_init=5, random_state=0).fit(data)
    assert ours.centroids.shape == (clusters, data.shape[1])
    assert ours.centroids.dtype == np.float32
    assert ours.rows == len(data)
    assert objective(data, ones, ours.centroids) <= slack * theirs.inertia_


def test_a_single_fit_is_as_good_as_scikit_learn_s():
    """One start each, as by default, on overlapping blobs that a plain start divides badly."""
    data = blobs(seed=30, count=40, each=50, dim=4)
    ones = np.ones(len(data), np.float32)
    ours = [
        objective(data, ones, cluster.fit(data, ones, 40, s, ClusterConfig()).centroids)
        for s in range(8)
    ]
    theirs = [
        KMeans(40, init="k-means++", n_init=1, random_state=s).fit(data).inertia_ for s in range(8)
    ]
    assert np.mean(ours) <= 1.02 * np.mean(theirs)


def greedy_by_definition(
    vectors: np.ndarray, weights: np.ndarray, clusters: int, rng: np.random.Generator
) -> np.ndarray:
    """Each candidate's potential from its definition, same draws. All rows are candidates."""

    def potential(seeds: list[int]) -> float:
        return objective(vectors, weights, vectors[seeds])

    chosen = [int(rng.choice(len(vectors), p=weights / weights.sum()))]
    while len(chosen) < clusters:
        mass = weights * squared_distances(vectors, vectors[chosen]).min(axis=1)
        drawn = [
            next(row for row in range(len(vectors)) if mass[: row + 1].sum() > share * mass.sum())
            for share in rng.random(2 + int(np.log(clusters)))
        ]
        chosen.append(min(drawn, key=lambda row: potential([*chosen, row])))
    return vectors[chosen]


@pytest.mark.parametrize("seed", range(12))
def test_seeds_are_those_of_greedy_kmeans_plus_plus(seed):
    rng = np.random.default_rng(seed)
    data = rng.standard_normal((40, 3)).astype(np.float32) + 100
    weights = rng.integers(1, 6, 40).astype(np.float64)
    found = cluster.seeds(data, weights.astype(np.float32), 9, np.random.default_rng(seed))
    np.testing.assert_array_equal(
        found, greedy_by_definition(data, weights, 9, np.random.default_rng(seed))
    )
    assert found.dtype == np.float32


@pytest.mark.parametrize("seed", range(12))
def test_seeds_take_weights_for_copies(seed):
    rng = np.random.default_rng(seed)
    data = rng.standard_normal((30, 3)).astype(np.float32)
    weights = rng.integers(0, 6, 30)
    copies = np.repeat(data, weights, axis=0)
    found = cluster.seeds(data, weights.astype(np.float32), 8, np.random.default_rng(seed))
    ones = np.ones(len(copies), np.float32)
    np.testing.assert_array_equal(
        found, cluster.seeds(copies, ones, 8, np.random.default_rng(seed))
    )


@pytest.mark.parametrize("clusters", [1, 3, 5, 12])
def test_seeds_of_duplicates_hold_every_point(clusters):
    data = np.repeat(np.array([[0, 0], [9, 0], [0, 1e-3]], np.float32), 4, axis=0)
    found = cluster.seeds(data, np.ones(12, np.float32), clusters, np.random.default_rng(0))
    assert found.shape == (clusters, 2)
    assert len(np.unique(found, axis=0)) == min(clusters, 3)
    assert set(map(tuple, found)) <= set(map(tuple, data))


def test_seeds_of_many_rows_are_of_a_sample():
    """400 rows a cluster: one seed in each blob all the same, rows of weight 0 never."""
    data = blobs(seed=31, count=8, each=400, dim=6)
    weights = np.tile(np.array([0, 1, 3, 0], np.float32), 800)
    found = cluster.seeds(data, weights, 8, np.random.default_rng(1))
    rows = [int(np.flatnonzero((data == seed).all(axis=1))[0]) for seed in found]
    assert sorted(row // 400 for row in rows) == list(range(8))
    assert (weights[rows] > 0).all()


@given(
    arrays(
        np.float32,
        st.tuples(st.integers(1, 8), st.integers(1, 5)),
        elements=st.floats(width=32, **FINITE),
    )
)
def test_products_of_seeds_are_exact(vectors):
    """In Python's whole numbers they are the same; so are those of any order of additions."""
    points = cluster._whole(vectors)
    exact = [
        [sum(int(a) * int(b) for a, b in zip(x, y, strict=True)) for y in points] for x in points
    ]
    assert (points == np.rint(points)).all()
    assert all(abs(product) < 2**51 for row in exact for product in row)
    assert (points @ points.T).tolist() == exact


def test_the_same_seeds_whatever_the_threads():
    rng = np.random.default_rng(32)
    data = rng.standard_normal((2_003, 129)).astype(np.float32)
    weights = rng.integers(1, 6, 2_003).astype(np.float32)
    found = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            found.append(cluster.seeds(data, weights, 101, np.random.default_rng(3)).tobytes())
    assert (
        found[0]
        == found[1]
        != cluster.seeds(data, weights, 101, np.random.default_rng(4)).tobytes()
    )


def test_the_fit_begins_from_the_seeds(monkeypatch):
    """One iteration from them, by brute force."""
    data = np.random.default_rng(33).standard_normal((300, 4)).astype(np.float32)
    weights = np.random.default_rng(34).integers(1, 6, 300).astype(np.float32)
    begun = data[[5, 250, 17, 99]] + np.float32(0.1)
    monkeypatch.setattr(cluster, "seeds", lambda *_: begun)
    labels = squared_distances(data, begun).argmin(axis=1)
    means = [
        np.average(data[labels == label], axis=0, weights=weights[labels == label])
        for label in range(4)
    ]
    found = cluster.fit(data, weights, 4, 0, ClusterConfig(iterations=1)).centroids
    np.testing.assert_allclose(found, means, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(cluster, "SEED_LIMIT", 3)
    assert (
        np.abs(
            cluster.fit(data, weights, 4, 0, ClusterConfig(iterations=1)).centroids - means
        ).max()
        > 0.1
    )


def test_a_fit_ends_at_the_tolerance():
    """At a half the first change is small enough: two iterations. None is too small for 0."""
    data = np.random.default_rng(35).standard_normal((3_000, 4)).astype(np.float32)
    ones = np.ones(len(data), np.float32)

    def fitted(iterations: int, tolerance: float) -> cluster.Fit:
        return cluster.fit(
            data, ones, 20, 0, ClusterConfig(iterations=iterations, tolerance=tolerance)
        )

    assert whole(fitted(40, 0.5)) == whole(fitted(2, 0))
    by_tolerance = [fitted(200, tolerance).objective for tolerance in (0.5, 1e-2, 1e-3, 0)]
    assert by_tolerance == sorted(by_tolerance, reverse=True)
    assert len(set(by_tolerance)) == 4


def test_reports_the_weighted_objective_of_what_it_returns():
    data = blobs()
    weights = np.random.default_rng(4).integers(1, 9, len(data)).astype(np.float32)
    fitted = cluster.fit(data, weights, 8, 0, CONFIG)
    assert fitted.objective == pytest.approx(objective(data, weights, fitted.centroids), rel=1e-3)


def test_the_best_restart_is_kept():
    """Restarts are drawn one after the other, so that more of them can only be better."""
    data = np.random.default_rng(12).random((400, 3)).astype(np.float32)
    weights = np.random.default_rng(13).integers(1, 6, 400).astype(np.float32)
    found = [
        cluster.fit(data, weights, 25, 0, ClusterConfig(restarts=r)).objective for r in (1, 2, 4, 8)
    ]
    assert found == sorted(found, reverse=True)
    assert found[-1] < found[0]


def test_weights_count_as_copies():
    """A weighted fit and a fit on repeated rows are judged by the same outside objective."""
    data = np.random.default_rng(5).standard_normal((300, 4)).astype(np.float32)
    weights = np.random.default_rng(6).integers(1, 6, 300)
    repeated = np.repeat(data, weights, axis=0)
    ones = np.ones(len(repeated), np.float32)
    weighted = cluster.fit(data, weights.astype(np.float32), 6, 0, CONFIG).centroids
    copied = cluster.fit(repeated, ones, 6, 0, CONFIG).centroids
    assert objective(repeated, ones, weighted) <= 1.03 * objective(repeated, ones, copied)
    # each centroid is the weighted mean of its own rows, which an unweighted fit's is not
    labels = squared_distances(data, weighted).argmin(axis=1)
    for label in range(6):
        mine = labels == label
        expected = np.average(data[mine].astype(np.float64), axis=0, weights=weights[mine])
        np.testing.assert_allclose(weighted[label], expected, atol=2e-3)


def test_a_heavy_row_draws_the_only_centroid():
    data = np.array([[0.0], [10.0]], np.float32)
    fitted = cluster.fit(data, np.array([9, 1], np.float32), 1, 0, CONFIG)
    assert fitted.centroids[0, 0] == pytest.approx(1.0, abs=1e-5)
    assert fitted.objective == pytest.approx(9 * 1 + 1 * 81, rel=1e-5)


def test_all_rows_are_used():
    """FAISS would sample 256 rows per cluster: the mean of the whole shows that none is missing."""
    data = np.random.default_rng(8).random((3_000, 2)).astype(np.float32)
    data[-1] = 50_000
    fitted = cluster.fit(data, np.ones(len(data), np.float32), 1, 0, ClusterConfig(iterations=3))
    np.testing.assert_allclose(fitted.centroids[0], data.astype(np.float64).mean(axis=0), rtol=1e-4)


def test_duplicate_rows_still_give_k_centroids():
    """Three points and four clusters: one must stay empty or double, none may vanish or be NaN."""
    data = np.repeat(np.array([[0, 0], [9, 0], [0, 9]], np.float32), 4, axis=0)
    fitted = cluster.fit(data, np.ones(12, np.float32), 4, 0, CONFIG)
    assert fitted.centroids.shape == (4, 2)
    assert np.isfinite(fitted.centroids).all()
    assert objective(data, np.ones(12), fitted.centroids) < 1e-3


def test_same_seed_same_bytes_whatever_the_threads():
    rng = np.random.default_rng(10)
    data = rng.standard_normal((5_000, 64)).astype(
        np.float32
    )  # enough for FAISS's own distances to differ
    weights = rng.integers(1, 6, 5_000).astype(np.float32)
    config = ClusterConfig(iterations=5)
    before = faiss.omp_get_max_threads()
    found = {}
    try:
        for threads in (1, 2):
            faiss.omp_set_num_threads(threads)
            found[threads] = whole(cluster.fit(data, weights, 100, 3, config))
    finally:
        faiss.omp_set_num_threads(before)
    again = whole(cluster.fit(data, weights, 100, 3, config))
    assert found[1] == found[2] == again
    assert whole(cluster.fit(data, weights, 100, 4, config)) != again


def whole(fitted: cluster.Fit) -> tuple[bytes, float, int]:
    return fitted.centroids.tobytes(), fitted.objective, fitted.rows


def test_the_fit_leaves_its_vectors_alone():
    data = blobs()
    before = data.copy()
    cluster.fit(data, np.ones(len(data), np.float32), 4, 0, ClusterConfig(normalize=True))
    np.testing.assert_array_equal(data, before)


def test_normalized_leaves_zero_rows():
    np.testing.assert_allclose(
        vectors.normalized(np.array([[3.0, 4], [0, 0]])), [[0.6, 0.8], [0, 0]]
    )


def test_too_few_vectors():
    data = np.eye(4, dtype=np.float32)
    with pytest.raises(ValueError, match="3 vectors cannot make 4 clusters"):
        cluster.fit(data, np.array([1, 1, 0, 1], np.float32), 4, 0, CONFIG)
    assert cluster.fit(data, np.ones(4, np.float32), 4, 0, CONFIG).objective == pytest.approx(
        0, abs=1e-6
    )


def test_sample_depends_on_seed_and_shard_alone():
    rows = cluster.sample_rows(10_000, 0.3, 7, "image/00001")
    np.testing.assert_array_equal(rows, cluster.sample_rows(10_000, 0.3, 7, "image/00001"))
    assert (np.diff(rows) > 0).all()
    assert 0 <= rows[0] <= rows[-1] < 10_000
    for seed, shard in ((8, "image/00001"), (7, "image/00002"), (7, "text/00001")):
        other = cluster.sample_rows(10_000, 0.3, seed, shard)
        # independent draws of 30 % overlap in 9 % of the rows (standard deviation 0.3 %)
        assert len(np.intersect1d(rows, other)) / 10_000 == pytest.approx(0.09, abs=0.015)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
def test_sample_has_the_right_share(share):
    drawn = sum(len(cluster.sample_rows(2_000, share, 0, f"s{i}")) for i in range(50))
    assert drawn / 100_000 == pytest.approx(share, abs=5 * (share * (1 - share) / 100_000) ** 0.5)


def test_whole_sample():
    assert cluster.sample_rows(5, 1.0, 0, "s").tolist() == [0, 1, 2, 3, 4]
    assert cluster.sample_rows(0, 0.5, 0, "s").tolist() == []


def test_sample_share_fits_the_budget():
    config = ClusterConfig(memory_gib=1)
    assert cluster.sample_share(1_000, 768, config, 100) == 1
    rows, dim = 10**9, 768
    share = cluster.sample_share(rows, dim, config, 100)
    assert 2 * 4 * dim * share * rows == pytest.approx(2**30)
    with pytest.raises(
        ConfigError, match=r"cluster.memory_gib is 1 .* raise it to 23"
    ):  # 39 rows for each of 10**5
        cluster.sample_share(rows, dim, config, 10**5)
    assert cluster.sample_share(150_000, dim, config, 10**5) == 1, "all rows fit: nothing to refuse"
    assert cluster.sample_share(0, dim, config, 100) == 1


@pytest.mark.parametrize(
    ("modality", "expected"),
    [
        ("separate", ("image", "text")),
        ("joint", ("joint",)),
        ("image", ("image",)),
        ("text", ("text",)),
    ],
)
def test_what_is_clustered(modality, expected):
    assert ClusterConfig(modality=modality).spaces == expected


def test_joined_vectors_weigh_both_sides_alike():
    """Squared distances of joined vectors are means of those of both directions, at any length."""
    rng = np.random.default_rng(14)
    images = rng.standard_normal((30, 5)).astype(np.float32) * 40
    texts = rng.standard_normal((30, 5)).astype(np.float32) * 0.01
    joined = vectors.joined(images, texts)
    assert joined.shape == (30, 10)
    assert joined.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(joined, axis=1), 1, rtol=1e-6)
    sides = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (images, texts)]
    expected = sum(squared_distances(side, side) for side in sides) / 2
    np.testing.assert_allclose(squared_distances(joined, joined), expected, atol=1e-6)


@pytest.mark.parametrize("seed", range(112, 120))
def test_a_weighted_fit_does_not_end_by_an_unweighted_objective(seed: int) -> None:
    """FAISS's own objective may rest while the weighted one still falls."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((600, 2)).astype(np.float32)
    weights = np.where(rng.random(600) < 0.1, rng.integers(20, 100, 600), 1).astype(np.float32)
    whole, ended = (
        cluster.fit(vectors, weights, 6, seed, ClusterConfig(tolerance=tolerance)).objective
        for tolerance in (0, 1e-2)
    )
    assert ended == whole


@pytest.mark.parametrize("start", [True, False])
def test_a_fit_that_is_counted_is_faiss_s_own(start):
    data, ones = blobs(5), np.ones(480, np.float32)
    begin = data[:8].copy() if start else None
    config = ClusterConfig(iterations=12, tolerance=0)
    ours = cluster.lloyd(data, ones, 8, begin, 3, config)
    theirs = faiss.Kmeans(
        data.shape[1], 8, niter=12, seed=3, min_points_per_centroid=1, max_points_per_centroid=60,
        init_method=faiss.ClusteringInitMethod_AFK_MC2,
    )  # fmt: skip
    theirs.train(data, weights=ones, init_centroids=begin)
    assert ours.centroids.tobytes() == theirs.centroids.tobytes()


def test_a_fit_tells_how_far_it_is(monkeypatch):
    monkeypatch.setattr(cluster, "COUNT_S", 0.001)
    rows = np.random.default_rng(0).random((20_000, 32)).astype(np.float32)
    told: list[tuple[str, int]] = []
    config = ClusterConfig(iterations=30, tolerance=0, restarts=2)
    cluster.fit(
        rows, np.ones(len(rows), np.float32), 50, 0, config, lambda *what: told.append(what)
    )
    done = [iterations for _, iterations in told]
    assert done == sorted(done)
    assert {("50 seeds to be chosen", 0), ("50 seeds to be chosen", 30)} <= set(told)
    assert any(0 < iterations < 30 for iterations in done)
    assert all(0 <= iterations <= 60 for iterations in done)


@given(st.lists(st.sampled_from([-0.0, 0.0, 1.0, 2.0, 3.0]), min_size=1), st.integers(1, 5))
def test_different_rows_are_counted_up_to_the_clusters(values, most):
    """The two zeros are equal."""
    rows = np.asarray(values, np.float32)[:, None].repeat(2, axis=1)
    assert cluster.count_distinct(rows, most) == min(most, len(set(values)))


def test_rows_without_weight_are_not_counted():
    rows = np.arange(6, dtype=np.float32)[:, None]
    fitted = cluster.fit(rows, np.array([1, 0, 2, 0, 1, 0], np.float32), 3, 0, ClusterConfig())
    assert fitted.distinct == 3
    assert cluster.count_distinct(rows, 9) == 6


def test_equal_rows_are_one():
    rows = np.ones((60, 4), np.float32)
    fitted = cluster.fit(rows, np.ones(60, np.float32), 10, 0, ClusterConfig())
    assert fitted.distinct == 1


def test_an_installation_without_faiss_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    """Before a run reads anything; a selection needs none."""
    from pds_ray import ConfigError, configure, plan, recipe

    config = configure(
        recipe("demo"), {"source": "scenes:5", "pairs": 2, "out": str(tmp_path / "run")}
    )
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match=r"k-means needs FAISS.*pip install 'pds-ray\[cpu\]'"):
        plan(config)
    plan(configure(config, {"method": "random"}))

"""K-means against scikit-learn's, copies of rows and brute force."""

from __future__ import annotations

import dataclasses

import faiss
import numpy as np
import pytest
from sklearn.cluster import KMeans

from pds_ray.config import ClusterConfig, ConfigError
from pds_ray.stages import cluster

CONFIG = ClusterConfig(iterations=50, restarts=5)


def blobs(seed: int = 0, count: int = 8, each: int = 60, dim: int = 6) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((count, dim)) * 10
    return np.concatenate([centre + rng.standard_normal((each, dim)) for centre in centres]).astype(np.float32)


def squared_distances(vectors: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    a, b = vectors.astype(np.float64), centroids.astype(np.float64)
    return ((a[:, None] - b[None]) ** 2).sum(axis=2)


def objective(vectors: np.ndarray, weights: np.ndarray, centroids: np.ndarray) -> float:
    return float((squared_distances(vectors, centroids).min(axis=1) * weights).sum())


@pytest.mark.parametrize(
    ("data", "clusters", "slack"),
    [
        pytest.param(blobs(), 8, 1.02, id="blobs"),
        pytest.param(np.random.default_rng(1).standard_normal((600, 5)).astype(np.float32), 10, 1.05, id="random"),
        pytest.param(np.random.default_rng(2).random((300, 16)).astype(np.float32), 30, 1.05, id="many clusters"),
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


def test_reports_the_weighted_objective_of_what_it_returns():
    data = blobs()
    weights = np.random.default_rng(4).integers(1, 9, len(data)).astype(np.float32)
    fitted = cluster.fit(data, weights, 8, 0, CONFIG)
    assert fitted.objective == pytest.approx(objective(data, weights, fitted.centroids), rel=1e-3)


def test_the_best_restart_is_kept():
    """Restarts are drawn one after the other, so that more of them can only be better."""
    data = np.random.default_rng(12).random((400, 3)).astype(np.float32)
    weights = np.random.default_rng(13).integers(1, 6, 400).astype(np.float32)
    found = [cluster.fit(data, weights, 25, 0, ClusterConfig(restarts=r)).objective for r in (1, 2, 4, 8)]
    assert found == sorted(found, reverse=True)
    assert found[-1] < found[0]


def test_weights_count_as_copies():
    """A weighted fit is judged on the repeated rows beside a fit on them, both by the same outside objective."""
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
    """FAISS would by itself sample 256 rows a cluster: the mean of the whole shows that none was left out."""
    data = np.random.default_rng(8).random((3_000, 2)).astype(np.float32)
    data[-1] = 50_000
    fitted = cluster.fit(data, np.ones(len(data), np.float32), 1, 0, ClusterConfig(iterations=3))
    np.testing.assert_allclose(fitted.centroids[0], data.astype(np.float64).mean(axis=0), rtol=1e-4)


@pytest.mark.parametrize("normalize", [False, True])
def test_assign_equals_brute_force(normalize):
    rng = np.random.default_rng(9)
    data, centroids = (rng.standard_normal((n, 12)).astype(np.float32) * 3 for n in (700, 40))
    data[17] = 0
    labels = cluster.assign(data, centroids, normalize)
    norms = np.linalg.norm(data.astype(np.float64), axis=1, keepdims=True)
    rows = data / np.where(norms > 0, norms, 1) if normalize else data
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, squared_distances(rows, centroids).argmin(axis=1))


def test_assign_nothing():
    assert cluster.assign(np.zeros((0, 3), np.float32), np.ones((2, 3), np.float32), False).shape == (0,)


def test_an_empty_cluster_keeps_its_label():
    """Centroid 1 is far from everything: labels stay 0 and 2."""
    centroids = np.array([[0, 0], [1e6, 1e6], [5, 5]], np.float32)
    labels = cluster.assign(np.array([[0.1, 0], [5, 5.1], [4, 4]], np.float32), centroids, False)
    assert labels.tolist() == [0, 2, 2]


def test_duplicate_rows_still_give_k_centroids():
    """Three different points and four clusters: one must stay empty or double, none may vanish or be NaN."""
    data = np.repeat(np.array([[0, 0], [9, 0], [0, 9]], np.float32), 4, axis=0)
    fitted = cluster.fit(data, np.ones(12, np.float32), 4, 0, CONFIG)
    assert fitted.centroids.shape == (4, 2)
    assert np.isfinite(fitted.centroids).all()
    assert objective(data, np.ones(12), fitted.centroids) < 1e-3


@pytest.mark.parametrize("normalize", [False, True])
def test_same_seed_same_bytes_whatever_the_threads(normalize):
    rng = np.random.default_rng(10)
    data = rng.standard_normal((1_500, 24)).astype(np.float32)
    weights = rng.integers(1, 6, 1_500).astype(np.float32)
    config = ClusterConfig(normalize=normalize)
    before = faiss.omp_get_max_threads()
    found = {}
    try:
        for threads in (1, 2):
            faiss.omp_set_num_threads(threads)
            found[threads] = cluster.fit(data, weights, 20, 3, config).centroids.tobytes()
    finally:
        faiss.omp_set_num_threads(before)
    again = cluster.fit(data, weights, 20, 3, config).centroids.tobytes()
    assert found[1] == found[2] == again
    assert cluster.fit(data, weights, 20, 4, config).centroids.tobytes() != again


def test_normalize_clusters_by_direction():
    """Two directions, lengths all over: only by direction do they part."""
    rng = np.random.default_rng(11)
    angles = np.concatenate([rng.normal(0.2, 0.02, 80), rng.normal(1.2, 0.02, 80)])
    lengths = rng.uniform(0.1, 50, 160)
    data = (np.stack([np.cos(angles), np.sin(angles)], axis=1) * lengths[:, None]).astype(np.float32)
    config = dataclasses.replace(CONFIG, normalize=True)
    centroids = cluster.fit(data, np.ones(160, np.float32), 2, 0, config).centroids
    labels = cluster.assign(data, centroids, True)
    assert len(set(labels[:80])) == len(set(labels[80:])) == 1
    assert labels[0] != labels[-1]
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-3)


def test_normalized_leaves_zero_rows():
    np.testing.assert_allclose(cluster.normalized(np.array([[3.0, 4], [0, 0]])), [[0.6, 0.8], [0, 0]])


def test_too_few_vectors():
    data = np.eye(4, dtype=np.float32)
    with pytest.raises(ValueError, match="3 vectors cannot make 4 clusters"):
        cluster.fit(data, np.array([1, 1, 0, 1], np.float32), 4, 0, CONFIG)
    assert cluster.fit(data, np.ones(4, np.float32), 4, 0, CONFIG).objective == pytest.approx(0, abs=1e-6)


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
    with pytest.raises(ConfigError, match=r"cluster.memory_gib is 1 .* raise it to 23"):  # 39 rows for each of 10**5
        cluster.sample_share(rows, dim, config, 10**5)
    assert cluster.sample_share(150_000, dim, config, 10**5) == 1, "all rows fit: nothing to refuse"
    assert cluster.sample_share(0, dim, config, 100) == 1


@pytest.mark.parametrize(
    ("modality", "expected"),
    [("separate", ("image", "text")), ("joint", ("joint",)), ("image", ("image",)), ("text", ("text",))],
)
def test_what_is_clustered(modality, expected):
    assert cluster.spaces(ClusterConfig(modality=modality)) == expected


def test_joined_vectors_weigh_both_sides_alike():
    """Squared distances of joined vectors are the means of those of the two directions, whatever the lengths."""
    rng = np.random.default_rng(14)
    images = rng.standard_normal((30, 5)).astype(np.float32) * 40
    texts = rng.standard_normal((30, 5)).astype(np.float32) * 0.01
    joined = cluster.joined(images, texts)
    assert joined.shape == (30, 10)
    assert joined.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(joined, axis=1), 1, rtol=1e-6)
    sides = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (images, texts)]
    expected = sum(squared_distances(side, side) for side in sides) / 2
    np.testing.assert_allclose(squared_distances(joined, joined), expected, atol=1e-6)

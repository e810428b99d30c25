"""Whitening against the definition on all rows, NumPy's covariance and SciPy's matrix root."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import fractional_matrix_power

from pds_ray.stages import whiten

RIDGE = 0.1


def make_vectors(rows: int, dim: int, seed: int = 0) -> np.ndarray:
    """Correlated vectors of unequal variance around a mean."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(rows, dim)) @ rng.normal(size=(dim, dim)) + 2).astype(np.float32)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_whitening_is_the_regularised_root_of_the_covariance() -> None:
    vectors, weights = make_vectors(300, 6), np.random.default_rng(1).integers(0, 4, 300)
    found = whiten.whitening(whiten.moments(vectors, weights), RIDGE)
    repeated = np.repeat(unit(vectors.astype(np.float64)), weights, axis=0)
    covariance = np.cov(repeated.T, bias=True)
    root = fractional_matrix_power(covariance + RIDGE * np.trace(covariance) / 6 * np.eye(6), -0.5)
    np.testing.assert_allclose(found.mean, repeated.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(found.matrix, root, rtol=1e-4, atol=1e-4)
    expected = unit((unit(vectors.astype(np.float64)) - repeated.mean(axis=0)) @ root)
    np.testing.assert_allclose(found(vectors), expected, atol=2e-5)


def test_without_ridge_the_whitened_covariance_is_the_identity() -> None:
    vectors = make_vectors(500, 5)
    found = whiten.whitening(whiten.moments(vectors, np.ones(500, np.int64)), 1e-9)
    white = (unit(vectors) - found.mean) @ found.matrix
    np.testing.assert_allclose(np.cov(white.T, bias=True), np.eye(5), atol=1e-3)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_sums_do_not_depend_on_shards(sizes: list[int], seed: int) -> None:
    """The sums of parts are those of the whole, up to the rounding of float64."""
    vectors = make_vectors(sum(sizes), 3, seed)
    weights = np.random.default_rng(seed).integers(0, 3, len(vectors))
    total = whiten.no_moments(3)
    for part in np.split(np.arange(len(vectors)), np.cumsum(sizes)[:-1]):
        whiten.add_moments(total, whiten.moments(vectors[part], weights[part]))
    whole = whiten.moments(vectors, weights)
    assert total.count == whole.count
    np.testing.assert_allclose(total.total, whole.total, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(total.products, whole.products, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [0, 1])
def test_vectors_without_variance_stay_finite(rows: int) -> None:
    vectors = make_vectors(3, 4)
    weights = np.array([rows, 0, 0])
    white = whiten.whitening(whiten.moments(vectors, weights), RIDGE)(vectors)
    assert np.isfinite(white).all()

"""Nearest rows and the plane, against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pds_ray.report.space import add_rows, covered, fit_plane, no_rows, sample_places


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=5),
    st.integers(1, 4),
    st.integers(1, 7),
    st.integers(0, 99),
)
def test_the_best_rows_whatever_the_blocks(sizes, k, chunk, seed):
    rng = np.random.default_rng(seed)
    rows = rng.integers(-2, 3, size=(sum(sizes), 3)).astype(np.float32)  # many ties
    queries = rng.integers(-2, 3, size=(4, 3)).astype(np.float32)
    top = no_rows(len(queries), k)
    for part in np.split(rows, np.cumsum(sizes)[:-1]):
        add_rows(top, queries, part, chunk)
    whole = no_rows(len(queries), k)
    add_rows(whole, queries, rows)
    for query in range(len(queries)):
        norms = np.linalg.norm(rows, axis=1) * np.linalg.norm(queries[query])
        cosine = (rows @ queries[query]) / np.where(norms > 0, norms, 1)
        found = top.row[query][top.row[query] >= 0]
        assert len(found) == min(k, len(rows)) == len(set(found))
        np.testing.assert_allclose(cosine[found], np.sort(cosine)[::-1][: len(found)], atol=1e-6)
        np.testing.assert_allclose(top.cosine[query], whole.cosine[query], atol=1e-6)


def test_coverage_is_mean_and_percentile_of_the_highest_cosines():
    rng = np.random.default_rng(0)
    sample, pairs = (rng.normal(size=(count, 4)).astype(np.float32) for count in (300, 7))
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (sample, pairs)]
    highest = np.sort((unit[0] @ unit[1].T).max(axis=1))
    mean, low = covered(sample, pairs)
    assert mean == pytest.approx(highest.mean(), abs=1e-5)
    assert highest[14] - 1e-5 <= low <= highest[15] + 1e-5  # 15 of 300 are 5 percent


def test_of_equal_rows_the_earlier_wins():
    rows = np.tile(np.eye(2, dtype=np.float32)[:1], (7, 1))
    top = no_rows(1, 3)
    add_rows(top, rows[:1], rows[:2])
    add_rows(top, rows[:1], rows[2:], chunk=2)
    assert top.row.tolist() == [[0, 1, 2]]


def test_a_plane_never_flips():
    rows = np.random.default_rng(0).normal(size=(50, 5)).astype(np.float32) * [5, 3, 1, 1, 1]
    plane = fit_plane(rows)
    np.testing.assert_allclose(plane.axes @ plane.axes.T, np.eye(2), atol=1e-9)
    assert all(axis[np.abs(axis).argmax()] > 0 for axis in plane.axes)
    assert plane.explained[0] >= plane.explained[1] > 0
    np.testing.assert_allclose(plane.project(rows), plane.project(rows * 3), atol=1e-6)


def test_a_plane_of_equal_points():
    plane = fit_plane(np.ones((4, 3), np.float32))
    assert plane.explained[0] == pytest.approx(0, abs=1)
    assert np.isfinite(plane.project(np.ones((2, 3), np.float32))).all()


@pytest.mark.parametrize(
    ("sizes", "limit"), [([5, 0, 7], 100), ([50, 1, 9], 20), ([], 5), ([0, 0], 5)]
)
def test_a_sample_of_shards(sizes, limit):
    places = sample_places(sizes, limit, 3)
    again = sample_places(sizes, limit, 3)
    assert [part.tolist() for part in places] == [part.tolist() for part in again]
    assert sum(map(len, places)) == min(limit, sum(sizes))
    for size, part in zip(sizes, places, strict=bool(sizes)):
        assert len(set(part)) == len(part)
        assert all(0 <= row < size for row in part)

"""Searches by products of low precision, against float64 brute force over all pairs."""

from __future__ import annotations

import subprocess
import sys
import warnings
from contextlib import AbstractContextManager
from dataclasses import astuple
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from pds_ray.stages import products

ARITHMETICS = {"bfloat16": products.FAST, "float32": products.PLAIN, "float64": products.FINE}
SMALL = products.Block(queries=5, rows=32, kept=64)
WHOLE = products.BLOCKS["cpu"]

# ---- truth -------------------------------------------------------------------------------------


def true_cosines(queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return all cosines in extended precision, float64 [B, n]; 0 with a vector of zeros."""
    with np.errstate(invalid="ignore"):
        x, y = queries.astype(np.longdouble), rows.astype(np.longdouble)
        norms = np.sqrt((x * x).sum(axis=1))[:, None] * np.sqrt((y * y).sum(axis=1))
        products = np.stack([(row * y).sum(axis=1) for row in x]) if len(x) else x @ y.T
        return (products / np.where(norms == 0, 1, norms)).astype(np.float64)


def true_distances(vectors: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Return all squared distances in extended precision, float64 [n, K]."""
    with np.errstate(invalid="ignore"):
        x, y = vectors.astype(np.longdouble), centroids.astype(np.longdouble)
        return np.stack([((row - y) ** 2).sum(axis=1) for row in x]).astype(np.float64)


def check_nearest(queries: np.ndarray, rows: np.ndarray, found: tuple, at_least=None) -> None:
    """Compare with all cosines, rounded to float32: their first highest, if high enough."""
    cosine, row = found
    assert (cosine.dtype, row.dtype) == (np.float32, np.int32)
    whole = true_cosines(queries, rows).astype(np.float32)
    expected = whole.argmax(axis=1)
    best = whole.max(axis=1)
    enough = np.full(len(queries), True) if at_least is None else best >= at_least
    np.testing.assert_array_equal(cosine, np.where(enough, best, -np.inf).astype(np.float32))
    np.testing.assert_array_equal(row, np.where(enough, expected, -1))


def check_labels(vectors: np.ndarray, centroids: np.ndarray, labels: np.ndarray) -> None:
    """Compare with all squared distances, where float64 tells them apart."""
    assert labels.dtype == np.int32
    whole = true_distances(vectors, centroids)
    own = whole[np.arange(len(labels)), labels]
    # an exact tie in extended precision may be one of float64 or not: the first is asked for there
    assert (own <= whole.min(axis=1) * (1 + 1e-14)).all()
    for vector in range(len(vectors)):
        same = (centroids == centroids[labels[vector]]).all(axis=1)
        assert labels[vector] == same.argmax(), "the first of equal centroids"


# ---- data --------------------------------------------------------------------------------------


def vectors(seed: int, kind: str, count: int, dim: int) -> np.ndarray:
    """Return vectors of a kind that is hard in one way or another, float32 [count, dim]."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((4, dim))
    whole = rng.standard_normal((count, dim))
    if kind == "clustered":
        whole = centres[rng.integers(0, 4, count)] + 0.1 * whole
    elif kind == "cone":
        whole = 8 * centres[0] + whole
    elif kind == "near ties in bfloat16":
        whole = centres[0] * (1 + 2.0**-9 * rng.integers(-2, 3, (count, dim)))
    elif kind == "near ties in float32":
        whole = centres[0] * (1 + 2.0**-22 * rng.integers(-2, 3, (count, dim)))
    elif kind == "duplicates":
        whole = whole[rng.integers(0, max(1, count // 5), count)]
    elif kind == "all equal":
        whole[:] = centres[0]
    elif kind == "norms":
        whole *= 10.0 ** rng.integers(-12, 9, (count, 1))
    elif kind == "far norms":
        whole *= 10.0 ** rng.integers(-18, 19, (count, 1))
    elif kind == "zeros":
        whole[rng.random(count) < 0.4] = 0
    elif kind == "signs":
        whole = np.sign(whole)
    return whole.astype(np.float32)


KINDS = [
    "random",
    "clustered",
    "cone",
    "near ties in bfloat16",
    "near ties in float32",
    "duplicates",
    "all equal",
    "norms",
    "far norms",
    "zeros",
    "signs",
]
blocks = st.builds(
    lambda queries, rows, times: products.Block(queries, 32 * rows, 32 * rows * times),
    st.integers(1, 40),
    st.integers(1, 4),
    st.integers(1, 3),
)
worlds = st.tuples(
    st.integers(0, 10**6),
    st.sampled_from(KINDS),
    st.sampled_from(KINDS),
    st.integers(1, 40),
    st.integers(1, 150),
    st.sampled_from([1, 3, 16, 40]),
)


def world(drawn: tuple) -> tuple[np.ndarray, np.ndarray]:
    """Return queries and rows; a third of the queries are among the rows."""
    seed, kind, other, queries, rows, dim = drawn
    left, right = vectors(seed, other, queries, dim), vectors(seed + 1, kind, rows, dim)
    left[::3] = right[np.arange(len(left[::3])) % rows]
    return left, right


arithmetics = st.sampled_from(sorted(ARITHMETICS))


def by(name: str) -> AbstractContextManager[object]:
    """Make the first pass use an arithmetic, whatever this CPU is fast at."""
    return mock.patch.object(products, "coarse", return_value=ARITHMETICS[name])


# ---- properties --------------------------------------------------------------------------------


@settings(max_examples=40)
@given(arithmetics, worlds, blocks)
def test_nearest_rows_are_those_of_brute_force(arithmetic, drawn, block):
    queries, rows = world(drawn)
    with by(arithmetic):
        found = products.nearest_rows(queries, rows, block=block)
    check_nearest(queries, rows, found)


@settings(max_examples=40)
@given(arithmetics, worlds, blocks)
def test_labels_are_those_of_brute_force(arithmetic, drawn, block):
    queries, rows = world(drawn)
    with by(arithmetic):
        labels = products.assign(queries, rows, block=block)
    check_labels(queries, rows, labels)


@settings(max_examples=40)
@given(arithmetics, worlds, blocks, st.integers(1, 70))
def test_lists_are_those_of_a_whole_sort(arithmetic, drawn, block, count):
    queries, rows = world(drawn)
    with by(arithmetic):
        cosine, row = products.top_rows(queries, rows, count, block=block)
    whole = true_cosines(queries, rows).astype(np.float32)
    listed = min(count, len(rows))
    order = np.argsort(-whole, axis=1, kind="stable")[:, :listed]
    np.testing.assert_array_equal(row[:, :listed], order)
    np.testing.assert_array_equal(cosine[:, :listed], np.take_along_axis(whole, order, axis=1))
    assert (row[:, listed:] == -1).all()
    assert np.isneginf(cosine[:, listed:]).all()


@settings(max_examples=40)
@given(arithmetics, worlds, blocks, st.integers(-3, 3))
def test_rows_below_a_known_cosine_are_left_out(arithmetic, drawn, block, steps):
    """The cosine asked for is the best one, or one some float32 steps above or below it."""
    queries, rows = world(drawn)
    at_least = true_cosines(queries, rows).max(axis=1).astype(np.float32)
    for _ in range(abs(steps)):
        at_least = np.nextafter(at_least, np.float32(np.sign(steps) * 2))
    with by(arithmetic):
        found = products.nearest_rows(queries, rows, at_least, block=block)
    check_nearest(queries, rows, found, at_least)


@settings(max_examples=40)
@given(worlds, st.integers(0, 150), blocks)
def test_searching_part_by_part_is_searching_the_whole(drawn, cut, block):
    """A part is asked for what beats the other; both orders, so the first of equals is known."""
    queries, rows = world(drawn)
    whole = products.nearest_rows(queries, rows)
    prepared = products.as_queries(queries)
    parts = {0: rows[:cut], cut: rows[cut:]}
    for order in (sorted(parts), sorted(parts, reverse=True)):
        best = np.full(len(queries), -np.inf, np.float32)
        place = np.full(len(queries), -1)
        for start in order:
            cosine, row = products.nearest_rows(prepared, parts[start], best, block=block)
            better = (cosine > best) | ((cosine == best) & (row >= 0) & (start + row < place))
            best[better], place[better] = cosine[better], start + row[better]
        np.testing.assert_array_equal(best, whole[0])
        np.testing.assert_array_equal(place, whole[1])


@settings(max_examples=15)  # each is searched for every query by itself, in up to four ways
@given(worlds, st.lists(st.tuples(arithmetics, blocks), min_size=2, max_size=4))
def test_bytes_do_not_depend_on_blocks_arithmetic_or_neighbours(drawn, ways):
    queries, rows = world(drawn)
    found = set()
    for arithmetic, block in ways:
        with by(arithmetic):
            cosine, row = products.top_rows(queries, rows, 3, block=block)
            alone = [products.nearest_rows(query[None], rows, block=block) for query in queries]
            labels = products.assign(queries, rows, block=block)
            one = [products.assign(query[None], rows)[0] for query in queries]
        found.add(b"".join(array.tobytes() for array in (cosine, row, labels)))
        assert b"".join(each[0].tobytes() for each in alone) == cosine[:, 0].tobytes()
        assert [each[1][0] for each in alone] == row[:, 0].tolist()
        assert one == labels.tolist()
    assert len(found) == 1


@settings(max_examples=40)
@given(arithmetics, st.booleans(), worlds, blocks)
def test_no_row_is_lost_that_may_be_the_nearest(arithmetic, unit, drawn, block):
    """The bound itself: whatever is as near as the nearest is a candidate of each pass."""
    queries, rows = world(drawn)
    if unit:
        left = products.as_queries(queries)
        right = left.opposite(rows)
        far = -true_cosines(queries, rows).astype(np.float32)
    else:
        right = products.as_centroids(rows)
        left = right.opposite(queries)
        far = true_distances(queries, rows)
    nearest = {tuple(pair) for pair in np.argwhere(far == far.min(axis=1, keepdims=True))}
    reach = np.full(len(queries), np.inf)
    search = products.Search(left, right, 1, reach, block)
    with by(arithmetic):
        first = list(search.coarse())
    crowded = np.concatenate([many for _, many in first])
    found = {pair for pairs, _ in first for pair in zip(*astuple(pairs), strict=True)}
    assert {pair for pair in nearest if pair[0] not in crowded} <= found
    everybody = np.arange(len(queries))
    fine = {pair for pairs in search.fine(everybody) for pair in zip(*astuple(pairs), strict=True)}
    assert nearest <= fine


@settings(max_examples=40)
@given(arithmetics, st.booleans(), worlds, st.booleans())
def test_the_residual_bounds_what_rounding_took(arithmetic, unit, drawn, by_torch):
    raw, _ = world(drawn)
    shift = np.random.default_rng(drawn[0]).standard_normal(raw.shape[1]).astype(np.float32) / 8
    given = torch.tensor(raw) if by_torch or arithmetic == "bfloat16" else raw
    made = products.rounded(given, "query", unit, shift, ARITHMETICS[arithmetic])
    exact = raw.astype(np.longdouble)
    if unit:
        norms = np.sqrt((exact**2).sum(axis=1, keepdims=True))
        exact = exact / np.where(norms == 0, 1, norms)
    near = torch.as_tensor(made.columns[:, : raw.shape[1]]).double().numpy()
    taken = np.sqrt(((exact - shift - near) ** 2).sum(axis=1))
    small = np.abs(raw).max(axis=1) < products.LARGEST  # larger ones are for the second pass
    assert (taken <= np.asarray(made.residual))[small | unit].all()


# ---- single cases ------------------------------------------------------------------------------


def test_many_rows_and_queries_in_the_blocks_of_a_cpu():
    """Several blocks of either side, at the size that runs use."""
    rng = np.random.default_rng(5)
    centres = rng.standard_normal((300, 24))
    rows, queries = (
        (centres[rng.integers(0, 300, count)] + 0.4 * rng.standard_normal((count, 24))).astype(
            np.float32
        )
        for count in (20_000, 700)
    )
    rows[15_000:16_000] = rows[:1_000]
    cosine, row = products.nearest_rows(queries, rows)
    x, y = (each.astype(np.float64) for each in (queries, rows))
    whole = x @ y.T / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(y, axis=1)
    np.testing.assert_array_equal(row, whole.astype(np.float32).argmax(axis=1))
    np.testing.assert_array_equal(cosine, whole.max(axis=1).astype(np.float32))
    squares = (x**2).sum(axis=1)[:, None] - 2 * x @ y.T + (y**2).sum(axis=1)
    np.testing.assert_array_equal(products.assign(queries, rows), squares.argmin(axis=1))


@pytest.mark.parametrize("name", ARITHMETICS)
def test_threads_do_not_change_the_bytes(name):
    """The threads are those of PyTorch and of NumPy's BLAS."""
    rng = np.random.default_rng(6)
    # BLAS rounds most values of a product of these odd sizes by the number of its threads
    queries, rows = (rng.standard_normal((n, 513)).astype(np.float32) for n in (203, 301))
    before, found = torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            with by(name), threadpool_limits(threads):
                cosine, row = products.nearest_rows(queries, rows)
                labels = products.assign(queries, rows)
            found.add(cosine.tobytes() + row.tobytes() + labels.tobytes())
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


def test_equal_distances_take_the_first():
    """Corners of a cube: all distances are whole numbers, and most occur many times."""
    rng = np.random.default_rng(7)
    centroids = rng.choice(np.array([-1, 1], np.float32), (200, 6))
    points = rng.choice(np.array([-1, 0, 1], np.float32), (60, 6))
    expected = ((points[:, None] - centroids) ** 2).sum(axis=2).argmin(axis=1)
    for name in ARITHMETICS:
        with by(name):
            np.testing.assert_array_equal(products.assign(points, centroids), expected)


def test_cosines_ignore_length():
    queries = np.array([[1, 0], [0, 2]], np.float32)
    rows = np.array([[100, 90], [0.1, 0], [0, 0], [-5, 0.5]], np.float32)
    cosine, row = products.nearest_rows(queries, rows)
    assert row.tolist() == [1, 0]
    np.testing.assert_allclose(cosine, [1, 90 / np.hypot(100, 90)], rtol=1e-6)


def test_an_empty_cluster_keeps_its_label():
    """Centroid 1 is far from everything: labels stay 0 and 2."""
    centroids = np.array([[0, 0], [1e6, 1e6], [5, 5]], np.float32)
    labels = products.assign(np.array([[0.1, 0], [5, 5.1], [4, 4]], np.float32), centroids)
    assert labels.tolist() == [0, 2, 2]


@pytest.mark.parametrize("name", ARITHMETICS)
def test_scores_that_are_stored_in_low_precision_lose_no_row(name):
    """Whole numbers are exact in bfloat16; squared distances, far from zero, are not."""
    rng = np.random.default_rng(12)
    half = rng.integers(-3, 4, (400, 16)).astype(np.float32)
    centroids = np.concatenate([half, -half])  # their mean, which all are shifted by, is 0
    points = rng.integers(-40, 41, (300, 16)).astype(np.float32)
    expected = ((points[:, None] - centroids) ** 2).sum(axis=2).argmin(axis=1)
    with by(name):
        np.testing.assert_array_equal(products.assign(points, centroids), expected)


def test_a_search_of_nothing():
    some, none = np.ones((2, 3), np.float32), np.zeros((0, 3), np.float32)
    cosine, row = products.nearest_rows(some, none)
    assert np.isneginf(cosine).all()
    assert row.tolist() == [-1, -1]
    assert [len(each) for each in products.nearest_rows(none, some)] == [0, 0]
    assert [each.shape for each in products.top_rows(none, none, 4)] == [(0, 4), (0, 4)]
    assert products.assign(none, some).tolist() == []


@pytest.mark.parametrize("nonsense", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ARITHMETICS)
def test_vectors_that_are_not_finite_find_nothing_and_are_not_found(nonsense, name):
    rng = np.random.default_rng(8)
    queries, rows = (rng.standard_normal((n, 5)).astype(np.float32) for n in (40, 90))
    bad_queries, bad_rows = np.array([0, 7, 39]), np.array([0, 11, 12, 89])
    good = np.setdiff1d(np.arange(90), bad_rows)
    expected = products.nearest_rows(queries, rows[good])
    labels = products.assign(queries, rows[good])
    queries[bad_queries, 2] = rows[bad_rows, 1] = nonsense
    sound = np.setdiff1d(np.arange(40), bad_queries)
    with by(name), warnings.catch_warnings():
        warnings.simplefilter("error")
        cosine, row = products.nearest_rows(queries, rows, block=SMALL)
        found = products.assign(queries, rows, block=SMALL)
    assert np.isneginf(cosine[bad_queries]).all()
    assert row[bad_queries].tolist() == found[bad_queries].tolist() == [-1, -1, -1]
    np.testing.assert_array_equal(cosine[sound], expected[0][sound])
    np.testing.assert_array_equal(row[sound], good[expected[1][sound]])
    np.testing.assert_array_equal(found[sound], good[labels[sound]])


def test_only_nonsense_is_nothing():
    bad = np.full((3, 2), np.nan, np.float32)
    cosine, row = products.nearest_rows(np.ones((2, 2), np.float32), bad)
    assert np.isneginf(cosine).all()
    assert row.tolist() == [-1, -1]
    assert products.assign(bad, np.ones((1, 2), np.float32)).tolist() == [-1, -1, -1]


@pytest.mark.parametrize("length", [1e-30, 1.0, 1e11, 1e13, 1e17, 1e30, 3e38])
def test_nonsense_is_further_than_any_length(length):
    far = np.array([[length, 0]], np.float32)
    centroids = np.concatenate([np.full((1, 2), np.nan, np.float32), far, far / 2])
    assert products.assign(-far, centroids).tolist() == [2]
    assert products.assign(-far, centroids[:2]).tolist() == [1]


def test_zeros_have_cosine_zero_with_all():
    rows = np.array([[-1, -1], [0, 0], [-1, 0]], np.float32)
    queries = np.array([[1, 1], [0, 0], [-1, -0.1]], np.float32)
    cosine, row = products.nearest_rows(queries, rows)
    assert row.tolist() == [1, 0, 2]
    assert cosine.tolist()[:2] == [0, 0]


def test_read_only_arrays_and_views_are_taken():
    rng = np.random.default_rng(9)
    rows = rng.standard_normal((50, 8)).astype(np.float32)
    wide = np.repeat(rows, 2, axis=1)
    view = wide[:, ::2]
    rows.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own = products.nearest_rows(rows, rows)
        other = products.nearest_rows(view, view)
    assert own[1].tolist() == list(range(50))
    for mine, theirs in zip(own, other, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_the_first_pass_leaves_few_candidates():
    """It would be of no use if its bound were loose: on clustered data hardly any is added."""
    rng = np.random.default_rng(10)
    centres = rng.standard_normal((50, 256)) / 16
    rows = centres[rng.integers(0, 50, 2_000)] + 0.7 / 16 * rng.standard_normal((2_000, 256))
    left = products.as_queries(centres.astype(np.float32))
    reach = np.full(50, np.inf)
    search = products.Search(left, left.opposite(rows), 1, reach, WHOLE)
    with by("bfloat16"):
        found = list(search.coarse())
    assert sum(len(pairs.query) for pairs, _ in found) < 3 * 50
    assert sum(len(many) for _, many in found) == 0


def test_a_cpu_without_bfloat16_imports_no_torch(tmp_path):
    """It is megabytes by the hundred in each worker, and seconds, which no product is worth."""
    flags = tmp_path / "cpuinfo"
    flags.write_text("flags : fpu sse2 avx2\n")
    code = f"""
import sys
from pathlib import Path
import numpy as np
from pds_ray.stages import products
products.CPU_INFO = Path({str(flags)!r})
some = np.eye(40, dtype=np.float32)
some[20:] += 1  # many rows tie, so that both passes are made
assert products.nearest_rows(some, some)[1].tolist() == list(range(40))
assert products.assign(some, some).tolist() == list(range(40))
assert products.top_rows(some, some, 3)[1].shape == (40, 3)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("text", "knows"),
    [
        ("flags : avx2 fma avx512_bf16", True),
        ("flags : avx512f amx_bf16 amx_tile", True),
        ("Features : asimd bf16 i8mm", True),
        ("flags : avx2 fma f16c", False),
        (None, True),  # not Linux
    ],
)
def test_bfloat16_is_tried_where_the_cpu_may_know_it(text, knows, tmp_path, monkeypatch):
    file = tmp_path / "cpuinfo"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(products, "CPU_INFO", file)
    tried = []
    monkeypatch.setattr(products, "_product", lambda *_: tried.append(1))
    fast = products.has_fast_bfloat16.__wrapped__()
    assert bool(tried) == knows
    assert knows or not fast


def test_a_gpu_gives_the_same_bytes():
    if not torch.cuda.is_available():
        pytest.skip("torch finds no GPU on this machine")
    for kind in KINDS:
        queries, rows = vectors(1, kind, 300, 96), vectors(2, kind, 2_000, 96)
        for measure in (
            lambda device, x=queries, y=rows: products.top_rows(x, y, 3, device=device),
            lambda device, x=queries, y=rows: [products.assign(x, y, device)],
        ):
            for mine, theirs in zip(measure("cpu"), measure("cuda"), strict=True):
                np.testing.assert_array_equal(mine, theirs, err_msg=kind)

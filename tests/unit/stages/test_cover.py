"""Choice of pairs that cover, against brute force over every set of gains."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pds_ray.stages import cover


def make_candidates(count: int, seed: int = 0, dim: int = 5) -> cover.Candidates:
    """Unit rows around a few centres, image and caption alike but not equal."""
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(4, dim))[rng.integers(4, size=count)] + rng.normal(size=(count, dim))
    text = image + 0.5 * rng.normal(size=(count, dim))
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (image, text)]
    return cover.Candidates(*(rows.astype(np.float32) for rows in unit))


def value(candidates: cover.Candidates, picks: list[int]) -> float:
    """F of the picks, by its definition on float64."""
    x = np.concatenate([candidates.image, candidates.text], axis=1).astype(np.float64)
    return float((x @ x[picks].T / 2).max(axis=1).sum())


@given(st.integers(1, 40), st.integers(0, 2**32 - 1), st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_every_pick_is_the_one_that_raises_the_value_most(
    count: int, seed: int, pairs: int
) -> None:
    """All sets that are one candidate larger are tried; equal ones differ by rounding alone."""
    candidates = make_candidates(count, seed)
    picks = list(cover.facility_location(candidates, min(pairs, count)))
    assert len(set(picks)) == min(pairs, count)
    for number, pick in enumerate(picks):
        before = picks[:number]
        left = [row for row in range(count) if row not in before]
        best = max(value(candidates, [*before, row]) for row in left)
        assert value(candidates, [*before, pick]) == pytest.approx(best, abs=1e-4)


@given(st.integers(2, 30), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_herding_follows_the_mean_outer_product(count: int, seed: int) -> None:
    candidates = make_candidates(count, seed)
    outer = np.einsum("nd,ne->nde", candidates.image, candidates.text, dtype=np.float64)
    picks = list(cover.herding(candidates, count // 2))
    assert len(set(picks)) == count // 2

    def away(some: list[int]) -> float:
        return float(np.linalg.norm(outer[some].sum(axis=0) - len(some) * outer.mean(axis=0)))

    for number, pick in enumerate(picks):
        before = picks[:number]
        left = [row for row in range(count) if row not in before]
        best = min(away([*before, row]) for row in left)
        assert away([*before, pick]) == pytest.approx(best, abs=1e-4)


@given(st.integers(3, 30), st.integers(0, 2**32 - 1), st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_the_others_cover_what_herding_leaves(count: int, seed: int, herded: float) -> None:
    candidates = make_candidates(count, seed)
    picks, first = list(cover.choose(candidates, count - 1, herded)), round(herded * (count - 1))
    assert len(set(picks)) == count - 1
    assert picks[:first] == list(cover.herding(candidates, first))
    for number in range(first, len(picks)):
        before = picks[:number]
        left = [row for row in range(count) if row not in before]
        best = max(value(candidates, [*before, row]) for row in left)
        assert value(candidates, picks[: number + 1]) == pytest.approx(best, abs=1e-4)


def test_blocks_and_the_number_computed_again_do_not_matter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    candidates = make_candidates(300)
    whole = list(cover.facility_location(candidates, 50))
    monkeypatch.setattr(cover, "BLOCK", 7)
    monkeypatch.setattr(cover, "AGAIN", 1)
    assert list(cover.facility_location(candidates, 50)) == whole


def test_equal_candidates_are_picked_in_their_order() -> None:
    one = make_candidates(1)
    same = one.take(np.zeros(6, np.int64))
    assert list(cover.facility_location(same, 6)) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(("count", "most", "parts"), [(10, 10, 1), (11, 10, 2), (77, 10, 8)])
def test_parts_are_halves_of_halves(count: int, most: int, parts: int) -> None:
    candidates = make_candidates(count)
    found = cover.split(candidates, most)
    sizes = [len(part) for part in found]
    assert len(found) == parts
    assert max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1
    assert sorted(np.concatenate(found).tolist()) == list(range(count))


def test_two_far_groups_are_the_two_parts() -> None:
    rng = np.random.default_rng(0)
    group = rng.permutation(np.repeat([0, 1], 50))
    centres = np.array([[1.0, 0, 0], [-1.0, 0, 0]])[group]
    rows = (centres + 0.05 * rng.normal(size=centres.shape)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    first, second = cover.split(cover.Candidates(rows, rows), 50)
    assert len(set(group[first])) == len(set(group[second])) == 1


@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.integers(1, 400))
def test_shares_are_in_proportion(sizes: list[int], pairs: int) -> None:
    counts = cover.shares(sizes, pairs)
    pairs = min(pairs, sum(sizes))
    assert sum(counts) == pairs
    for count, size in zip(counts, sizes, strict=True):
        assert abs(count - pairs * size / sum(sizes)) < 1
        assert count <= size


def test_every_beginning_of_the_order_has_its_share_of_each_part() -> None:
    parts = [np.arange(start, start + size) for start, size in ((0, 40), (100, 10), (200, 0))]
    found = cover.interleaved(parts)
    assert sorted(found.tolist()) == sorted(np.concatenate(parts).tolist())
    for length in range(1, 51):
        beginning = found[:length]
        assert abs((beginning < 100).sum() - 0.8 * length) <= 1
    assert [number for number in found.tolist() if number < 100] == list(range(40))


def test_the_best_kept_pair_of_each_image() -> None:
    image_row = np.array([0, 0, 0, 1, 1, 2, 3])
    similarity = np.array([0.9, 0.5, 0.5, 0.1, 0.2, 0.7, 0.3], np.float32)
    kept = np.array([False, True, True, True, True, False, True])
    assert cover.best_pairs(image_row, similarity, kept).tolist() == [1, 4, 6]


def test_ranks_are_spread_evenly_and_depend_on_the_seed() -> None:
    ranks = np.array([cover.rank(0, f"k{number}", "a caption") for number in range(4000)])
    counts, _ = np.histogram(ranks.astype(np.float64), bins=8, range=(0, 2.0**64))
    assert counts.sum() == 4000
    assert abs(counts - 500).max() < 100  # five standard deviations
    assert cover.rank(1, "k0", "a caption") != cover.rank(0, "k0", "a caption")


def test_the_lowest_ranks_in_their_order() -> None:
    ranks, pairs = np.array([5, 1, 5, 3], np.uint64), np.array([10, 11, 12, 13])
    assert [part.tolist() for part in cover.lowest(ranks, pairs, 3)] == [[1, 3, 5], [11, 13, 10]]

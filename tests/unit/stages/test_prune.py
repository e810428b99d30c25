"""Pruning against a full sort, whatever the shards."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pds_ray.stages import prune

FLOATS = st.floats(-1, 1, width=32)
# few distinct values and both zeros: ties everywhere
TIED = st.sampled_from(
    [np.float32(v) for v in (-1.0, -0.25, -1e-8, -0.0, 0.0, 1e-8, 0.25, 0.5, 1.0)]
)


def prune_shards(shards: list[np.ndarray], ratio: float) -> list[np.ndarray]:
    """The passes of distributed/prune.py as a loop."""
    pairs = sum(map(len, shards))
    drop = prune.drop_count(ratio, pairs)
    if drop == 0:
        threshold = prune.Threshold(0, 0)
    else:
        upper = sum(prune.histogram(shard) for shard in shards)
        high, before = prune.find_bucket(upper, drop - 1)
        lower = sum(prune.histogram(shard, high) for shard in shards)
        low, before_low = prune.find_bucket(lower, drop - 1 - before)
        threshold = prune.Threshold((high << 16) | low, drop - before - before_low)
    masks, ties = [], 0
    for shard in shards:
        masks.append(prune.keep_mask(shard, threshold, ties))
        ties += prune.count_ties(shard, threshold)
    return masks


def oracle(values: np.ndarray, ratio: float) -> np.ndarray:
    """Sorts by (value, place) and drops the first int(ratio * N)."""
    order = np.lexsort((np.arange(len(values)), values + np.float32(0)))
    kept = np.ones(len(values), bool)
    kept[order[: int(ratio * len(values))]] = False
    return kept


def cut(values: np.ndarray, places: list[int]) -> list[np.ndarray]:
    return np.split(values, sorted(place % (len(values) + 1) for place in places))


@settings(max_examples=60)
@given(
    values=st.one_of(st.lists(FLOATS, max_size=60), st.lists(TIED, max_size=60)),
    ratio=st.one_of(st.sampled_from([0.0, 0.2, 0.5, 0.99]), st.floats(0, 0.999)),
    places=st.lists(st.integers(0, 60), max_size=5),
)
def test_equals_a_full_sort_however_the_rows_are_cut(values, ratio, places):
    array = np.array(values, np.float32)
    masks = prune_shards(cut(array, places), ratio)
    np.testing.assert_array_equal(np.concatenate(masks), oracle(array, ratio))


@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-30])
def test_many_rows(spread):
    """Thousands of rows, in one or several upper buckets, subnormals included."""
    rng = np.random.default_rng(3)
    values = (rng.standard_normal(20_000) * spread).astype(np.float32)
    values[rng.integers(0, len(values), 4_000)] = values[:4_000]  # duplicates
    for shards in (1, 7):
        kept = np.concatenate(prune_shards(np.array_split(values, shards), 0.2))
        np.testing.assert_array_equal(kept, oracle(values, 0.2))
        assert (~kept).sum() == 4_000


@pytest.mark.parametrize(
    ("ratio", "pairs", "dropped"), [(0.2, 145_000, 29_000), (0.2, 566_747, 113_349), (0.2, 4, 0)]
)
def test_drop_count_is_the_published_one(ratio, pairs, dropped):
    assert prune.drop_count(ratio, pairs) == dropped


def test_ratio_zero_keeps_all():
    values = np.array([-1, 0, -0.0, 1], np.float32)
    assert all(mask.all() for mask in prune_shards([values, values], 0.0))


def test_both_zeros_are_equal():
    """-0.0 and 0.0 tie, so that the first in shard order goes, whichever it is."""
    for pair in ([0.0, -0.0], [-0.0, 0.0]):
        (mask,) = prune_shards([np.array(pair, np.float32)], 0.5)
        assert mask.tolist() == [False, True]


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=30))
def test_sort_key_keeps_the_order(values):
    array = np.array(values, np.float32)
    keys = prune.sort_key(array)
    for i in range(len(array) - 1):
        assert (keys[i] < keys[i + 1]) == (array[i] < array[i + 1])
        assert (keys[i] == keys[i + 1]) == (array[i] == array[i + 1])

"""Numbers of tasks and bytes of their answers: for web data they stay small."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pds_ray.distributed import sizes

SHARDS, PAIRS, CLUSTERS, DIM = 40_000, 10_000, 100_000, 768
SECONDS = st.floats(1e-4, 1e3)


@given(st.integers(0, 10**6), SECONDS)
def test_a_task_has_work_of_seconds_or_there_are_enough_tasks(shards: int, shard_s: float) -> None:
    count = sizes.task_count(shards, shard_s)
    assert 1 <= count <= max(1, shards)
    few = count < min(shards, sizes.TASKS_AT_LEAST)
    assert not few or count == max(1, math.ceil(shards * shard_s / sizes.TASK_AT_LEAST_S))
    together = math.ceil(shards / count)
    longest = sizes.LONG_TASK_S if count >= sizes.MANY_TASKS else sizes.TASK_S
    assert together <= 1 or (together - 1) * shard_s <= longest
    if count > sizes.MANY_TASKS:  # not one more than tasks of that length need
        assert count == shards or shards * shard_s / count > sizes.LONG_TASK_S * 0.99


@given(st.integers(1, 10**6), st.integers(1, 10**6), SECONDS)
def test_more_shards_are_never_fewer_tasks(few: int, more: int, shard_s: float) -> None:
    assert sizes.task_count(few, shard_s) <= sizes.task_count(few + more, shard_s)


def test_tasks_of_few_shards() -> None:
    """A hundred shards of 5,000 pairs on a laptop: Ray's own work is no more than theirs."""
    assert sizes.task_count(100, sizes.column_seconds(5_000)) == 10
    assert sizes.task_count(100, sizes.product_seconds(5_000, 10_000, DIM, "cpu")) == 100
    assert sizes.sum_task_count(100, 5_800, 5_000, 500, DIM) == 28


def test_tasks_of_400m_pairs() -> None:
    """40,000 shards of 10,000 pairs for 100,000 prototypes of width 768."""
    assert sizes.task_count(SHARDS, sizes.column_seconds(PAIRS)) == 1_000
    on_gpu = sizes.product_seconds(2 * PAIRS, CLUSTERS, DIM, "cuda")
    assert on_gpu == pytest.approx(0.04 + 0.1 + 3.072e12 / 1e13)
    assert sizes.task_count(SHARDS, on_gpu) == pytest.approx(SHARDS * 0.4472 / 5, abs=1)
    assert sizes.task_count(15 * SHARDS, on_gpu) == 10_000, "of 27 seconds"
    # a core has work of a minute with a shard
    assert (
        sizes.task_count(SHARDS, sizes.product_seconds(2 * PAIRS, CLUSTERS, DIM, "cpu")) == SHARDS
    )


def test_sums_of_a_task_are_bounded() -> None:
    """As many as a gigabyte: 87,381 of 100,000 matches of width 768, for two vectors each."""
    count = sizes.sum_task_count(SHARDS, 2 * PAIRS, PAIRS, CLUSTERS, DIM)
    members = PAIRS * SHARDS / count
    hit = CLUSTERS * (1 - (1 - 1 / CLUSTERS) ** members)
    assert hit * 2 * 8 * DIM == pytest.approx(sizes.SUMS_BYTES, rel=0.02)
    assert count == 2_000
    small = sizes.sum_task_count(SHARDS, 200, 100, CLUSTERS, DIM)
    assert small == sizes.task_count(SHARDS, 0.041), "20 pairs of each match in all, 40 shards each"
    few = sizes.sum_task_count(SHARDS, 2 * PAIRS, PAIRS, 500, DIM)
    assert few == math.ceil(SHARDS * 0.14 / 5), "of 500 matches there are 6 MB"
    assert sizes.sum_task_count(SHARDS, 2 * PAIRS, 0, CLUSTERS, DIM) == few


def test_ranges_of_matches() -> None:
    assert sizes.match_ranges(500, 512) == 1
    assert sizes.match_ranges(0, 512) == 1
    assert sizes.match_ranges(CLUSTERS, DIM) == 5, "1.2 GB of sums"


def test_ranges_of_a_table() -> None:
    assert sizes.table_ranges(10**9, 1_000) == 1, "16 MB of cells at most"
    assert sizes.table_ranges(10**6, CLUSTERS) == 1, "a cell per pair at most"
    assert sizes.table_ranges(10**8, CLUSTERS) == 6
    assert sizes.table_ranges(10**10, CLUSTERS) == sizes.TABLE_RANGES
    assert sizes.table_ranges(10**10, 3) == 1


@given(st.integers(0, 5_000))
def test_a_tree_adds_answers_up(answers: int) -> None:
    """Each task takes 16 answers at most and leaves one."""
    tasks = sizes.additions(answers)
    assert tasks >= (answers - 1) / 15
    assert tasks <= answers / 15 + 4


@given(st.integers(1, 10**8), st.integers(1, 10**6), st.integers(1, 2_048), st.integers(1, 5_000))
def test_tasks_of_a_k_means_are_no_more_than_shorten_it(
    rows: int, clusters: int, width: int, places: int
) -> None:
    """Beyond the next number, tasks cost the driver more than they save; up to theirs, less."""
    count = sizes.fit_tasks(rows, clusters, width, places, "cuda")
    assert 1 <= count <= places

    def seconds(tasks: int) -> float:
        work = rows / 200e3 + 2 * rows * clusters * width / 10e12
        adding = max(1.0, math.ceil(8 * clusters * width / 2**26)) / 16
        return work / tasks + 1e-3 * tasks * (1 + adding)

    if count < places:
        assert seconds(count + 1) <= seconds(count + 2)
    if count > 1:
        assert seconds(count) <= seconds(count - 1) * (1 + 1e-9)


def test_tasks_of_a_k_means_of_web_data() -> None:
    """11.2 million rows and 100,000 clusters: an iteration has work of 228 s for shares of GPUs."""
    assert sizes.fit_tasks(11_184_810, CLUSTERS, DIM, 4_096, "cuda") == 374
    assert sizes.fit_tasks(11_184_810, CLUSTERS, DIM, 64, "cuda") == 64
    assert sizes.fit_tasks(500, 10, DIM, 64, "cpu") == 1
    assert sizes.cluster_ranges(CLUSTERS, DIM) == 10, "614 MB of sums"
    assert sizes.cluster_ranges(100, DIM) == 1


@pytest.mark.parametrize(
    ("cpus", "gpus", "places"), [(64, 0, 64), (64, 8, 64), (64, 4, 32), (4, 8, 4), (0.5, 0, 1)]
)
def test_places(cpus: float, gpus: float, places: int) -> None:
    assert sizes.task_places(cpus, gpus) == places

"""Finished images are cut into parts for the encoders without a change of their batches."""

from __future__ import annotations

from itertools import chain

from hypothesis import given
from hypothesis import strategies as st

from pds_ray.distributed import caption
from pds_ray.distributed.sizes import ENCODED_TOGETHER


@given(st.integers(1, 10**6), st.integers(1, 600), st.integers(1, 1000))
def test_parts_have_whole_batches(pairs: int, workers: int, batch: int) -> None:
    parts = caption._parts(pairs, workers, batch)
    assert 1 <= len(parts) <= workers
    assert list(chain(*parts)) == list(range(pairs))
    assert all(len(part) % batch == 0 for part in parts[:-1])
    assert all(part.start % batch == 0 for part in parts)
    assert all(len(part) >= ENCODED_TOGETHER // 2 for part in parts[:-1])


def test_few_images_are_one_part() -> None:
    assert caption._parts(ENCODED_TOGETHER, 8, 256) == [range(ENCODED_TOGETHER)]
    assert caption._parts(100_000, 8, 256)[1] == range(12_544, 25_088)

"""The size of a local Ray; that it starts is shown in tests/distributed."""

from __future__ import annotations

import pytest

from pds_ray.config import RayConfig
from pds_ray.distributed import session

RAY_REFUSES_BELOW = 75 << 20


@pytest.mark.parametrize(
    ("free_gib", "asked_gib", "gib"),
    [(16, None, 4), (400, None, 8), (16, 0.5, 0.5), (0, 2, 2)],
)
def test_the_object_store_takes_a_quarter_or_what_is_asked_for(
    free_gib: int, asked_gib: float | None, gib: float
) -> None:
    config = RayConfig(object_store_gib=asked_gib)
    assert session._object_store_bytes(config, free_gib << 30) == gib * 2**30


def test_no_object_store_is_too_small_for_ray() -> None:
    assert session._object_store_bytes(RayConfig(), 100 << 20) >= RAY_REFUSES_BELOW
    smallest = RayConfig(object_store_gib=0.08)
    assert session._object_store_bytes(smallest, 1 << 30) >= RAY_REFUSES_BELOW

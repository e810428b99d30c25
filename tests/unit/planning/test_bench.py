"""Ranges and sums of the rates that `pds-ray bench` measures."""

from __future__ import annotations

import pytest

from pds_ray.planning import bench


def test_the_worst_makes_a_run_longer() -> None:
    rate = bench._entry([3.0, 1.0, 2.0], "images", "core")
    time = bench._entry([3.0, 1.0, 2.0], "s", "run")
    assert (rate["value"], rate["worst"], rate["best"], rate["repeats"]) == (2.0, 1.0, 3.0, 3)
    assert (time["value"], time["worst"], time["best"]) == (2.0, 3.0, 1.0)


def test_work_one_after_the_other() -> None:
    first, second = (bench._entry([rate], "pairs", "core") for rate in (30.0, 60.0))
    assert bench._one_after_the_other(first, second)["value"] == pytest.approx(20.0)

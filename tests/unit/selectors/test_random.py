"""Drawn pairs: every pair, and so every image, has its chance."""

from __future__ import annotations

import numpy as np

from pds_ray.selectors.base import Candidates
from tests.support.select_oracle import make_candidates, picks, unit


def test_it_is_the_first_of_each_image_in_a_permutation():
    candidates = make_candidates(30, 1)
    expected: list[int] = []
    for pair in np.random.default_rng(7).permutation(len(candidates)):
        if candidates.owner[pair] not in [candidates.owner[other] for other in expected]:
            expected.append(int(pair))
    assert picks("random", candidates, 30, seed=7) == expected


def test_every_pair_is_drawn_about_as_often():
    owner = np.repeat(np.arange(5), 2)
    rows = unit(np.ones((10, 3)))
    candidates = Candidates(rows[:5], rows, owner, np.ones(10, np.float32))
    drawn = np.bincount(
        [pick for seed in range(2000) for pick in picks("random", candidates, 2, seed)],
        minlength=10,
    )
    assert drawn.sum() == 4000
    assert abs(drawn - 400).max() < 5 * np.sqrt(400)  # five standard deviations

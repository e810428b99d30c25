"""Herding against the definition: each pick gives the mean that is nearest to the mean of all."""

from __future__ import annotations

import numpy as np
import pytest

from pds_ray.selectors.base import Candidates
from tests.support.select_oracle import joint, make_candidates, picks


def naive(candidates: Candidates, pairs: int) -> list[int]:
    rows = joint(candidates)
    target = rows.mean(axis=0)
    chosen: list[int] = []
    for _ in range(pairs):
        used = {int(candidates.owner[pick]) for pick in chosen}
        best, best_distance = -1, np.inf
        for pair in range(len(rows)):
            if int(candidates.owner[pair]) in used:
                continue
            distance = np.linalg.norm(rows[[*chosen, pair]].mean(axis=0) - target)
            if distance < best_distance:
                best, best_distance = pair, distance
        chosen.append(best)
    return chosen


@pytest.mark.parametrize("seed", range(6))
def test_it_equals_the_definition(seed: int):
    candidates = make_candidates(30, seed)
    assert picks("herding", candidates, 30) == naive(candidates, 30)


@pytest.mark.parametrize("pairs", [5, 20, 60])
def test_its_mean_is_nearer_than_that_of_random_pairs(pairs: int):
    candidates = make_candidates(300, 9, dim=16)
    rows = joint(candidates)

    def distance(chosen: list[int]) -> float:
        return float(np.linalg.norm(rows[chosen].mean(axis=0) - rows.mean(axis=0)))

    drawn = [distance(picks("random", candidates, pairs, seed)) for seed in range(20)]
    assert distance(picks("herding", candidates, pairs)) < 0.6 * min(drawn)


def test_of_equals_the_first_is_taken():
    one = make_candidates(1, 0, dim=7)
    candidates = Candidates(
        np.repeat(one.image, 9, axis=0),
        np.repeat(one.text[:1], 9, axis=0),
        np.arange(9),
        np.ones(9, np.float32),
    )
    assert picks("herding", candidates, 9) == list(range(9))

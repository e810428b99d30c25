"""K-center against the definition, and against the best cover that there is."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from pds_ray.selectors.base import Candidates
from tests.support.select_oracle import joint, make_candidates, picks


def naive(candidates: Candidates, pairs: int, first: int) -> list[int]:
    rows = joint(candidates)
    chosen = [first]
    while len(chosen) < pairs:
        used = {int(candidates.owner[pick]) for pick in chosen}
        distances = {
            pair: min(np.linalg.norm(rows[pair] - rows[pick]) for pick in chosen)
            for pair in range(len(rows))
            if int(candidates.owner[pair]) not in used
        }
        chosen.append(max(distances, key=lambda pair: distances[pair]))  # the first of equals
    return chosen


@pytest.mark.parametrize("seed", range(6))
def test_it_equals_the_definition(seed: int):
    candidates = make_candidates(25, seed)
    chosen = picks("k_center", candidates, 25, seed)
    assert chosen == naive(candidates, 25, chosen[0])


def test_the_first_is_drawn_from_all_pairs():
    candidates = make_candidates(4, 0)
    first = {picks("k_center", candidates, 1, seed)[0] for seed in range(100)}
    assert first == set(range(len(candidates)))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("pairs", [2, 3, 4])
def test_its_radius_is_at_most_twice_the_best(seed: int, pairs: int):
    """Gonzalez's bound, with one caption an image, as the bound knows no other exclusions."""
    rng = np.random.default_rng(seed)
    whole = make_candidates(12, seed, dim=3)
    first = np.array([rng.choice(np.flatnonzero(whole.owner == image)) for image in range(12)])
    candidates = Candidates(whole.image, whole.text[first], np.arange(12), whole.similarity[first])
    rows = joint(candidates)
    distances = np.linalg.norm(rows[:, None] - rows[None], axis=2)

    def radius(chosen: list[int]) -> float:
        return float(distances[:, chosen].min(axis=1).max())

    best = min(radius(list(some)) for some in combinations(range(12), pairs))
    assert radius(picks("k_center", candidates, pairs, seed)) <= 2 * best + 1e-6

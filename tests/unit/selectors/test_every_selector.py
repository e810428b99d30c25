"""Properties of every selector, and of the joint embedding that they share."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pds_ray import catalog
from pds_ray.catalog import SELECTORS
from pds_ray.config import METHODS
from tests.support.select_oracle import joint, make_candidates, picks

EVERY = pytest.mark.parametrize("method", sorted(SELECTORS))


def test_the_methods_that_can_be_asked_for_are_those_that_exist():
    assert tuple(catalog.METHODS) == METHODS
    assert {"pds", *SELECTORS} <= set(METHODS)


@EVERY
@settings(max_examples=15)
@given(images=st.integers(1, 25), share=st.floats(0, 1), seed=st.integers(0, 2**31 - 1))
def test_as_many_images_as_asked_for_and_none_twice(
    method: str, images: int, share: float, seed: int
):
    candidates = make_candidates(images, seed)
    pairs = max(1, round(share * images))
    chosen = picks(method, candidates, pairs, seed, epochs=2)
    assert len(chosen) == pairs
    assert all(type(pick) is int and 0 <= pick < len(candidates) for pick in chosen)
    assert len({int(candidates.owner[pick]) for pick in chosen}) == pairs
    assert picks(method, candidates, pairs, seed, epochs=2) == chosen
    assert (
        picks(method, candidates, images, seed, epochs=2)[:pairs] == chosen
    )  # fewer pairs are the first of more


@pytest.mark.parametrize("method", ["random", "k_center", "forgetting"])
def test_another_seed_draws_other_pairs(method: str):
    candidates = make_candidates(60, 0)
    assert len({tuple(picks(method, candidates, 10, seed, epochs=2)) for seed in range(4)}) == 4


@pytest.mark.parametrize("method", ["herding", "clip_score"])
def test_nothing_is_drawn_where_nothing_is_open(method: str):
    candidates = make_candidates(60, 0)
    assert picks(method, candidates, 10, 1) == picks(method, candidates, 10, 2)


def test_the_joint_embedding():
    candidates = make_candidates(50, 3)
    matrix = joint(candidates)
    np.testing.assert_allclose(np.linalg.norm(matrix, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(candidates.joint(7), matrix[7], rtol=1e-6)
    np.testing.assert_allclose(candidates.joint_mean(), matrix.mean(axis=0), rtol=1e-9)
    query = np.random.default_rng(0).normal(size=matrix.shape[1])
    np.testing.assert_allclose(candidates.joint_dots(query), matrix @ query, atol=1e-6)


def test_a_dot_product_does_not_depend_on_its_place(monkeypatch: pytest.MonkeyPatch):
    from dataclasses import replace

    from pds_ray.selectors import base

    candidates = make_candidates(41, 5, dim=13)
    query = np.random.default_rng(1).normal(size=26)
    whole = candidates.joint_dots(query)
    monkeypatch.setattr(base, "BLOCK", 7)
    assert (candidates.joint_dots(query) == whole).all()
    turned = np.arange(len(candidates))[::-1]
    text, owner = candidates.text[turned], candidates.owner[turned]
    found = replace(candidates, text=text, owner=owner).joint_dots(query)
    assert (found == whole[turned]).all()

"""Forgetting: events of a history made by hand; mismatched pairs are never learned."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pds_ray.selectors import forgetting
from pds_ray.selectors.base import Candidates
from tests.support.select_oracle import make_candidates, picks, unit


def test_events_of_a_history():
    pairs = {
        "11111": 0,  # always right
        "00111": 0,  # learned late is not forgotten
        "11000": 1,
        "10101": 2,
        "01010": 2,
        "10001": 1,
        "00000": 5,  # never right: once an epoch
    }
    history = np.array([[epoch == "1" for epoch in pair] for pair in pairs]).T
    assert forgetting.forgotten(history).tolist() == list(pairs.values())


@pytest.fixture(scope="module")
def noisy() -> tuple[Candidates, set[int]]:
    """400 well matched pairs of which 40 have exchanged their captions."""
    rng = np.random.default_rng(0)
    image = rng.normal(size=(400, 24))
    text = image + rng.normal(size=image.shape) * 0.3
    wrong = rng.choice(400, 40, replace=False)
    text[wrong] = text[np.roll(wrong, 1)]
    image, text = unit(image), unit(text)
    return Candidates(image, text, np.arange(400), (image * text).sum(axis=1)), set(wrong.tolist())


def test_mismatched_pairs_are_forgotten_most(noisy: tuple[Candidates, set[int]]):
    candidates, wrong = noisy
    assert set(picks("forgetting", candidates, 40, epochs=4, forgotten="most")) == wrong
    assert not wrong & set(picks("forgetting", candidates, 360, epochs=4, forgotten="fewest"))


def test_equally_forgotten_pairs_come_in_the_order_of_a_draw(
    monkeypatch: pytest.MonkeyPatch, noisy: tuple[Candidates, set[int]]
):
    monkeypatch.setattr(
        forgetting, "learning_history", lambda _, epochs, __: np.ones((epochs, 400), bool)
    )
    one, other = (picks("forgetting", noisy[0], 50, seed) for seed in (1, 2))
    assert one != other
    assert len(set(one) & set(other)) < 25


def test_right_is_who_ranks_first_both_ways():
    """The first epoch's first (and here only) batch is judged by the untrained heads: by the
    cosines themselves.
    """
    candidates = make_candidates(60, 4, noise=0.6)
    history = forgetting.learning_history(candidates, 1, np.random.default_rng(0))
    cosines = candidates.image[candidates.owner].astype(np.float64) @ candidates.text.T.astype(
        np.float64
    )
    for pair in range(len(candidates)):
        others = [
            other
            for other in range(len(candidates))
            if candidates.owner[other] != candidates.owner[pair]
        ]
        first = cosines[pair, pair] > max(cosines[pair, others].max(), cosines[others, pair].max())
        assert history[0, pair] == first
    assert 0 < history.mean() < 1


def test_training_learns_how_captions_are_turned_against_images():
    rng = np.random.default_rng(1)
    image = unit(rng.normal(size=(2000, 8)))
    turned = unit(image @ (np.eye(8) + 0.6 * rng.normal(size=(8, 8))))
    candidates = Candidates(image, turned, np.arange(2000), (image * turned).sum(axis=1))
    history = forgetting.learning_history(candidates, 60, np.random.default_rng(0))
    assert history[-1].mean() > 5 * history[0].mean()
    assert history[-1].mean() > 0.5


def test_the_number_of_threads_is_left_as_it_was(noisy: tuple[Candidates, set[int]]):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        chosen = picks("forgetting", noisy[0], 20, epochs=3)
        assert torch.get_num_threads() == 1
        torch.set_num_threads(2)
        assert picks("forgetting", noisy[0], 20, epochs=3) == chosen
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)

"""Smoothed trajectories keep their ends; ranges of starts follow how fast a branch moves."""

from __future__ import annotations

import pytest
import torch

from pds_ray.distillers.base import Layout, Snapshot
from pds_ray.distillers.smoothing import Smoothed, ranges, shares
from tests.support.tiny_distillation import Listed, student, wandering

MODEL = student()
LAYOUT = Layout.of(MODEL)


def moving(image: float, text: float, epochs: int = 4) -> Listed:
    """One expert that goes straight on, each branch at its own speed per weight."""
    first = LAYOUT.flatten(MODEL)
    walk = [Snapshot(first.theta + t * image, first.phi - t * text) for t in range(epochs + 1)]
    return Listed(LAYOUT, {"one": walk})


def test_ends_stay_and_the_way_between_is_on_their_line() -> None:
    experts = wandering(MODEL)
    smoothed = Smoothed(experts)
    assert (smoothed.names, smoothed.epochs) == (experts.names, experts.epochs)
    for name in experts.names:
        found = [smoothed.snapshot(name, epoch) for epoch in range(experts.epochs + 1)]
        for end in (0, experts.epochs):
            assert torch.allclose(found[end].theta, experts.snapshot(name, end).theta)
            assert torch.allclose(found[end].phi, experts.snapshot(name, end).phi)
        for tensor, gone in shares(experts, name).items():
            assert gone == sorted(gone)
            assert (gone[0], gone[-1]) == (0, pytest.approx(1))
            views = [LAYOUT.views(x.theta, x.phi)[tensor] for x in found]
            expected = (1 - gone[2]) * views[0] + gone[2] * views[-1]
            assert torch.allclose(views[2], expected)


def test_a_share_is_the_way_of_one_tensor() -> None:
    experts = wandering(MODEL)
    walk = [experts.snapshot("expert-1", epoch) for epoch in range(5)]
    bias = [LAYOUT.views(x.theta, x.phi)["text_head.inner.bias"] for x in walk]
    ways = [float((bias[t] - bias[t - 1]).norm()) for t in range(1, 5)]
    found = shares(experts, "expert-1")["text_head.inner.bias"]
    assert found[3] == pytest.approx(sum(ways[:3]) / sum(ways))


def test_a_straight_way_at_one_speed_is_unchanged() -> None:
    experts = moving(0.1, 0.3)
    for epoch in range(5):
        found, given = (x.snapshot("one", epoch) for x in (Smoothed(experts), experts))
        assert torch.allclose(found.theta, given.theta)
        assert torch.allclose(found.phi, given.phi)


def test_smoothing_leaves_the_experts_as_they_are() -> None:
    experts = wandering(MODEL)
    kept = experts.snapshot("expert-0", 0).theta.clone()
    Smoothed(experts).snapshot("expert-0", 2)
    assert torch.equal(experts.snapshot("expert-0", 0).theta, kept)


@pytest.mark.parametrize(
    ("image", "text", "found"),
    [(0.1, 0.1, (2, 2)), (0.1, 0.2, (4, 2)), (0.3, 0.1, (2, 4)), (0.2, 0.15, (2, 3))],
)
def test_the_slower_branch_may_start_later(
    image: float, text: float, found: tuple[int, int]
) -> None:
    """As far as the experts reach: of four epochs the last is a target only."""
    assert ranges(moving(image, text), max_start=2, expert_epochs=1) == found

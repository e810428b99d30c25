"""Draws of an iteration, the options of distillers, and RepBlend's mixed features."""

from __future__ import annotations

import dataclasses
from importlib import import_module
from typing import Any

import pytest
import torch

from pds_ray import catalog
from pds_ray.config import DistillConfig
from pds_ray.distillers import bi_trajectory, lors, repblend
from pds_ray.distillers.base import Problem, prepared, settled
from pds_ray.distillers.repblend import blended
from pds_ray.distillers.trajectory import (
    batch_rows,
    endpoints,
    match_trajectories,
    student_loss,
    two_towers,
)
from pds_ray.errors import ConfigError
from tests.support.tiny_distillation import problem, start, student, wandering

TRAJECTORIES = [bi_trajectory, lors, repblend]


@pytest.mark.parametrize("name", catalog.DISTILLERS)
def test_every_distiller_is_there(name: str) -> None:
    module = import_module(catalog.DISTILLERS[name])
    assert catalog.distiller(name) is module
    assert module.TRAIN in ("all", "heads", "lora")
    config = settled(DistillConfig(), module.DEFAULTS)
    assert config.iterations > 0
    assert config.image_rate > 0
    assert callable(module.step)
    assert callable(module.variables)


def test_options_that_are_given_stand() -> None:
    given = DistillConfig(steps=3, loss="ence", mix=False, anchor=0.5)
    found = settled(given, repblend.DEFAULTS)
    assert (found.steps, found.loss, found.mix, found.anchor) == (3, "ence", False, 0.5)
    assert (found.batch_size, found.similarity, found.gradient) == (20, "low_rank", "adjoint")
    assert settled(found, repblend.DEFAULTS) == found
    assert settled(DistillConfig(), repblend.DEFAULTS).mix is True


def test_chunks_are_parts_of_one_permutation_and_then_of_another() -> None:
    made = problem(lors, sampling="chunks", batch_size=3)
    parts = [batch_rows(made, 8, 5, step) for step in range(5)]
    assert all(len(part) == 3 for part in parts)
    for first in (0, 2):  # two parts of 3 in 8 pairs
        assert len(set(torch.cat(parts[first : first + 2]).tolist())) == 6
    assert not torch.equal(torch.cat(parts[:2]), torch.cat(parts[2:4]))
    assert torch.equal(batch_rows(made, 8, 5, 1), parts[1])
    assert any(not torch.equal(batch_rows(made, 8, i, 0), parts[0]) for i in range(3))


def test_fresh_draws_each_step_from_all_pairs() -> None:
    made = problem(bi_trajectory, sampling="fresh", batch_size=6)
    parts = [batch_rows(made, 8, 0, step) for step in range(40)]
    assert all(len(set(part.tolist())) == 6 for part in parts)
    counts = torch.cat(parts).bincount(minlength=8)
    assert int(counts.min()) > 15, "240 draws of 8 pairs: 30 each"
    whole = batch_rows(problem(bi_trajectory, batch_size=100), 8, 0, 0)
    assert sorted(whole.tolist()) == list(range(8))


def test_experts_come_in_turn_and_starts_vary() -> None:
    made = problem(lors, max_start=3, expert_epochs=2)
    walks = {name: made.experts.snapshot(name, 2).theta for name in made.experts.names}
    found = [endpoints(made, iteration) for iteration in range(30)]

    def place(theta: torch.Tensor) -> tuple[str, int]:
        places = [
            (name, epoch)
            for name in walks
            for epoch in range(5)
            if torch.equal(made.experts.snapshot(name, epoch).theta, theta)
        ]
        return places[-1]

    starts, targets = ([place(end.theta) for end in ends] for ends in zip(*found, strict=True))
    for turn in range(10):
        assert {name for name, _ in targets[3 * turn : 3 * turn + 3]} == set(walks)
    assert {epoch for _, epoch in targets} == {2, 3, 4}
    assert all(t[1] - s[1] == 2 for s, t in zip(starts, targets, strict=True))


def test_independent_starts_that_are_equal_change_nothing() -> None:
    apart = problem(lors, max_start=1, independent_starts=True)
    apart = dataclasses.replace(apart, starts=(1, 1))
    together = problem(lors, max_start=1)
    for iteration in range(4):
        for one, other in zip(
            endpoints(apart, iteration), endpoints(together, iteration), strict=True
        ):
            assert torch.equal(one.theta, other.theta)
            assert torch.equal(one.phi, other.phi)


def test_independent_starts_are_drawn_apart() -> None:
    made = problem(lors, max_start=2, independent_starts=True)
    assert min(made.starts) == 2
    pairs = set()
    for iteration in range(24):
        first, _ = endpoints(made, iteration)
        for name in made.experts.names:
            walk = [made.experts.snapshot(name, epoch) for epoch in range(5)]
            pairs |= {
                (i, t)
                for i in range(5)
                for t in range(5)
                if torch.equal(walk[i].theta, first.theta) and torch.equal(walk[t].phi, first.phi)
            }
    assert any(i != t for i, t in pairs)


def test_experts_of_too_few_epochs_are_refused() -> None:
    model = student()
    made = Problem(model, wandering(model, epochs=2), DistillConfig(expert_epochs=2), 0)
    with pytest.raises(ConfigError, match="have 2 epochs, and starts and targets reach to epoch 3"):
        prepared(made, lors.DEFAULTS)


@pytest.mark.parametrize("distiller", TRAJECTORIES, ids=lambda module: module.__name__[19:])
def test_a_step_sets_every_gradient_and_is_a_function_of_its_number(distiller: Any) -> None:
    made = problem(distiller, dropout="replay")
    variables = [distiller.variables(start(), made.config, 0) for _ in range(2)]
    torch.manual_seed(5)
    one = distiller.step(made, variables[0], 7)
    torch.manual_seed(6)  # nothing is drawn from the global generator
    other = distiller.step(made, variables[1], 7)
    assert one == other
    assert set(one.losses) == {"image", "text"}
    for first, second in zip(*(v.parameters() for v in variables), strict=True):
        assert first.grad is not None
        assert first.grad.shape == first.shape
        assert torch.equal(first.grad, second.grad)
    assert float(variables[0].images.grad.norm()) > 0
    assert float(variables[0].text.grad.norm()) > 0
    assert distiller.step(made, variables[0], 8) != one


def test_repblend_without_mixing_is_lors_on_two_heads() -> None:
    """Two ways: mixing switched off, and the share of the pair itself at 1."""
    made = problem(repblend, mix=False, dropout="replay")
    variables = repblend.variables(start(), made.config, 0)
    plain = match_trajectories(made, variables, 3)
    assert repblend.step(made, variables, 3) == plain
    mixing = dataclasses.replace(made, config=dataclasses.replace(made.config, mix=True))
    assert repblend.step(mixing, variables, 3) != plain
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *_, **__: torch.ones(()))
        made = dataclasses.replace(made, config=dataclasses.replace(made.config, dropout="off"))
        off = match_trajectories(made, variables, 3)
        gradients = [p.grad.clone() for p in variables.parameters()]
        found = match_trajectories(made, variables, 3, blended)
    assert found.losses == pytest.approx(off.losses)
    for parameter, gradient in zip(variables.parameters(), gradients, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("temperature", [0.07, 0.376])
def test_the_student_has_the_temperature_that_is_asked_for(temperature: float) -> None:
    made = problem(bi_trajectory, temperature=temperature, batch_size=8)
    variables = bi_trajectory.variables(start(), made.config, 0)
    theta, phi = (
        made.experts.snapshot("expert-0", 1).theta,
        made.experts.snapshot("expert-0", 1).phi,
    )
    found = student_loss(made, variables, 0)(theta, phi, 0)
    weights = made.experts.layout.views(theta, phi)
    image, text = two_towers(
        made.model, weights, variables.images, variables.text, None, torch.Generator()
    )
    cosines, own = image @ text.T / temperature, torch.arange(8)
    cross_entropy = torch.nn.functional.cross_entropy
    by_hand = (cross_entropy(cosines, own) + cross_entropy(cosines.T, own)) / 2
    torch.testing.assert_close(found, by_hand, rtol=1e-12, atol=0)


def test_features_are_mixed_after_the_backbone_and_alike_for_both() -> None:
    model, made = student("heads").eval(), start()
    weights = dict(model.named_parameters())
    draw = torch.Generator().manual_seed(4)
    image, text = blended(model, weights, made.images, made.text, None, draw)
    draw.manual_seed(4)
    share, order = float(torch.rand((), generator=draw)), torch.randperm(8, generator=draw)
    features = model.backbone(made.images)
    for found, x, head in (
        (image, features, model.image_head),
        (text, made.text, model.text_head),
    ):
        mixed = torch.stack(
            [share * x[k] + (1 - share) * x[int(order[k])] for k in range(len(order))]
        )
        assert torch.allclose(found, torch.nn.functional.normalize(head(mixed, None), dim=1))
    whole = two_towers(model, weights, made.images, made.text, None, draw)
    assert not torch.allclose(whole[0], image)


def test_augmented_steps_see_moved_images() -> None:
    """Images of one colour look the same wherever they are moved; others do not."""
    plain, moved = problem(lors), problem(lors, augment=True)
    begun = start()
    colours = begun.images.mean((2, 3), keepdim=True).expand_as(begun.images)
    for images, same in ((begun.images, False), (colours, True)):
        variables = lors.variables(dataclasses.replace(begun, images=images), plain.config, 0)
        one, other = (lors.step(made, variables, 3).losses for made in (plain, moved))
        assert (one == pytest.approx(other, rel=1e-9)) is same
        assert lors.step(moved, variables, 3).losses == other

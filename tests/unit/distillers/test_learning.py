"""A world of four kinds of pairs: four distilled pairs teach more of it than four real ones."""

from __future__ import annotations

from statistics import mean

import pytest
import torch

from pds_ray.config import DistillConfig
from pds_ray.distillers import bi_trajectory
from pds_ray.distillers.base import Layout, Problem, Start
from pds_ray.stages.optimise import optimise
from pds_ray.training.losses import info_nce
from pds_ray.training.two_towers import TwoTowers
from tests.support.tiny_distillation import SIDE, TEXT_WIDTH, Listed, student

KINDS, BEGIN = 4, 100

World = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def world(pairs: int, seed: int) -> World:
    """Return images of a colour and text vectors, one per kind, with noise, and the kinds."""
    base, draw = (torch.Generator().manual_seed(number) for number in (99, seed))

    def noise(*shape: int, of: torch.Generator = draw) -> torch.Tensor:
        return torch.randn(shape, generator=of, dtype=torch.float64)

    colours, words = noise(KINDS, 3, 1, 1, of=base), 1.5 * noise(KINDS, TEXT_WIDTH, of=base)
    kinds = torch.randint(KINDS, (pairs,), generator=draw)
    images = colours[kinds] + 0.8 * noise(pairs, 3, SIDE, SIDE)
    return images, words[kinds] + 0.3 * noise(pairs, TEXT_WIDTH), kinds


def experts(images: torch.Tensor, text: torch.Tensor) -> Listed:
    found = {}
    for number in range(3):
        model = student(seed=BEGIN)
        layout, optimizer = Layout.of(model), torch.optim.SGD(model.parameters(), lr=0.1)
        walk, draw = [layout.flatten(model)], torch.Generator().manual_seed(number)
        for _ in range(2):
            for rows in torch.randperm(len(images), generator=draw).split(20):
                optimizer.zero_grad()
                info_nce(*model(images[rows], text[rows])).backward()
                optimizer.step()
            walk.append(layout.flatten(model))
        found[str(number)] = walk
    return Listed(layout, found)


def taught(images: torch.Tensor, text: torch.Tensor, sizes: tuple[float, float]) -> TwoTowers:
    """Return a model after a few steps on a set, as the student takes them."""
    model = student(seed=BEGIN)
    heads = {id(parameter) for parameter in model.text_head.parameters()}
    image = [parameter for parameter in model.parameters() if id(parameter) not in heads]
    groups = [
        {"params": image, "lr": sizes[0]},
        {"params": list(model.text_head.parameters()), "lr": sizes[1]},
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    for _ in range(12):
        optimizer.zero_grad()
        info_nce(*model(images, text)).backward()
        optimizer.step()
    return model


@torch.no_grad()
def score(model: TwoTowers, held_out: World) -> float:
    """Return the share of images whose nearest text is one of their kind."""
    image, text = model(*held_out[:2])
    kinds = held_out[2]
    return float((kinds[(image @ text.T).argmax(1)] == kinds).double().mean())


@pytest.mark.long
def test_distilled_pairs_teach_more_than_real_ones() -> None:
    """Real pairs are given the best of three step sizes."""
    images, text, _ = world(240, seed=1)
    held_out, trained = world(200, seed=2), experts(images, text)
    config = DistillConfig(
        iterations=40, steps=6, max_start=1, image_rate=2.0, text_rate=2.0, step_rate=1e-5,
        step_size=0.03,
    )  # fmt: skip
    before, after = [], []
    for seed in (2, 3):
        rows = torch.randperm(240, generator=torch.Generator().manual_seed(seed))[:KINDS]
        real = [taught(images[rows], text[rows], (size, size)) for size in (0.01, 0.03, 0.1)]
        before.append(max(score(model, held_out) for model in real))
        made = Problem(student(), trained, config, seed)
        found = optimise(made, bi_trajectory, Start(images[rows], text[rows])).tensors
        image_step, text_step = found["step_sizes"].tolist()
        model = taught(found["images"], found["text"], (image_step, text_step))
        after.append(score(model, held_out))
    assert min(y - x for x, y in zip(before, after, strict=True)) > 0
    assert mean(after) > mean(before) + 0.1

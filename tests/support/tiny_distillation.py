"""A student of a few hundred weights in float64, experts in memory, and a set of a few pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pds_ray.config import DistillConfig
from pds_ray.distillers.base import Layout, Problem, Snapshot, Start, prepared
from pds_ray.training.two_towers import TwoTowers

PAIRS, SIDE, FEATURES, TEXT_WIDTH = 8, 6, 5, 4


@dataclass(frozen=True)
class Listed:
    """Experts as lists of snapshots."""

    layout: Layout
    snapshots: dict[str, list[Snapshot]]

    @property
    def names(self) -> Sequence[str]:
        return list(self.snapshots)

    @property
    def epochs(self) -> int:
        return len(next(iter(self.snapshots.values()))) - 1

    def snapshot(self, expert: str, epoch: int) -> Snapshot:
        return self.snapshots[expert][epoch]


def student(train: str = "all", seed: int = 0) -> TwoTowers:
    """A convolution and two heads; with `heads` the convolution is frozen."""
    torch.manual_seed(seed)
    conv = nn.Sequential(nn.Conv2d(3, FEATURES, 3, stride=2), nn.Tanh(), nn.AdaptiveAvgPool2d(1))
    model = TwoTowers(nn.Sequential(*conv, nn.Flatten()), FEATURES, TEXT_WIDTH, image_head=True)
    if train == "heads":
        assert model.backbone is not None
        model.backbone.requires_grad_(False)
    return model.double()


def wandering(model: TwoTowers, experts: int = 3, epochs: int = 4, seed: int = 0) -> Listed:
    """Experts that walk at random from the weights of the model."""
    draw, layout = torch.Generator().manual_seed(seed), Layout.of(model)

    def moved(x: torch.Tensor) -> torch.Tensor:
        return x + 0.1 * torch.randn(x.shape, generator=draw, dtype=x.dtype)

    found = {}
    for number in range(experts):
        walk = [layout.flatten(model)]
        for _ in range(epochs):
            walk.append(Snapshot(moved(walk[-1].theta), moved(walk[-1].phi)))
        found[f"expert-{number}"] = walk
    return Listed(layout, found)


def start(seed: int = 0, pairs: int = PAIRS) -> Start:
    draw = torch.Generator().manual_seed(seed)
    images = torch.randn(pairs, 3, SIDE, SIDE, generator=draw, dtype=torch.float64)
    return Start(images, torch.randn(pairs, TEXT_WIDTH, generator=draw, dtype=torch.float64))


def problem(distiller: Any, seed: int = 0, **options: Any) -> Problem:
    """A prepared problem for a distiller, in small steps."""
    model = student(distiller.TRAIN)
    small = {
        "steps": 3,
        "batch_size": 4,
        "image_rate": 0.1,
        "text_rate": 0.1,
        "rank": 2,
        "step_rate": 1e-5,
    }
    config = DistillConfig(**{**small, **options})
    made = Problem(model, wandering(model), config, seed)
    return prepared(made, distiller.DEFAULTS)

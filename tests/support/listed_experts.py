"""Experts in memory: weights that wander from a model's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from pds_ray.store.flat import Layout, Snapshot
from pds_ray.training.loop import generator


@dataclass(frozen=True)
class ListedExperts:
    """Experts as lists of snapshots, by name."""

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


def wandering(model: nn.Module, count: int = 2, epochs: int = 3, step: float = 0.05):
    """Return experts that start from the model's weights and take random steps, all a bit alike."""
    layout = Layout.of(model)
    start = layout.flatten(model)

    def walk(expert: str) -> list[Snapshot]:
        snapshots = [start]
        for epoch in range(epochs):
            moved = []
            for branch, flat in (("theta", snapshots[-1].theta), ("phi", snapshots[-1].phi)):
                own = torch.randn(flat.shape, generator=generator(expert, epoch, branch))
                common = torch.randn(flat.shape, generator=generator("all", epoch, branch))
                moved.append(flat + step * (own + common).to(flat))
            snapshots.append(Snapshot(*moved))
        return snapshots

    return ListedExperts(layout, {name: walk(name) for name in map(str, range(count))})

"""Two changes of the experts' trajectories: smoothed weights, and starts apart for each branch."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from pds_ray.store.flat import Layout, Snapshot

if TYPE_CHECKING:
    from pds_ray.distillers.base import Experts

LOOKED_AT = 3
"""Experts whose speed is measured: they are trained alike."""


@dataclass(frozen=True)
class Smoothed:
    """Experts whose weights lie on the line from first to last snapshot, tensor by tensor.

    After t epochs a tensor stands at the share of its whole way that it has gone:

        b(t) = sum_{u <= t} |x(u) - x(u-1)| / sum_u |x(u) - x(u-1)|
        x'(t) = (1 - b(t)) x(0) + b(t) x(end)                                   (PTM of PTM-ST)
    """

    experts: Experts
    _shares: dict[str, Mapping[str, list[float]]] = field(default_factory=dict)
    """Expert -> tensor -> b(0), ..., b(end); computed when an expert is first asked for."""

    @property
    def names(self) -> Sequence[str]:
        """The names of the experts."""
        return self.experts.names

    @property
    def epochs(self) -> int:
        """The number of the last snapshot."""
        return self.experts.epochs

    @property
    def layout(self) -> Layout:
        """The tensors of the flat vectors."""
        return self.experts.layout

    def snapshot(self, expert: str, epoch: int) -> Snapshot:
        """Return the smoothed weights of one expert after some epochs."""
        if expert not in self._shares:
            self._shares[expert] = shares(self.experts, expert)
        first, last = (self.experts.snapshot(expert, at) for at in (0, self.epochs))
        result = Snapshot(first.theta.clone(), first.phi.clone())
        ends, moving = (self.layout.views(x.theta, x.phi) for x in (last, result))
        for name, tensor in moving.items():
            tensor.lerp_(ends[name], self._shares[expert][name][epoch])
        return result


def shares(experts: Experts, expert: str) -> dict[str, list[float]]:
    """Return b(0), ..., b(end) of each tensor; all 0 for one that never moves."""
    ways: dict[str, list[float]] = {}
    before: dict[str, torch.Tensor] = {}
    for epoch in range(experts.epochs + 1):
        snapshot = experts.snapshot(expert, epoch)
        now = experts.layout.views(snapshot.theta, snapshot.phi)
        for name, tensor in now.items():
            gone = float((tensor - before[name]).norm()) if before else 0.0
            way = ways.setdefault(name, [])
            way.append(gone + (way[-1] if way else 0.0))
        before = now
    return {name: [x / way[-1] if way[-1] else 0.0 for x in way] for name, way in ways.items()}


def ranges(experts: Experts, max_start: int, expert_epochs: int) -> tuple[int, int]:
    """Return how many epochs the image and the text branch may start from, each by itself.

    AMD lets the branches start apart, in ranges that follow how fast each moves. Its rule is not
    published in full; here the faster branch has `max_start`, and the other as many epochs as it
    needs to go as far: `max_start` times the median ratio of both movements per weight, at most
    what the experts have.
    """
    ratio = statistics.median(_speeds(experts) or [1.0])
    longest = experts.epochs - expert_epochs + 1
    image, text = (max_start * max(1.0, factor) for factor in (1 / ratio, ratio))
    return round(min(image, longest)), round(min(text, longest))


def _speeds(experts: Experts) -> list[float]:
    """Return the movement of the image branch divided by that of the text branch, per epoch."""
    found = []
    for expert in experts.names[:LOOKED_AT]:
        before = experts.snapshot(expert, 0)
        for epoch in range(1, experts.epochs + 1):
            now = experts.snapshot(expert, epoch)
            image = float((now.theta - before.theta).abs().mean())
            text = float((now.phi - before.phi).abs().mean())
            if image and text:
                found.append(image / text)
            before = now
    return found

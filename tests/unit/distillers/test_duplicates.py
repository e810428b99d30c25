"""A pair that a set holds twice: the learned similarity finds that either caption fits both."""

from __future__ import annotations

import pytest
import torch

from pds_ray.config import DistillConfig
from pds_ray.distillers import lors
from pds_ray.distillers.base import Layout, Problem, Start
from pds_ray.stages.optimise import optimise
from pds_ray.training.losses import SCALE, SOFT_LOSSES
from tests.support.tiny_distillation import Listed, start, student

PAIRS, STEPS, SIZE = 6, 4, 0.02


def taught_the_truth(set_: Start, truth: torch.Tensor) -> Listed:
    """Experts that descend on the set itself, with the true similarity as targets."""
    found = {}
    for number in range(3):
        model = student(seed=100 + number)
        layout, optimizer = Layout.of(model), torch.optim.SGD(model.parameters(), lr=SIZE)
        walk = [layout.flatten(model)]
        for _ in range(2):
            for _ in range(STEPS):
                optimizer.zero_grad()
                image, text = model(set_.images, set_.text)
                SOFT_LOSSES["ence"](SCALE * image @ text.T, truth).backward()
                optimizer.step()
            walk.append(layout.flatten(model))
        found[str(number)] = walk
    return Listed(layout, found)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_duplicate_is_more_similar_than_any_other_pair(seed: int) -> None:
    begun = start(seed, PAIRS - 1)
    doubled = Start(*(torch.cat([part, part[:1]]) for part in (begun.images, begun.text)))
    truth = torch.eye(PAIRS, dtype=torch.float64)
    twins = torch.zeros(PAIRS, PAIRS, dtype=torch.bool)
    twins[0, -1] = twins[-1, 0] = True
    truth[twins] = 1
    config = DistillConfig(
        iterations=100, steps=STEPS, max_start=2, batch_size=PAIRS, sampling="fresh", loss="ence",
        similarity="full", similarity_rate=0.02, step_size=SIZE, step_rate=1e-9, image_rate=1e-9,
        text_rate=1e-9,
    )  # fmt: skip
    made = Problem(student(), taught_the_truth(doubled, truth), config, seed)
    found = optimise(made, lors, doubled).tensors["similarity"]
    others = ~twins & ~torch.eye(PAIRS, dtype=torch.bool)
    assert float(found[twins].min()) > 0.05
    assert float(found[twins].min()) > float(found[others].max()) + 0.02

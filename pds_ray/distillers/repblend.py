"""RepBlend (Zhang et al., 2025): LoRS on two heads, with the features of pairs mixed in each step.

The backbone is frozen; experts and student train a head per modality. In each step the features of
a batch are blended with those of the same batch in another order, images and text alike: so the
learned pairs do not collapse onto each other.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812 - the name everybody knows

from pds_ray.distillers.base import Problem, Step, Variables
from pds_ray.distillers.trajectory import LORS, Weights, match_trajectories, two_towers
from pds_ray.distillers.variables import for_trajectories
from pds_ray.training.two_towers import TwoTowers

TRAIN: Literal["all", "heads", "lora"] = "heads"
DEFAULTS = {**LORS, "mix": True, "merge_branches": True}
variables = for_trajectories


def step(problem: Problem, variables: Variables, iteration: int) -> Step:
    """Match one stretch of the trajectory of an expert's heads."""
    student = blended if problem.config.mix else two_towers
    return match_trajectories(problem, variables, iteration, student)


def blended(
    model: TwoTowers,
    weights: Weights,
    images: torch.Tensor,
    text: torch.Tensor,
    masks: torch.Tensor | None,
    draw: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embed a batch, its features mixed: x = share * x + (1 - share) * x in another order.

    Share ~ Beta(1, 1) and the order are drawn once for both modalities. The targets are not mixed,
    as published.
    """
    share = torch.rand((), generator=draw).to(images)
    order = torch.randperm(len(images), generator=draw).to(images.device)
    assert model.backbone is not None
    mixed = [share * x + (1 - share) * x[order] for x in (model.backbone(images), text)]
    image_mask, text_mask = (None, None) if masks is None else masks.unbind(1)
    image = _head(model.image_head, "image_head.", weights, mixed[0], image_mask)
    return image, _head(model.text_head, "text_head.", weights, mixed[1], text_mask)


def _head(
    head: nn.Module | None,
    prefix: str,
    weights: Weights,
    x: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Return unit vectors [b, d] of one head with the given weights."""
    assert head is not None
    own = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
    return F.normalize(functional_call(head, own, (x, mask)), dim=1)

"""MDM: real and learned pairs are to look alike to teachers merged from two experts each.

Multimodal Distribution Matching (CVPR 2026, arXiv 2605.23482). No student is trained: an iteration
is one gradient of

    InfoNCE(learned) + 0.8 energy(u, u') + 0.8 energy(g, g')

with agreement u and discrepancy g of learned and of real pairs (energy.py). The experts must share
the weights they start from, as those of a pretrained backbone do: where two do not, the teacher is
merged from two epochs of one expert (our choice).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch.func import functional_call
from torch.nn.utils import clip_grad_norm_

from pds_ray.config import DistillConfig
from pds_ray.distillers.base import Experts, Problem, Step
from pds_ray.distillers.energy import energy, features
from pds_ray.distillers.merging import merged
from pds_ray.distillers.variables import Start, Variables
from pds_ray.store.flat import Snapshot
from pds_ray.training.loop import generator, seed_of
from pds_ray.training.losses import info_nce
from pds_ray.training.two_towers import ResidualHead

TRAIN: Literal["all", "heads", "lora"] = "all"
DEFAULTS = {"iterations": 200, "batch_size": 64, "image_rate": 100.0, "text_rate": 100.0}
"""Published for 100 pairs of Flickr30K; the best sets came after 50 to 200 iterations."""
ALPHA = 0.5
"""The share of the experts' common way that a teacher goes from the start, as published."""
WEIGHT = 0.8
"""The weight of either energy, as published."""
LONGEST = 1.0
"""The length to which the gradient of images and text together is cut, as published."""
Embedded = tuple[torch.Tensor, torch.Tensor]
"""Unit embeddings of images and text vectors, [n, d] each."""


def variables(start: Start, config: DistillConfig, seed: int) -> Variables:  # noqa: ARG001
    """Return images and text vectors; similarity and step sizes are none of MDM's."""
    return Variables(start.images, start.text)


def step(problem: Problem, variables: Variables, iteration: int) -> Step:
    """Set the gradients for one teacher, one real batch and as many learned pairs.

    The losses are `loss`, and its parts `info_nce`, `agreement` and `discrepancy`.
    """
    draw = generator(problem.seed, "mdm", iteration)
    merged_weights = teacher(problem, draw, seed_of(problem.seed, "mdm head", iteration))
    images, text = variables.images, variables.text
    weights = {name: value.to(images) for name, value in merged_weights.items()}
    assert problem.real is not None
    real = tuple(part.to(images) for part in problem.real(draw))
    rows = torch.randperm(len(images), generator=draw)[: problem.config.batch_size]
    model = problem.model.eval()
    with torch.no_grad():
        found = functional_call(model, weights, real)
    parts = losses(functional_call(model, weights, (images[rows], text[rows])), found)
    loss = torch.stack(list(parts.values())).sum()
    variables.zero_grad()
    loss.backward()
    clip_grad_norm_([images, text], LONGEST)
    return Step({name: value.item() for name, value in {"loss": loss, **parts}.items()})


def losses(learned: Embedded, real: Embedded) -> dict[str, torch.Tensor]:
    """Return the parts of the loss of n learned and m real pairs, scalars."""
    agreement, discrepancy = zip(features(*learned), features(*real), strict=True)
    return {
        "info_nce": info_nce(*learned),
        "agreement": WEIGHT * energy(*agreement),
        "discrepancy": WEIGHT * energy(*discrepancy),
    }


def teacher(problem: Problem, draw: torch.Generator, head_seed: int) -> dict[str, torch.Tensor]:
    """Return the weights of a teacher, by name, for `torch.func.functional_call`.

    Two experts at random epochs after the first are merged: the image branch about the weights that
    both started from, the text head about a new one from `head_seed`, as in the published code,
    whose every iteration has a new text head.
    """
    layout = problem.experts.layout
    start, first, second = drawn(problem.experts, draw)
    references = layout.views(start.theta, head_like(problem, start, head_seed))
    one, other = (layout.views(expert.theta, expert.phi) for expert in (first, second))
    return {n: merged(value, one[n], other[n], ALPHA) for n, value in references.items()}


def drawn(experts: Experts, draw: torch.Generator) -> tuple[Snapshot, Snapshot, Snapshot]:
    """Return the start of two random experts and a snapshot of each, of epoch 1 or later.

    They are never one snapshot, unless there is but one.
    """

    def pick(count: int) -> int:
        return int(torch.randint(count, (), generator=draw))

    expert, other = (experts.names[pick(len(experts.names))] for _ in range(2))
    start = experts.snapshot(expert, 0)
    if not torch.equal(start.theta, experts.snapshot(other, 0).theta):
        other = expert
    epochs = list(range(1, experts.epochs + 1))
    epoch = epochs[pick(len(epochs))]
    left = [e for e in epochs if (other, e) != (expert, epoch)] or epochs
    pair = (experts.snapshot(expert, epoch), experts.snapshot(other, left[pick(len(left))]))
    return start, *pair


def head_like(problem: Problem, start: Snapshot, seed: int) -> torch.Tensor:
    """Return a new text head as a flat vector like `start.phi`, from a seed of its own."""
    head = problem.model.text_head
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = ResidualHead(head.project.in_features, head.project.out_features)
    return torch.cat([p.detach().flatten() for p in fresh.parameters()]).to(start.phi)

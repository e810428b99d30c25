"""One iteration of the methods that match trajectories; they differ in options and in the student.

Whatever is random in it is a function of the seed, the iteration and the step of the student.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.func import functional_call

from pds_ray.distillers.base import Problem, Snapshot, Step, Variables
from pds_ray.distillers.matching import Loss, match
from pds_ray.distillers.similarity import Similarity
from pds_ray.training.data import augment
from pds_ray.training.loop import generator
from pds_ray.training.losses import SOFT_LOSSES
from pds_ray.training.two_towers import TwoTowers, dropout_masks

VL_DISTILL: Mapping[str, Any] = {
    "iterations": 2000,
    "gradient": "adjoint",  # published: unrolled, the same in more memory
    "steps": 8,
    "expert_epochs": 1,
    "max_start": 2,
    "batch_size": 100,
    "sampling": "fresh",
    "image_rate": 1000.0,
    "text_rate": 1000.0,
    "step_rate": 1e-2,
    "step_size": 0.1,
    "loss": "info_nce",
    "similarity": "identity",
    "similarity_rate": 10.0,  # where one is asked for: this and the next two are those of LoRS
    "rank": 10,
    "alpha": 3.0,
    "merge_branches": False,
}
"""Options of section `distill` as published for VL-Distill (Wu et al., TMLR 2024)."""
LORS: Mapping[str, Any] = {
    **VL_DISTILL,
    "iterations": 3000,
    "gradient": "adjoint",  # published: tesla
    "batch_size": 20,
    "sampling": "chunks",
    "image_rate": 100.0,
    "text_rate": 100.0,
    "loss": "wbce",
    "similarity": "low_rank",
}
"""The same as published for LoRS (Xu et al., ICML 2024), with 100 pairs of Flickr30K."""

Weights = dict[str, torch.Tensor]
Student = Callable[
    [TwoTowers, Weights, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Generator],
    tuple[torch.Tensor, torch.Tensor],
]
"""Embeds b images and text vectors as unit vectors [b, d]; it is given the model, its trained
weights, the masks of dropout or None, and a generator for the step."""


def two_towers(
    model: TwoTowers,
    weights: Weights,
    images: torch.Tensor,
    text: torch.Tensor,
    masks: torch.Tensor | None,
    _draw: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embed a batch with the whole model."""
    embedded: tuple[torch.Tensor, torch.Tensor] = functional_call(
        model, weights, (images, text, masks)
    )
    return embedded


def match_trajectories(
    problem: Problem, variables: Variables, iteration: int, student: Student = two_towers
) -> Step:
    """Set the gradients of one iteration; the losses are the ratios of both branches."""
    config = problem.config
    start, target = (_beside(variables, end) for end in endpoints(problem, iteration))
    assert variables.step_sizes is not None
    similarity = [] if variables.similarity is None else list(variables.similarity.parameters())
    learned = [variables.images, variables.text, *similarity]
    sizes = variables.step_sizes.detach().requires_grad_()
    matched = match(
        student_loss(problem, variables, iteration, student),
        learned,
        (sizes[0], sizes[1]),
        start,
        target,
        config.steps,
        config.gradient,
        bool(config.merge_branches),
    )
    for tensor, gradient in zip(learned, matched.gradients, strict=True):
        tensor.grad = gradient
    variables.step_sizes.grad = torch.stack(matched.step_gradients)
    image, text = matched.ratios
    return Step({"image": float(image), "text": float(text)})


def student_loss(
    problem: Problem, variables: Variables, iteration: int, student: Student = two_towers
) -> Loss:
    """Return the loss of each step of the student in one iteration."""
    config, model, layout = problem.config, problem.model, problem.experts.layout
    images, text = variables.images, variables.text
    similarity = variables.similarity or Similarity()

    def loss(theta: torch.Tensor, phi: torch.Tensor, step: int) -> torch.Tensor:
        rows = batch_rows(problem, len(images), iteration, step).to(images.device)
        draw, masks = generator(problem.seed, "student", iteration, step), None
        if config.dropout == "replay":
            masks = dropout_masks(len(rows), model.width, draw).to(images)
        batch = images[rows]
        if config.augment:
            moves = generator(problem.seed, "augment", iteration, step)
            batch = augment(batch, torch.rand(len(rows), 3, generator=moves).to(batch))
        weights = layout.views(theta, phi)
        embedded = student(model, weights, batch, text[rows], masks, draw)
        logits = (1 / config.temperature) * embedded[0] @ embedded[1].T
        return SOFT_LOSSES[config.loss](logits, similarity(rows))

    return loss


def batch_rows(problem: Problem, pairs: int, iteration: int, step: int) -> torch.Tensor:
    """Return the pairs of one step of the student, int64 [b].

    `fresh` cuts a new permutation in each step, as VL-Distill does. `chunks` takes the parts of one
    permutation in turn, and another one when less than a part is left, as LoRS does.
    """
    size = min(problem.config.batch_size, pairs)
    chunks = pairs // size if problem.config.sampling == "chunks" else 1
    which, place = divmod(step, chunks)
    draw = generator(problem.seed, "pairs", iteration, which)
    return torch.randperm(pairs, generator=draw)[place * size : (place + 1) * size]


def endpoints(problem: Problem, iteration: int) -> tuple[Snapshot, Snapshot]:
    """Return start and target of the student.

    The experts come in turn, in another order each time round; the epoch of the start is drawn.
    """
    config, experts, seed = problem.config, problem.experts, problem.seed
    turn, place = divmod(iteration, len(experts.names))
    order = torch.randperm(len(experts.names), generator=generator(seed, "experts", turn))
    expert = experts.names[int(order[place])]
    draw = generator(seed, "start", iteration)
    image = text = int(torch.randint(problem.starts[0], (), generator=draw))
    if config.independent_starts:
        text = int(torch.randint(problem.starts[1], (), generator=draw))

    def after(epochs: int) -> Snapshot:
        theta = experts.snapshot(expert, image + epochs)
        phi = theta if text == image else experts.snapshot(expert, text + epochs)
        return Snapshot(theta.theta, phi.phi)

    return after(0), after(config.expert_epochs)


def _beside(variables: Variables, snapshot: Snapshot) -> Snapshot:
    """Return a snapshot on the device of the variables, in their dtype."""
    images = variables.images
    return Snapshot(snapshot.theta.to(images), snapshot.phi.to(images))

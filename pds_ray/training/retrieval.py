"""Train two towers on image-text pairs by a protocol, and measure retrieval with them.

The formulas are in docs/methods.md, "Evaluation". Batches, augmentation and dropout are functions
of (seed, epoch, step, pair), never of the worker: several workers take slices of the same batches.
A backbone that draws by itself (stochastic depth) is seeded by step and worker: a resumed training
draws the same, several workers draw other values than one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from pds_ray.config import ProtocolConfig
from pds_ray.training import loop
from pds_ray.training.data import (
    Gallery,
    Pixels,
    TrainingPairs,
    augment,
    batches,
    caption_rows,
)
from pds_ray.training.loop import generator, seed_of
from pds_ray.training.losses import info_nce
from pds_ray.training.recall import recalls
from pds_ray.training.two_towers import TwoTowers, dropout_masks
from pds_ray.training.workers import Workers

ENCODE_BATCH, ENCODE_TEXTS = 256, 1 << 14


Step = Callable[[int], object]


@dataclass(frozen=True)
class RetrievalTraining:
    """The pairs, and how two towers are trained on them."""

    pairs: TrainingPairs
    pixels: Pixels
    protocol: ProtocolConfig
    seed: int
    workers: Workers = field(default_factory=Workers)
    loss: Callable[..., torch.Tensor] = info_nce
    """Takes the unit embeddings of a whole batch, image [b, d] and text [b, d], and, where the
    pairs have soft targets, those within the batch as `similarity` [b, b]."""


@dataclass(frozen=True)
class Batch:
    """The pairs of one step."""

    epoch: int
    step: int
    rows: torch.Tensor
    """int64 [b]."""
    texts: torch.Tensor
    """int64 [b]: the rows of their text vectors."""
    moves: torch.Tensor | None
    """float32 [B, 3]: this epoch's augmentation of each of the B pairs; None for none."""


def train_two_towers(
    model: TwoTowers,
    optimizer: torch.optim.Optimizer,
    training: RetrievalTraining,
    epochs: range,
    after_epoch: Callable[[int, torch.Tensor], None] = lambda _epoch, _loss: None,
    tell: Callable[[float], object] = lambda _epochs: None,
) -> None:
    """Train `model`, which is on the worker's device, for some epochs of the protocol.

    `after_epoch` is that of `loop.train`; `tell` is called before each step with the epochs done.
    """
    pairs, workers = training.pairs, training.workers
    wrapped = workers.wrap(model)
    wrapped.train()
    augmented = training.protocol.augment and model.backbone is not None and pairs.are_images

    def loss(batch: Batch) -> torch.Tensor:
        size, mine = len(batch.rows), workers.mine(batch.rows)
        images = training.pixels(pairs.images[mine].to(workers.device))
        if batch.moves is not None:
            images = augment(images, batch.moves[mine])
        step = batch.epoch, batch.step
        torch.manual_seed(seed_of(training.seed, "backbone", *step, workers.rank))
        masks = dropout_masks(size, model.width, generator(training.seed, "dropout", *step))
        text = pairs.text[workers.mine(batch.texts)].to(workers.device)
        embedded = wrapped(images, text, workers.mine(masks).to(workers.device))
        targets = {}
        if pairs.similarity is not None:
            within = pairs.similarity[batch.rows][:, batch.rows]
            targets = {"similarity": within.to(workers.device)}
        return training.loss(*(workers.gather(rows, size) for rows in embedded), **targets)

    factor = schedule(training.protocol)

    def rate(position: float) -> float:
        tell(position)
        return factor(position)

    loop.train(
        optimizer,
        lambda epoch: _batches(training, augmented, epoch),
        loss,
        epochs,
        rate,
        after_epoch,
    )


def _batches(training: RetrievalTraining, augmented: bool, epoch: int) -> list[Batch]:
    pairs, seed, protocol = training.pairs, training.seed, training.protocol
    count = len(pairs.images)
    draw = generator(seed, "augment", epoch)
    moves = torch.rand(count, 3, generator=draw) if augmented else None
    steps = batches(count, protocol.batch_size, protocol.sampling, seed, epoch)

    def texts(step: int, rows: torch.Tensor) -> torch.Tensor:
        return caption_rows(pairs, rows, generator(seed, "captions", epoch, step))

    return [Batch(epoch, step, rows, texts(step, rows), moves) for step, rows in enumerate(steps)]


def schedule(protocol: ProtocolConfig) -> Callable[[float], float]:
    """Return the factor of the learning rate as a function of the epochs done.

    `step` falls to a tenth after the middle epoch, as published; `cosine` falls to zero; `constant`
    stays, so that the first epochs do not depend on how many there will be.
    """

    def step(position: float) -> float:
        return 0.1 if int(position) > protocol.epochs // 2 else 1.0

    def cosine(position: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * position / protocol.epochs))

    return {"step": step, "cosine": cosine, "constant": loop.constant_rate}[protocol.schedule]


def make_optimizer(
    parameters: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]], protocol: ProtocolConfig
) -> torch.optim.Optimizer:
    """Return the optimizer of the protocol.

    `parameters` may be parameter groups, each with a learning rate or weight decay of its own.
    """
    options: dict[str, Any] = {
        "lr": protocol.learning_rate,
        "weight_decay": protocol.weight_decay,
    }
    if protocol.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=protocol.momentum, **options)
    return torch.optim.AdamW(parameters, **options)


@torch.no_grad()
def embed_images(
    model: Callable[[torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    pixels: Pixels,
    workers: Workers,
    step: Step = lambda _images: None,
) -> torch.Tensor:
    """Return `model` of all n images, float32 [n, d]; the workers share the images.

    `step` is called after each batch with the images that this worker has done.
    """
    mine = workers.mine(torch.arange(len(images)))
    parts, done = [], 0
    for rows in mine.split(ENCODE_BATCH):
        parts.append(model(pixels(images[rows].to(workers.device))).float())
        done += len(rows)
        step(done)
    return workers.gather(torch.cat(parts), len(images))


@torch.no_grad()
def evaluate(
    model: TwoTowers,
    gallery: Gallery,
    pixels: Pixels,
    workers: Workers,
    step: Step = lambda _images: None,
) -> dict[str, float]:
    """Return the recalls of the model on a held-out split, in percent, the same on every worker.

    `step` is that of `embed_images`.
    """
    training = model.training
    model.eval()
    image = embed_images(model.embed_images, gallery.images, pixels, workers, step)
    text = [model.embed_text(part.to(workers.device)) for part in gallery.text.split(ENCODE_TEXTS)]
    model.train(training)
    subject = None if gallery.subject is None else gallery.subject.to(workers.device)
    return recalls(image, torch.cat(text), gallery.owner.to(workers.device), subject)

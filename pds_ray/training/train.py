"""Training of a retrieval model on a distilled set: two towers, symmetric InfoNCE (LoRS and PDS evaluation code).

Pictures go through a backbone and, if asked for, a residual head; text vectors through a residual head. Batches,
augmentation and dropout are functions of (seed, epoch or step, pair), never of the worker: several workers that share a
trial take slices of the same batches, gather the embeddings and compute the loss of the whole batch, so that the
gradient is that of one process. What a backbone draws itself (stochastic depth) is seeded by step and worker: a resumed
trial draws the same, several workers draw otherwise than one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name everybody knows

from pds_ray.config import ProtocolConfig
from pds_ray.training.recall import recalls

SCALE = 1 / 0.07
DROPOUT = 0.1
ENCODE_BATCH = 256
SHIFT, ZOOM = 0.08, 0.1
"""Augmentation: pictures move by up to this share of their side and are scaled by up to this share, edges repeated.
Nothing is mirrored, turned or recoloured: captions speak of sides and colours."""
STATE = "state.safetensors"


@dataclass(frozen=True)
class TrainingPairs:
    """A set as tensors: the pictures, or their features where the backbone is frozen, and the text vectors."""

    images: torch.Tensor
    """uint8 [B, 3, S, S], or float32 [B, f]."""
    text: torch.Tensor
    """float32 [B, t]."""


@dataclass(frozen=True)
class Gallery:
    """A held-out split: images (as in TrainingPairs), caption vectors float32 [m, t], and each caption's image [m]."""

    images: torch.Tensor
    text: torch.Tensor
    owner: torch.Tensor


class ResidualHead(nn.Module):
    """LayerNorm(a + Dropout(W2 GELU(a))) with a = W1 x: the projection of VL-Distill, LoRS and PDS."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.project = nn.Linear(width_in, width_out)
        self.inner = nn.Linear(width_out, width_out)
        self.norm = nn.LayerNorm(width_out)

    def forward(self, x: torch.Tensor, dropout: torch.Tensor | None) -> torch.Tensor:
        """[b, width_in] -> [b, width_out]; `dropout` is the scaled mask [b, width_out], None in evaluation."""
        a = self.project(x)
        b = self.inner(F.gelu(a))
        return self.norm(a + (b if dropout is None else b * dropout))


class TwoTowers(nn.Module):
    """Pictures (or features of a frozen backbone) and text vectors to unit embeddings of one width."""

    def __init__(
        self, backbone: nn.Module | None, features: int, text_width: int, image_head: bool
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.image_head = ResidualHead(features, features) if image_head else None
        self.text_head = ResidualHead(text_width, features)
        self.width = features

    def forward(
        self, images: torch.Tensor, text: torch.Tensor, dropout: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`dropout`: masks of the image and the text head, [b, 2, width]."""
        image_mask, text_mask = (None, None) if dropout is None else dropout.unbind(1)
        return self.embed_images(images, image_mask), self.embed_text(text, text_mask)

    def embed_images(
        self, images: torch.Tensor, dropout: torch.Tensor | None = None
    ) -> torch.Tensor:
        x = images if self.backbone is None else self.backbone(images)
        return F.normalize(x if self.image_head is None else self.image_head(x, dropout), dim=1)

    def embed_text(self, text: torch.Tensor, dropout: torch.Tensor | None = None) -> torch.Tensor:
        return F.normalize(self.text_head(text, dropout), dim=1)


def info_nce(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Symmetric InfoNCE of unit embeddings [b, d], with the fixed scale 1 / 0.07."""
    logits = SCALE * image @ text.T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@dataclass(frozen=True)
class Pixels:
    """From stored pictures to what a backbone takes."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [b, 3, S, S] -> float32, normalised. Features pass as they are."""
        if images.dtype != torch.uint8:
            return images
        shape = (1, 3, 1, 1)
        mean = torch.tensor(self.mean, device=images.device).view(shape)
        std = torch.tensor(self.std, device=images.device).view(shape)
        return (images.float() / 255 - mean) / std


def generator(*parts: object) -> torch.Generator:
    """A CPU generator seeded with a hash of the parts."""
    return torch.Generator().manual_seed(seed_of(*parts))


def seed_of(*parts: object) -> int:
    """A hash of the parts, below 2**63."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def batches(pairs: int, size: int, sampling: str, seed: int, epoch: int) -> list[torch.Tensor]:
    """The pairs of each step of an epoch.

    `epoch`: a permutation in ceil(pairs / size) even parts. `independent`: as many fresh permutations, each cut to
    `size`, as the published code draws them (methods of LoRS and PDS): some pairs repeat, some are missed.
    """
    count = math.ceil(pairs / size)
    if sampling == "independent":
        draw = generator(seed, "batches", epoch)
        return [torch.randperm(pairs, generator=draw)[:size] for _ in range(count)]
    order = torch.randperm(pairs, generator=generator(seed, "batches", epoch))
    return [torch.from_numpy(part) for part in np.array_split(order.numpy(), count)]


def dropout_masks(rows: int, width: int, draw: torch.Generator) -> torch.Tensor:
    """Scaled masks of both heads for a whole batch, [rows, 2, width]."""
    return (torch.rand(rows, 2, width, generator=draw) >= DROPOUT).float() / (1 - DROPOUT)


def augment(images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Moves and scales float pictures [b, 3, S, S] by `draws` in 0 to 1, [b, 3] (across, down, zoom)."""
    across, down, zoom = (2 * draws - 1).to(images.device).unbind(1)
    scale = 1 + ZOOM * zoom
    zero = torch.zeros_like(scale)
    rows = [
        torch.stack([scale, zero, 2 * SHIFT * across], 1),
        torch.stack([zero, scale, 2 * SHIFT * down], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def rate(protocol: ProtocolConfig, epoch: int, share: float) -> float:
    """Learning rate in an epoch of which `share` is done."""
    if protocol.schedule == "step":
        return protocol.learning_rate * (0.1 if epoch > protocol.epochs // 2 else 1.0)
    return (
        protocol.learning_rate * 0.5 * (1 + math.cos(math.pi * (epoch + share) / protocol.epochs))
    )


Said = TypeVar("Said")


@dataclass
class Workers:
    """The processes that share a trial; one of them, alone, without torch.distributed."""

    rank: int = 0
    count: int = 1

    def mine(self, batch: torch.Tensor) -> torch.Tensor:
        """This worker's slice of a batch, as long as every other's: the last rows are repeated where it is short."""
        share = math.ceil(len(batch) / self.count)
        place = torch.arange(self.rank * share, (self.rank + 1) * share).clamp(max=len(batch) - 1)
        return batch[place]

    def gather(self, rows: torch.Tensor, total: int) -> torch.Tensor:
        """All workers' rows in order, cut to `total`; gradients flow back to each."""
        if self.count == 1:
            return rows[:total]
        from torch.distributed.nn.functional import all_gather

        # None is the group of now; the default is the one there was when torch.distributed.nn was imported
        return torch.cat(all_gather(rows.contiguous(), group=None))[:total]

    def told(self, mine: Said) -> Said:
        """What the first worker says, of which each has its own."""
        if self.count == 1:
            return mine
        said = [mine]
        torch.distributed.broadcast_object_list(said, src=0)
        return said[0]


def make_optimizer(model: nn.Module, protocol: ProtocolConfig) -> torch.optim.Optimizer:
    """The optimiser of the protocol over all parameters that are trained."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if protocol.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=protocol.learning_rate,
            momentum=protocol.momentum,
            weight_decay=protocol.weight_decay,
        )
    return torch.optim.AdamW(
        parameters, lr=protocol.learning_rate, weight_decay=protocol.weight_decay
    )


@torch.no_grad()
def embed_images(
    model: Callable[[torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    pixels: Pixels,
    device: torch.device,
    workers: Workers,
) -> torch.Tensor:
    """`model` over all pictures, shared among the workers. -> float32 [n, d] on the device."""
    mine = workers.mine(torch.arange(len(images)))
    parts = [model(pixels(images[part].to(device))).float() for part in mine.split(ENCODE_BATCH)]
    return workers.gather(torch.cat(parts), len(images))


def judge(
    model: TwoTowers, gallery: Gallery, pixels: Pixels, device: torch.device, workers: Workers
) -> dict[str, float]:
    """Recalls of the model on a held-out split, in percent."""
    training = model.training
    model.eval()
    with torch.no_grad():
        image = embed_images(model.embed_images, gallery.images, pixels, device, workers)
        text = torch.cat(
            [model.embed_text(part.to(device)) for part in gallery.text.split(1 << 14)]
        )
        found = recalls(image, text, gallery.owner.to(device))
    model.train(training)
    return found


@dataclass
class Progress:
    """How far a trial is: epochs done, and the best epoch so far by the protocol's rule."""

    epochs_done: int = 0
    best: dict[str, Any] | None = None
    """epoch, score (r_mean that selects), recalls (on test)."""


def train(
    model: TwoTowers,
    pairs: TrainingPairs,
    val: Gallery | None,
    test: Gallery,
    pixels: Pixels,
    protocol: ProtocolConfig,
    seed: int,
    device: torch.device,
    workers: Workers | None = None,
    resume: Path | None = None,
    report: Callable[[Progress, Callable[[Path], None]], None] = lambda _progress, _save: None,
) -> dict[str, Any]:
    """Trains `model` and returns the chosen epoch: {"epoch", "score", "recalls"}.

    After each evaluation `report(progress, save)` is called on every worker; `save(folder)` writes what `resume` takes.
    Test recalls are measured only when an epoch is chosen, or, with select "test", at every evaluation.
    """
    workers = workers or Workers()
    model.to(device)
    wrapped: nn.Module = model
    if workers.count > 1:
        wrapped = nn.parallel.DistributedDataParallel(
            model, device_ids=[device] if device.type == "cuda" else None
        )
    optimizer = make_optimizer(model, protocol)
    progress = load_state(resume, model, optimizer) if resume else Progress()
    moving = protocol.augment and model.backbone is not None and pairs.images.dtype == torch.uint8
    count = len(pairs.text)

    def save(folder: Path) -> None:
        save_state(folder, model, optimizer, progress)

    for epoch in range(progress.epochs_done, protocol.epochs):
        wrapped.train()
        steps = batches(count, protocol.batch_size, protocol.sampling, seed, epoch)
        draws = (
            torch.rand(count, 3, generator=generator(seed, "augment", epoch)) if moving else None
        )
        for step, batch in enumerate(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate(protocol, epoch, step / len(steps))
            mine = workers.mine(batch)
            images = pixels(pairs.images[mine].to(device))
            if draws is not None:
                images = augment(images, draws[mine])
            torch.manual_seed(seed_of(seed, "backbone", epoch, step, workers.rank))
            masks = workers.mine(
                dropout_masks(len(batch), model.width, generator(seed, "dropout", epoch, step))
            )
            image, text = wrapped(images, pairs.text[mine].to(device), masks.to(device))
            loss = info_nce(workers.gather(image, len(batch)), workers.gather(text, len(batch)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        progress.epochs_done = epoch + 1
        last = epoch == protocol.epochs - 1
        if (epoch % protocol.evaluate_every == 0 and protocol.select != "last") or last:
            consider(progress, epoch, model, val, test, pixels, protocol, device, workers)
            report(progress, save)
    assert progress.best is not None
    return progress.best


def consider(
    progress: Progress,
    epoch: int,
    model: TwoTowers,
    val: Gallery | None,
    test: Gallery,
    pixels: Pixels,
    protocol: ProtocolConfig,
    device: torch.device,
    workers: Workers,
) -> None:
    """Judges an epoch by the protocol's rule and keeps it if it is the best so far; the earlier of equals stays."""
    found = None
    if protocol.select == "val":
        assert val is not None
        score = judge(model, val, pixels, device, workers)["r_mean"]
    else:
        found = judge(model, test, pixels, device, workers)
        score = found["r_mean"]
    if progress.best is None or score > progress.best["score"]:
        found = found or judge(model, test, pixels, device, workers)
        progress.best = {"epoch": epoch, "score": score, "recalls": found}


def save_state(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress
) -> None:
    """Weights, optimiser and progress as one safetensors file."""
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{key}/{name}"] = torch.as_tensor(value)
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(
        plain, folder / STATE, metadata={"progress": json.dumps(dataclasses.asdict(progress))}
    )


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """What `save_state` wrote, back into model and optimiser.

    One of another model or layout, as other versions leave them, counts for nothing.
    """
    parameters, weights = dict(model.named_parameters()), model.state_dict()
    with safe_open(folder / STATE, "pt") as file:
        shapes = {entry: tuple(file.get_slice(entry).get_shape()) for entry in file.keys()}  # noqa: SIM118 - no dictionary
        of_model = {
            name.removeprefix("model/"): shape
            for name, shape in shapes.items()
            if name.startswith("model/")
        }
        of_optimizer = [
            tuple(name.split("/", 2)[1:]) for name in shapes if name.startswith("optimizer/")
        ]
        try:
            progress = Progress(**json.loads(file.metadata()["progress"]))
        except (KeyError, TypeError, ValueError):
            return Progress()
        if of_model != {name: tuple(value.shape) for name, value in weights.items()}:
            return Progress()
        if not {name for _, name in of_optimizer} <= parameters.keys():
            return Progress()
        for name in of_model:
            weights[name] = file.get_tensor(f"model/{name}")
        for key, name in of_optimizer:
            value = file.get_tensor(f"optimizer/{key}/{name}")
            optimizer.state[parameters[name]][key] = (
                value if key == "step" else value.to(parameters[name].device)
            )
    model.load_state_dict(weights)
    return progress

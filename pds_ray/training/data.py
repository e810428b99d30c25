"""Training pairs and held-out galleries as tensors; sampling, normalisation and augmentation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812 - the name everybody knows

from pds_ray.training.loop import generator

IMAGE_DIMENSIONS = 4  # [B, 3, S, S]; features have two
SHIFT, ZOOM = 0.08, 0.1
"""Augmentation: images move by up to this share of their side and are scaled by up to this share,
edges repeated. Nothing is mirrored, turned or recoloured: captions speak of sides and colours.
"""


@dataclass(frozen=True)
class TrainingPairs:
    """B images, or their features where the backbone is frozen, and their text vectors."""

    images: torch.Tensor
    """uint8 [B, 3, S, S], float32 [B, 3, S, S] normalised already, or float32 [B, f]."""
    text: torch.Tensor
    """float32 [B, t], or [C, t] where images have several captions."""
    owner: torch.Tensor | None = None
    """int64 [C], ascending: the image of each caption; None where each image has one, in order."""
    similarity: torch.Tensor | None = None
    """Soft targets, float32 [B, B]: how much caption j is a target of image i."""

    @property
    def are_images(self) -> bool:
        """True if `images` are no features."""
        return self.images.dim() == IMAGE_DIMENSIONS


@dataclass(frozen=True)
class Gallery:
    """A held-out split of n images with m captions."""

    images: torch.Tensor
    """As in TrainingPairs."""
    text: torch.Tensor
    """float32 [m, t]."""
    owner: torch.Tensor
    """int64 [m]: the row of each caption's image."""
    subject: torch.Tensor | None = None
    """int64 [n]: numbers from 0 that images of one subject share; None where each has its own."""


@dataclass(frozen=True)
class Pixels:
    """The normalisation from stored images to the input of a backbone."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Normalise uint8 [b, 3, S, S] per channel to float32; what is float passes unchanged."""
        if images.dtype != torch.uint8:
            return images
        mean, std = self._constants(images)
        return (images.float() / 255 - mean) / std

    def of(self, images: torch.Tensor, other: Pixels) -> torch.Tensor:
        """Return images normalised by another rule as by this one, float32 [b, 3, S, S]."""
        if other == self:
            return images
        (mean, std), (its_mean, its_std) = self._constants(images), other._constants(images)
        return (images * its_std + its_mean - mean) / std

    def _constants(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and std on the device of images, each [1, 3, 1, 1]."""
        shape = (1, 3, 1, 1)
        mean = torch.tensor(self.mean, device=images.device).view(shape)
        return mean, torch.tensor(self.std, device=images.device).view(shape)


def batches(pairs: int, size: int, sampling: str, seed: int, epoch: int) -> list[torch.Tensor]:
    """Return the rows of the pairs in each step of an epoch, int64 [b] each.

    `epoch`: a permutation in ceil(pairs / size) even parts. `independent`: as many fresh
    permutations, each cut to `size`, as the published code draws them (docs/methods.md, Protocols):
    some pairs repeat, some are missed.
    """
    count = math.ceil(pairs / size)
    draw = generator(seed, "batches", epoch)
    if sampling == "independent":
        return [torch.randperm(pairs, generator=draw)[:size] for _ in range(count)]
    order = torch.randperm(pairs, generator=draw)
    return [torch.from_numpy(part) for part in np.array_split(order.numpy(), count)]


def caption_rows(pairs: TrainingPairs, rows: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Return a row of `pairs.text` for each of some images, int64 [b] -> int64 [b].

    It is one of the image's captions, each equally likely, drawn by `draw`.
    """
    if pairs.owner is None:
        return rows
    counts = pairs.owner.bincount(minlength=len(pairs.images))
    first = (counts.cumsum(0) - counts)[rows]
    drawn = (torch.rand(len(rows), generator=draw) * counts[rows]).long()
    return first + drawn.minimum(counts[rows] - 1)  # a product may be rounded up


def augment(images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Move and scale images, float32 [b, 3, S, S].

    `draws`, float32 [b, 3], are in 0 to 1: across, down, zoom.
    """
    across, down, zoom = (2 * draws - 1).to(images.device).unbind(1)
    scale = 1 + ZOOM * zoom
    zero = torch.zeros_like(scale)
    rows = [
        torch.stack([scale, zero, 2 * SHIFT * across], 1),
        torch.stack([zero, scale, 2 * SHIFT * down], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)

"""Losses that bring matching images and captions together."""

from __future__ import annotations

import torch
from torch.nn import functional as F  # noqa: N812 - the name everybody knows

SCALE = 1 / 0.07
"""The inverse temperature of the published evaluations (docs/methods.md, Model and loss)."""


def contrastive(logits: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of the matches, as a mean of both directions.

    logits float [n, m], m >= n: similarities of n images and m captions. Caption i belongs to image
    i; captions beyond the n-th are further negatives of every image and ask for none themselves.
    """
    target = torch.arange(len(logits), device=logits.device)
    of_images = F.cross_entropy(logits, target)
    of_captions = F.cross_entropy(logits.T[: len(logits)], target)
    return (of_images + of_captions) / 2


def soft_contrastive(logits: torch.Tensor, similarity: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy to soft targets, as a mean of both directions.

    logits float [n, n]; similarity float [n, n], not negative: its rows, scaled to a sum of 1, are
    the targets of the images, its columns those of the captions. With the identity it is
    `contrastive`.
    """
    of_images = F.cross_entropy(logits, similarity / similarity.sum(1, keepdim=True))
    of_captions = F.cross_entropy(logits.T, (similarity / similarity.sum(0)).T)
    return (of_images + of_captions) / 2


def info_nce(
    image: torch.Tensor,
    text: torch.Tensor,
    scale: float | torch.Tensor = SCALE,
    similarity: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the symmetric InfoNCE of unit embeddings, image [n, d] and text [m, d].

    With m > n as in `contrastive`; with `similarity` as in `soft_contrastive`.
    """
    logits = scale * image @ text.T
    return contrastive(logits) if similarity is None else soft_contrastive(logits, similarity)

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


def info_nce(
    image: torch.Tensor, text: torch.Tensor, scale: float | torch.Tensor = SCALE
) -> torch.Tensor:
    """Return the symmetric InfoNCE of unit embeddings, image [n, d] and text [m, d].

    With m > n as in `contrastive`.
    """
    return contrastive(scale * image @ text.T)

"""Losses that bring matching images and captions together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F  # noqa: N812 - the name everybody knows

SCALE = 1 / 0.07
"""The inverse temperature of the published evaluations (docs/methods.md, Model and loss)."""
GUARD = 1e-6
"""What LoRS adds to likelihoods and to counts, lest a logarithm or a mean be of nothing."""


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


def ence(
    image: torch.Tensor, text: torch.Tensor, similarity: torch.Tensor, scale: float = SCALE
) -> torch.Tensor:
    """Return the eNCE of LoRS (Xu et al., ICML 2024), of unit embeddings [n, d] each.

    similarity float [n, n] are the weights of the log-likelihoods, rows for images and columns for
    captions, as they are; any value is allowed. With the identity it is `info_nce`.
    """
    logits = scale * image @ text.T
    return (F.cross_entropy(logits, similarity) + F.cross_entropy(logits.T, similarity.T)) / 2


def wbce(
    image: torch.Tensor, text: torch.Tensor, similarity: torch.Tensor, scale: float = SCALE
) -> torch.Tensor:
    """Return the wBCE of LoRS (Xu et al., ICML 2024), of unit embeddings [n, d] each.

    It is the mean of two means of binary cross-entropies to similarity, float [n, n]: over the
    entries above 0.5, and over the others. Any value is allowed.
    """
    return _balanced(scale * image @ text.T, similarity, (similarity > 0.5).to(similarity))


def soft_wbce(
    image: torch.Tensor, text: torch.Tensor, similarity: torch.Tensor, scale: float = SCALE
) -> torch.Tensor:
    """Return `wbce` with weights s and 1 - s in place of a bound that an entry may jump over.

    The weights are those of similarity, float [n, n], cut to 0..1; the targets are not cut.
    """
    return _balanced(scale * image @ text.T, similarity, similarity.clamp(0, 1))


def _balanced(logits: torch.Tensor, targets: torch.Tensor, matching: torch.Tensor) -> torch.Tensor:
    """Return the mean of two weighted means of binary cross-entropies, all float [n, n].

    `matching` are the weights in the first mean; those in the second complete them to 1.
    """
    likely = logits.sigmoid()
    of_match = targets * (likely + GUARD).log()
    entropies = -(of_match + (1 - targets) * (1 - likely + GUARD).log())
    first, second = (
        (weights * entropies).sum() / (weights.sum() + GUARD)
        for weights in (matching, 1 - matching)
    )
    return (first + second) / 2


LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "info_nce": info_nce,
    "ence": ence,
    "wbce": wbce,
    "soft_wbce": soft_wbce,
}
"""Name -> loss of unit embeddings, image [n, d] and text [n, d], and their `similarity` [n, n]."""

"""Losses that bring matching images and captions together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F  # noqa: N812 - the name everybody knows

SCALE = 1 / 0.07
"""The inverse temperature of the published evaluations (docs/methods.md, Model and loss)."""
POSITIVE, TINY = 0.5, 1e-6
"""Constants of LoRS: an entry above the first is a positive; the second is added to divisors and
within logs."""


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


def ence(logits: torch.Tensor, similarity: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy to a learned similarity, as a mean of both directions.

    logits and similarity float [n, n]; LoRS calls it eNCE (ICML 2024). Unlike in
    `soft_contrastive` the targets are not scaled and may be negative. With the identity it is
    `contrastive`.
    """
    of_images = -(similarity * logits.log_softmax(1)).sum(1).mean()
    of_captions = -(similarity * logits.log_softmax(0)).sum(0).mean()
    return (of_images + of_captions) / 2


def wbce(logits: torch.Tensor, similarity: torch.Tensor) -> torch.Tensor:
    """Return the binary cross-entropy, positives and negatives weighted alike, as LoRS does.

    logits and similarity float [n, n]. A similarity above 0.5 is a positive: an entry that crosses
    0.5 jumps from one mean to the other. With the identity it is not `contrastive`.
    """
    return _weighted_bce(logits, similarity, (similarity > POSITIVE).to(logits))


def soft_wbce(logits: torch.Tensor, similarity: torch.Tensor) -> torch.Tensor:
    """Return `wbce` without its jump: an entry counts by its similarity, cut to 0 to 1."""
    return _weighted_bce(logits, similarity, similarity.clamp(0, 1))


def _weighted_bce(
    logits: torch.Tensor, similarity: torch.Tensor, positive: torch.Tensor
) -> torch.Tensor:
    """Return the mean of two means: over what is positive, and over the rest."""
    chance = logits.sigmoid()
    yes, no = (chance + TINY).log(), (1 - chance + TINY).log()
    entropy = -similarity * yes - (1 - similarity) * no
    parts = [(entropy * part).sum() / (part.sum() + TINY) for part in (positive, 1 - positive)]
    return (parts[0] + parts[1]) / 2


SOFT_LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "info_nce": lambda logits, _similarity: contrastive(logits),
    "ence": ence,
    "wbce": wbce,
    "soft_wbce": soft_wbce,
}
"""Name -> loss of logits [n, n] and a learned similarity [n, n]; info_nce takes no notice of it."""


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


def training_loss(name: str) -> Callable[..., torch.Tensor]:
    """Return a loss of SOFT_LOSSES as a function of unit embeddings, image and text [n, d] each.

    Their `similarity` [n, n] is its third argument; info_nce is the function of that name.
    """

    def loss(image: torch.Tensor, text: torch.Tensor, similarity: torch.Tensor) -> torch.Tensor:
        return SOFT_LOSSES[name](SCALE * image @ text.T, similarity)

    return info_nce if name == "info_nce" else loss

"""Image-text retrieval: recall at 1, 5 and 10 in both directions (methods of Karpathy and Fei-Fei, 2015).

TR@k: the share of images of which any caption is among the k captions nearest to the image. IR@k: the share of captions
whose image is among the k images nearest to the caption. In percent; r_mean is the mean of the six.
Ties: of equal scores the earlier item of the gallery ranks first, as a stable sort would have it. A score that is no
number (a model that diverged) ranks last. Scores are float32 products, which may tell equal rows apart in the last bit.
"""

from __future__ import annotations

import torch

CUTOFFS = (1, 5, 10)
RECALLS = tuple(f"{direction}@{k}" for direction in ("tr", "ir") for k in CUTOFFS)
BLOCK_ELEMENTS = 1 << 23  # scores of a block: 32 MiB, and a few times that while they are compared


def recalls(image: torch.Tensor, text: torch.Tensor, owner: torch.Tensor) -> dict[str, float]:
    """Recalls of unit embeddings. image float32 [n, d], text float32 [m, d], owner int64 [m] (which image).

    Exact for any number of captions an image, in blocks of bounded memory. Raises ValueError if an image has none.
    """
    if len(torch.unique(owner)) != len(image):
        raise ValueError("every image of a gallery needs a caption")
    ranks = {"tr": image_ranks(image, text, owner), "ir": caption_ranks(image, text, owner)}
    found = {
        f"{direction}@{k}": 100.0 * (rank < k).double().mean().item()
        for direction, rank in ranks.items()
        for k in CUTOFFS
    }
    return {**found, "r_mean": sum(found.values()) / len(found)}


def image_ranks(image: torch.Tensor, text: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    """Rank of the best caption of each image among all captions, from 0. int64 [n]."""
    ranks = []
    step = max(1, BLOCK_ELEMENTS // len(text))
    place = torch.arange(len(text), device=text.device)
    for start in range(0, len(image), step):
        scores = _scores(image[start : start + step], text)
        rows = torch.arange(start, start + len(scores), device=image.device)
        own = owner[None, :] == rows[:, None]
        best = scores.masked_fill(~own, -torch.inf).max(dim=1, keepdim=True).values
        first = torch.where(own & (scores == best), place, len(text)).min(dim=1, keepdim=True).values
        ranks.append((scores > best).sum(1) + ((scores == best) & (place < first)).sum(1))
    return torch.cat(ranks)


def caption_ranks(image: torch.Tensor, text: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    """Rank of each caption's image among all images, from 0. int64 [m]."""
    ranks = []
    step = max(1, BLOCK_ELEMENTS // len(image))
    place = torch.arange(len(image), device=image.device)
    for start in range(0, len(text), step):
        scores = _scores(text[start : start + step], image)
        mine = owner[start : start + step, None]
        own = scores.gather(1, mine)
        ranks.append((scores > own).sum(1) + ((scores == own) & (place < mine)).sum(1))
    return torch.cat(ranks)


def _scores(queries: torch.Tensor, gallery: torch.Tensor) -> torch.Tensor:
    return (queries @ gallery.T).nan_to_num_(nan=-torch.inf)

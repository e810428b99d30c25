"""Image-text retrieval: recall at 1, 5 and 10 in both directions (Karpathy and Fei-Fei, 2015).

TR@k: the share of images of which any caption is among the k captions nearest to the image. IR@k:
the share of captions whose image is among the k images nearest to the caption. Both are in percent;
r_mean is the mean of the six. Images may be said to show one subject: then a hit with any of them,
or with any caption of any of them, is right. Of equal scores the earlier item of the gallery ranks
first, as in a stable sort. A score that is not a number (of a model that diverged) ranks last.
Scores are float32 products, which may tell equal rows apart in the last bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import torch

CUTOFFS = (1, 5, 10)
RECALLS = tuple(f"{direction}@{k}" for direction in ("tr", "ir") for k in CUTOFFS)
BLOCK_ELEMENTS = 1 << 23  # scores of a block: 32 MiB, and a few times that while they are compared


def recalls(
    image: torch.Tensor,
    text: torch.Tensor,
    owner: torch.Tensor,
    subject: torch.Tensor | None = None,
) -> dict[str, float]:
    """Return the six recalls and r_mean of unit embeddings, in percent.

    image float32 [n, d], text float32 [m, d], owner int64 [m] (the row of each caption's image),
    subject int64 [n], numbers from 0 that images of one subject share (None: each its own). Exact
    for any number of captions per image, in blocks of bounded memory. Raises ValueError if an image
    has none.
    """
    if len(torch.unique(owner)) != len(image):
        raise ValueError("every image of a gallery needs a caption")
    if subject is None:
        subject = torch.arange(len(image), device=image.device)
    by_image: Iterable[torch.Tensor]
    by_caption: Iterable[torch.Tensor]
    if len(image) * len(text) <= BLOCK_ELEMENTS:  # one product serves both directions
        scores = _scores(image, text)
        by_image, by_caption = [scores], [scores.T]
    else:
        by_image, by_caption = _blocks(image, text), _blocks(text, image)
    of_captions = subject[owner]
    ranks = {
        "tr": _first_ranks(by_image, subject, of_captions),
        "ir": _first_ranks(by_caption, of_captions, subject),
    }
    found = {
        f"{direction}@{k}": 100.0 * (rank < k).double().mean().item()
        for direction, rank in ranks.items()
        for k in CUTOFFS
    }
    return {**found, "r_mean": sum(found.values()) / len(found)}


def _first_ranks(
    blocks: Iterable[torch.Tensor], wanted: torch.Tensor, subject: torch.Tensor
) -> torch.Tensor:
    """Return the rank, from 0, of the best item of each query's subject, int64 [q].

    `blocks` are the scores of the queries in order, float32 [b, g] each; `wanted` int64 [q] are the
    subjects of the queries, `subject` int64 [g] those of the gallery, each wanted one among them.
    """
    ranks: list[torch.Tensor] = []
    by_subject = subject.argsort(stable=True)  # the items of subject 0, of subject 1, ..., in order
    counts = subject.bincount()
    starts = counts.cumsum(0) - counts
    done = 0
    for scores in blocks:
        mine = wanted[done : done + len(scores)]
        begin, last = starts[mine, None], counts[mine, None] - 1
        # As wide as the most items of a subject here, so never wider than the scores; a subject
        # with fewer repeats its last one.
        places = torch.arange(int(last.max()) + 1, device=subject.device).minimum(last)
        items = by_subject[begin + places]
        own = scores.gather(1, items)
        best = own.max(dim=1, keepdim=True).values
        first = items.masked_fill(own < best, len(subject)).min(dim=1, keepdim=True).values
        ranks.append(_ranks(scores, best, first))
        done += len(scores)
    return torch.cat(ranks)


def _ranks(scores: torch.Tensor, best: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Count the items of the gallery that rank before the one at `place`, whose score is `best`.

    float32 [q, g], float32 [q, 1], int64 [q, 1] -> int64 [q].
    """
    count = partial(torch.sum, dim=1, dtype=torch.int32)  # several times as fast as with int64
    ranks = count(scores > best)
    # rows where others have the best score too: few, unless the model is poor
    tied = (count(scores >= best) > ranks + 1).nonzero().squeeze(1)
    earlier = torch.arange(scores.shape[1], device=scores.device) < place[tied]
    ranks[tied] += count((scores[tied] == best[tied]) & earlier)
    return ranks.long()


def _blocks(queries: torch.Tensor, gallery: torch.Tensor) -> Iterator[torch.Tensor]:
    step = max(1, BLOCK_ELEMENTS // len(gallery))
    for start in range(0, len(queries), step):
        yield _scores(queries[start : start + step], gallery)


def _scores(queries: torch.Tensor, gallery: torch.Tensor) -> torch.Tensor:
    return (queries @ gallery.T).nan_to_num_(nan=-torch.inf)

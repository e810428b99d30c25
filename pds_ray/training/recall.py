"""Image-text retrieval: recall at 1, 5 and 10 in both directions (Karpathy and Fei-Fei, 2015).

TR@k: the share of images of which any caption is among the k captions nearest to the image. IR@k:
the share of captions whose image is among the k images nearest to the caption. Both are in percent;
r_mean is the mean of the six. Of equal scores the earlier item of the gallery ranks first, as in a
stable sort. A score that is not a number (of a model that diverged) ranks last. Scores are float32
products, which may tell equal rows apart in the last bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import torch

CUTOFFS = (1, 5, 10)
RECALLS = tuple(f"{direction}@{k}" for direction in ("tr", "ir") for k in CUTOFFS)
BLOCK_ELEMENTS = 1 << 23  # scores of a block: 32 MiB, and a few times that while they are compared


def recalls(image: torch.Tensor, text: torch.Tensor, owner: torch.Tensor) -> dict[str, float]:
    """Return the six recalls and r_mean of unit embeddings, in percent.

    image float32 [n, d], text float32 [m, d], owner int64 [m] (the row of each caption's image).
    Exact for any number of captions per image, in blocks of bounded memory. Raises ValueError if
    an image has none.
    """
    if len(torch.unique(owner)) != len(image):
        raise ValueError("every image of a gallery needs a caption")
    by_image: Iterable[torch.Tensor]
    by_caption: Iterable[torch.Tensor]
    if len(image) * len(text) <= BLOCK_ELEMENTS:  # one product serves both directions
        scores = _scores(image, text)
        by_image, by_caption = [scores], [scores.T]
    else:
        by_image, by_caption = _blocks(image, text), _blocks(text, image)
    ranks = {"tr": _image_ranks(by_image, owner), "ir": _caption_ranks(by_caption, owner)}
    found = {
        f"{direction}@{k}": 100.0 * (rank < k).double().mean().item()
        for direction, rank in ranks.items()
        for k in CUTOFFS
    }
    return {**found, "r_mean": sum(found.values()) / len(found)}


def _image_ranks(blocks: Iterable[torch.Tensor], owner: torch.Tensor) -> torch.Tensor:
    """Return the rank of each image's best caption among all captions, from 0, int64 [n].

    `blocks` are the scores of the images in order, float32 [b, m] each.
    """
    ranks: list[torch.Tensor] = []
    by_image = owner.argsort(stable=True)  # the captions of image 0, of image 1, ..., in order
    counts = owner.bincount()
    starts = counts.cumsum(0) - counts
    done = 0
    for scores in blocks:
        block = slice(done, done + len(scores))
        begin, last = starts[block, None], counts[block, None] - 1
        # As wide as the most captions of an image here, so never wider than the scores; an image
        # with fewer repeats its last one.
        places = torch.arange(int(last.max()) + 1, device=owner.device).minimum(last)
        captions = by_image[begin + places]
        own = scores.gather(1, captions)
        best = own.max(dim=1, keepdim=True).values
        first = captions.masked_fill(own < best, len(owner)).min(dim=1, keepdim=True).values
        ranks.append(_ranks(scores, best, first))
        done += len(scores)
    return torch.cat(ranks)


def _caption_ranks(blocks: Iterable[torch.Tensor], owner: torch.Tensor) -> torch.Tensor:
    """Return the rank of each caption's image among all images, from 0, int64 [m].

    `blocks` are the scores of the captions in order, float32 [b, n] each.
    """
    ranks: list[torch.Tensor] = []
    done = 0
    for scores in blocks:
        mine = owner[done : done + len(scores), None]
        ranks.append(_ranks(scores, scores.gather(1, mine), mine))
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

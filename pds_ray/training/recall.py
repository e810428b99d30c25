"""Image-text retrieval: recall at 1, 5 and 10 in both directions (Karpathy and Fei-Fei, 2015).

TR@k: the share of images of which any caption is among the k captions nearest to the image. IR@k:
the share of captions whose image is among the k images nearest to the caption. Both are in percent;
r_mean is the mean of the six. Images may be said to show one subject: then a hit with any of them,
or with any caption of any of them, is right. Of equal scores the earlier item of the gallery ranks
first, as in a stable sort. A score that is not a number (of a model that diverged) ranks last.

A score is the exact product of two vectors. One float32 product of all images and all captions, in
blocks, serves both directions: its rounding error has a bound, and the few scores that lie nearer
than that to the score they are compared with are computed again in float64. Ranks depend on no
block, therefore, and equal rows are equally near.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

CUTOFFS = (1, 5, 10)
RECALLS = tuple(f"{direction}@{k}" for direction in ("tr", "ir") for k in CUTOFFS)
BLOCK_ELEMENTS = 1 << 23  # scores of a block: 32 MiB, and a few times that while they are compared
PARTS = 32  # of a block: pairs of rows are multiplied one by one while they are fewer than a part
LAST = torch.iinfo(torch.int64).max
FLOAT32_ROUNDING, FLOAT64_ROUNDING = 2.0**-24, 2.0**-53


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
    ranks = dict(zip(("tr", "ir"), _first_ranks(image, text, subject, subject[owner]), strict=True))
    found = {
        f"{direction}@{k}": 100.0 * (rank < k).double().mean().item()
        for direction, rank in ranks.items()
        for k in CUTOFFS
    }
    return {**found, "r_mean": sum(found.values()) / len(found)}


def _first_ranks(
    image: torch.Tensor, text: torch.Tensor, subject: torch.Tensor, of_captions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rank, from 0, of the best item of each query's subject.

    For all images, int64 [n], then for all captions, int64 [m].
    """
    by_image, by_caption = _Direction(image, text), _Direction(text, image)
    for images, captions in _pairs_of_a_subject(subject, of_captions):
        scores = _products(image, text, images, captions)
        by_image.take_in(images, captions, scores)
        by_caption.take_in(captions, images, scores)
    edge = math.isqrt(BLOCK_ELEMENTS)
    for above in range(0, len(image), edge):
        some_images = image[above : above + edge]
        for left in range(0, len(text), edge):
            some_captions = text[left : left + edge]
            with _whole_float32():
                scores = _numbers(some_images @ some_captions.T)
            near_image = by_image.count(scores, above)
            near_caption = by_caption.count(scores.T, left).T
            rows, columns = (near_image | near_caption).nonzero(as_tuple=True)
            images, captions = above + rows, left + columns
            others = subject[images] != of_captions[captions]  # what is own ranks before no own
            rows, columns, images, captions = (
                places[others] for places in (rows, columns, images, captions)
            )
            exact = _products(some_images, some_captions, rows, columns)
            near = near_image[rows, columns]
            by_image.settle(images[near], captions[near], exact[near])
            near = near_caption[rows, columns]
            by_caption.settle(captions[near], images[near], exact[near])
    return by_image.ranks, by_caption.ranks


class _Direction:
    """The queries of one direction, and how many items of the gallery rank before their own."""

    def __init__(self, queries: torch.Tensor, gallery: torch.Tensor) -> None:
        norm, largest = _norms(queries), _norms(gallery).max()
        # of sums in any order (Higham, 2002, section 3.1); the rest is for rounding of the bounds
        terms = 1.01 * (queries.shape[1] + 8) * norm * largest
        self.slack = FLOAT32_ROUNDING * terms
        """The most that a float32 product of each query can be off, float64 [q]."""
        self.tie = 4 * FLOAT64_ROUNDING * terms
        """The same for float64, several times: nearer scores are equal."""
        self.best = torch.full_like(self.slack, -torch.inf)
        """The highest score of the query's own items, float64 [q]."""
        self.first = torch.full_like(self.best, LAST, dtype=torch.int64)
        """The place of the first of its own items with that score."""
        self.ranks = torch.zeros_like(self.first)

    def take_in(self, queries: torch.Tensor, items: torch.Tensor, scores: torch.Tensor) -> None:
        """Take in the float64 scores of some own items."""
        so_far = self.best.clone()
        self.best.scatter_reduce_(0, queries, scores, "amax")
        self.first[self.best > so_far + self.tie] = LAST
        best = scores >= (self.best - self.tie)[queries]
        self.first.scatter_reduce_(0, queries[best], items[best], "amin")

    def count(self, scores: torch.Tensor, start: int) -> torch.Tensor:
        """Count the items that certainly rank before the own; return those too near to tell.

        float32 [b, g], scores of the queries from `start` on -> bool [b, g].
        """
        part = slice(start, start + len(scores))
        best, slack = self.best[part, None], self.slack[part, None]
        above = scores > (best + slack).float()
        self.ranks[part] += above.sum(dim=1, dtype=torch.int32)  # several times as fast as int64
        return (scores >= (best - slack).float()) ^ above

    def settle(self, queries: torch.Tensor, items: torch.Tensor, scores: torch.Tensor) -> None:
        """Count those of some items, with float64 scores, that rank before the own."""
        best, tie = self.best[queries], self.tie[queries]
        earlier = (scores >= best - tie) & (items < self.first[queries])
        self.ranks.index_add_(0, queries, ((scores > best + tie) | earlier).long())


@contextmanager
def _whole_float32() -> Iterator[None]:
    """Multiply float32 as such, though the program or its environment may ask for less, as TF32."""
    on_cpus: Any = torch.backends.mkldnn  # whose stubs have no matmul
    kinds = torch.backends.cuda.matmul, on_cpus.matmul
    before = [kind.fp32_precision for kind in kinds]
    for kind in kinds:
        kind.fp32_precision = "ieee"
    try:
        yield
    finally:
        for kind, precision in zip(kinds, before, strict=True):
            kind.fp32_precision = precision


def _norms(vectors: torch.Tensor) -> torch.Tensor:
    """Return float64 [q]; 0 where one is not finite: its products are not either, in any order."""
    norms = torch.linalg.vector_norm(vectors, dim=1).double()
    return norms.nan_to_num_(nan=0.0, posinf=0.0)


def _pairs_of_a_subject(
    subject: torch.Tensor, of_captions: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the places of all pairs of an image and a caption that share a subject, some at a time.

    int64 [p] of images, int64 [p] of captions.
    """
    by_subject = subject.argsort(stable=True)  # the images of subject 0, of subject 1, ...
    counts = subject.bincount()
    of_caption = counts[of_captions]
    ends = of_caption.cumsum(0)
    # from the number of a pair of each caption to the place of its image in `by_subject`
    offsets = (counts.cumsum(0) - counts)[of_captions] - (ends - of_caption)
    total, step = int(ends[-1]), max(1, BLOCK_ELEMENTS // PARTS)
    for start in range(0, total, step):
        pairs = torch.arange(start, min(start + step, total), device=ends.device)
        captions = torch.searchsorted(ends, pairs, right=True)
        yield by_subject[offsets[captions] + pairs], captions


def _products(
    image: torch.Tensor, text: torch.Tensor, images: torch.Tensor, captions: torch.Tensor
) -> torch.Tensor:
    """Return the products of some pairs of rows, float64 [p]."""
    if PARTS * len(images) > len(image) * len(text):
        return _numbers((image.double() @ text.double().T)[images, captions])
    step = max(1, BLOCK_ELEMENTS // PARTS // image.shape[1])
    parts = [
        (image[some].double() * text[others].double()).sum(dim=1)
        for some, others in zip(images.split(step), captions.split(step), strict=True)
    ]
    return _numbers(torch.cat(parts))


def _numbers(scores: torch.Tensor) -> torch.Tensor:
    """Replace what is not a number by the lowest score, in place."""
    return scores.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)

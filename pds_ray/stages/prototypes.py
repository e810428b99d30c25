"""Prototypes: the mean image and mean text vector of each couple's shared pairs, and what lies nearest to them.

methods.md A.1, steps 10 to 13. Means are plain means of raw vectors, summed in float64. A pairless couple that is kept
takes the means of its two clusters' kept pairs; without `match.filter` every couple does. Both passes are a map over
shards and a merge in shard order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from pds_ray.stages.cluster import normalized
from pds_ray.store.schemas import MEMBER_SAMPLE


@dataclass
class Sums:
    """Sums over the pairs of T couples: of all, or of those that a shard touches."""

    couple: np.ndarray
    """int64 [T]: which couples, ascending."""
    image: np.ndarray
    """float64 [T, d]."""
    text: np.ndarray
    """float64 [T, d]."""
    image_count: np.ndarray
    """int64 [T]: pairs summed on the image side."""
    text_count: np.ndarray
    """int64 [T]: pairs summed on the text side; equal to image_count unless the couple is whole."""
    image_norm: np.ndarray
    """float64 [T]: summed norms of the image vectors."""
    members: list[list[str]]
    """The first MEMBER_SAMPLE pairs of each couple, as shard/key."""


@dataclass(frozen=True)
class Couples:
    """The couples as arrays: int32 [C], int32 [C], bool [C]."""

    image_cluster: np.ndarray
    text_cluster: np.ndarray
    whole: np.ndarray
    """Whether its two whole clusters are averaged, not the pairs they share."""


def empty_sums(couple: np.ndarray, dim: int) -> Sums:
    """Nothing summed yet, for the couples given."""
    count = len(couple)
    counts = np.zeros(count, np.int64), np.zeros(count, np.int64)
    return Sums(
        couple,
        np.zeros((count, dim)),
        np.zeros((count, dim)),
        *counts,
        np.zeros(count),
        [[] for _ in couple],
    )


def shard_sums(
    shard: str,
    keys: list[str],
    image_vectors: np.ndarray,
    image_row: np.ndarray,
    text_vectors: np.ndarray,
    image_cluster: np.ndarray,
    text_cluster: np.ndarray,
    couples: Couples,
    clusters: int,
) -> Sums:
    """Sums of one shard.

    Its n images as float32 [n, d], its m pairs as keys [m], the row of each one's image, integers [m], text vectors,
    float32 [m, d], and labels, int32 [m] (-1 where pruned).
    """
    count = len(couples.image_cluster)
    of_image = np.full(clusters + 1, -1)  # one more slot: label -1 finds -1
    of_text = np.full(clusters + 1, -1)
    of_image[couples.image_cluster] = of_text[couples.text_cluster] = np.arange(count)
    image_couple, text_couple = of_image[image_cluster], of_text[text_cluster]
    whole = np.append(couples.whole, False)
    shared = (image_couple == text_couple) & (image_couple >= 0)
    on_image = np.flatnonzero(shared | whole[image_couple])
    on_text = np.flatnonzero(shared | whole[text_couple])

    touched = np.unique(np.concatenate([image_couple[on_image], text_couple[on_text]]))
    sums = empty_sums(touched, image_vectors.shape[1])
    image_group = np.searchsorted(touched, image_couple[on_image])
    text_group = np.searchsorted(touched, text_couple[on_text])
    used, row_of_used = np.unique(image_row[on_image], return_inverse=True)
    images = image_vectors[used].astype(np.float64)  # each once, however many captions it has
    sums.image += _summed(images, row_of_used, image_group, len(touched))
    sums.text += _summed(
        text_vectors[on_text].astype(np.float64), np.arange(len(on_text)), text_group, len(touched)
    )
    norms = np.linalg.norm(images, axis=1)[row_of_used]
    sums.image_norm += np.bincount(image_group, weights=norms, minlength=len(touched))
    sums.image_count += np.bincount(image_group, minlength=len(touched))
    sums.text_count += np.bincount(text_group, minlength=len(touched))
    for pair, row in zip(on_image, image_group, strict=True):
        if len(sums.members[row]) < MEMBER_SAMPLE:
            sums.members[row].append(f"{shard}/{keys[pair]}")
    return sums


def _summed(vectors: np.ndarray, rows: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
    """Sums of those of the vectors, float64 [n, d], that are of a group, one after the other -> float64 [groups, d].

    `rows[i]` is of `group[i]`, integers [m]. A sparse product, which has neither threads nor sums of parts: the bits
    are those of `np.add.at`, which is slow.
    """
    starts = np.concatenate([[0], np.cumsum(np.bincount(group, minlength=groups))])
    in_order = rows[np.argsort(group, kind="stable")]
    return (
        sp.csr_array((np.ones(len(rows)), in_order, starts), shape=(groups, len(vectors))) @ vectors
    )


def add_sums(total: Sums, part: Sums) -> None:
    """Adds a shard's sums to those of all couples; called in shard order, so that rounding never differs."""
    rows = part.couple
    total.image[rows] += part.image
    total.text[rows] += part.text
    total.image_count[rows] += part.image_count
    total.text_count[rows] += part.text_count
    total.image_norm[rows] += part.image_norm
    for row, theirs in zip(rows, part.members, strict=True):
        mine = total.members[row]
        mine.extend(theirs[: MEMBER_SAMPLE - len(mine)])


@dataclass(frozen=True)
class Prototypes:
    """B prototypes in the order of falling cosine, each with the couple it comes from."""

    image: np.ndarray
    """float32 [B, d]."""
    text: np.ndarray
    """float32 [B, d]."""
    cosine: np.ndarray
    """float64 [B], between the two."""
    couple: np.ndarray
    """int64 [B], index of the couple."""


def means(sums: Sums) -> Prototypes:
    """Sums -> prototypes. Couples without any vector on one side (two empty clusters matched) are left out."""
    alive = np.flatnonzero((sums.image_count > 0) & (sums.text_count > 0))
    image = sums.image[alive] / sums.image_count[alive, None]
    text = sums.text[alive] / sums.text_count[alive, None]
    norms = np.linalg.norm(image, axis=1) * np.linalg.norm(text, axis=1)
    cosine = np.einsum("bd,bd->b", image, text) / np.where(norms > 0, norms, 1)
    order = np.lexsort((alive, -cosine))
    vectors = image[order].astype(np.float32), text[order].astype(np.float32)
    return Prototypes(*vectors, cosine[order], sums.couple[alive[order]])


QUERIES_AT_ONCE, ROWS_AT_ONCE = (
    2_048,
    16_384,
)  # their cosines are 128 MiB, however many there are of both


@dataclass
class Nearest:
    """For each of B queries the best row so far."""

    cosine: np.ndarray
    """float32 [B], -inf before anything was seen."""
    shard: np.ndarray
    """int32 [B], the number of the row's shard; -1 for none."""
    row: np.ndarray
    """int32 [B], its place in the shard; -1 for none."""


def no_nearest(queries: int) -> Nearest:
    """The neutral element of `merge_nearest`."""
    nowhere = np.full(queries, -1, np.int32)
    return Nearest(np.full(queries, -np.inf, np.float32), nowhere, nowhere.copy())


def nearest_rows(
    queries: np.ndarray, rows: np.ndarray, block: tuple[int, int] = (QUERIES_AT_ONCE, ROWS_AT_ONCE)
) -> tuple[np.ndarray, np.ndarray]:
    """The row of highest cosine for each query, the first of equals. float32 [B, d], [n, d] -> float32 [B], int32 [B].

    Exact, in blocks of queries and rows; -inf and -1 where there are no rows.
    """
    some_queries, some_rows = block
    unit = normalized(queries)
    best = np.full(len(queries), -np.inf, np.float32)
    where = np.full(len(queries), -1, np.int32)
    for start in range(0, len(rows), some_rows):
        some = rows[start : start + some_rows]
        norms = np.sqrt(np.einsum("nd,nd->n", some, some))
        norms[norms == 0] = 1
        for first in range(0, len(queries), some_queries):
            mine = slice(first, first + some_queries)
            similarity = unit[mine] @ some.T
            similarity /= norms  # cheaper than to bring the rows to unit length
            top = similarity.argmax(axis=1)
            value = similarity[np.arange(len(top)), top]
            better = value > best[mine]
            best[mine][better], where[mine][better] = value[better], top[better] + start
    return best, where


def merge_nearest(total: Nearest, part: Nearest) -> None:
    """Keeps the better of both; the earlier shard wins a tie. Called in shard order."""
    better = part.cosine > total.cosine
    for mine, theirs in (
        (total.cosine, part.cosine),
        (total.shard, part.shard),
        (total.row, part.row),
    ):
        mine[better] = theirs[better]


def by_shard(nearest: Nearest) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """The shards that hold a nearest row of any query: their number, those queries and their rows in it."""
    order = np.argsort(nearest.shard, kind="stable")
    numbers, starts = np.unique(nearest.shard[order], return_index=True)
    parts = np.split(order, starts[1:])
    return [
        (int(number), mine, nearest.row[mine]) for number, mine in zip(numbers, parts, strict=False)
    ]

"""Prototypes: mean image and mean text vector of each match's shared pairs, and their nearest rows.

    p_i = mean of v_n,  q_i = mean of t_n   over kept pairs n with a(n) = i and b(n) = sigma(i)

(docs/methods.md, "prototypes"). Means are plain means of raw vectors, summed in float64. An empty
match that is kept takes the means of its two clusters' kept pairs; without `match.filter` every
match does. Both passes are a map over shards and a merge: of sums in any grouping, with the same
bytes, of nearest rows in shard order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np
import scipy.sparse as sp

from pds_ray.stages.vectors import normalized, summable
from pds_ray.store.schemas import MEMBER_SAMPLE
from pds_ray.telemetry import log

SUM_BITS = 28
"""The sums of a shard are rounded to multiples of 2^-28, which changes no sum of float16.

So they are added up without rounding, the same in any grouping, while none is beyond 2^25.
"""


@dataclass
class Sums:
    """Sums over the pairs of T matches: of all matches, or of those that a shard touches."""

    match: np.ndarray
    """int64 [T]: numbers of the matches, ascending."""
    image: np.ndarray
    """float64 [T, d]."""
    text: np.ndarray
    """float64 [T, d]."""
    image_count: np.ndarray
    """int64 [T]: pairs summed on the image side."""
    text_count: np.ndarray
    """int64 [T]: pairs summed on the text side; equal to image_count unless the match is whole."""
    image_norm: np.ndarray
    """float64 [T]: summed norms of the image vectors."""
    members: list[list[str]]
    """The first MEMBER_SAMPLE pairs of each match, as shard/key."""

    def split(self, bounds: Sequence[int]) -> list[Sums]:
        """Return the sums of the matches between each two bounds, which ascend."""
        rows = np.searchsorted(self.match, bounds)
        return [
            Sums(*(getattr(self, each.name)[start:end] for each in fields(self)))
            for start, end in pairwise(rows)
        ]


@dataclass(frozen=True)
class Members:
    """Facts on the pairs of T matches, those that have any."""

    match: np.ndarray
    """int64 [T]: numbers of the matches, ascending."""
    norm: np.ndarray
    """float64 [T]: mean norm of the image vectors; 0 without any."""
    names: list[list[str]]
    """The first MEMBER_SAMPLE pairs of each match, as shard/key."""

    def of(self, match: np.ndarray) -> Members:
        """Return those of some of the matches, in their order: integers [m]."""
        rows = np.searchsorted(self.match, match)
        return Members(match, self.norm[rows], [self.names[row] for row in rows])


@dataclass(frozen=True)
class Matches:
    """The matched clusters as arrays: int32 [C], int32 [C], bool [C]."""

    image_cluster: np.ndarray
    text_cluster: np.ndarray
    whole: np.ndarray
    """True where the two whole clusters are averaged, not the pairs they share."""


def empty_sums(match: np.ndarray, dim: int) -> Sums:
    """Return zero sums for matches of these numbers, int64 [T]."""
    count = len(match)
    return Sums(
        match=match,
        image=np.zeros((count, dim)),
        text=np.zeros((count, dim)),
        image_count=np.zeros(count, np.int64),
        text_count=np.zeros(count, np.int64),
        image_norm=np.zeros(count),
        members=[[] for _ in match],
    )


@dataclass(frozen=True)
class ShardPairs:
    """The m pairs of one shard and its n images."""

    shard: str
    keys: list[str]
    """Keys of the pairs [m]."""
    image_vectors: np.ndarray
    """float32 [n, d]."""
    image_row: np.ndarray
    """Integers [m]: the row of each pair's image."""
    text_vectors: np.ndarray
    """float32 [m, d]."""
    image_cluster: np.ndarray
    """int32 [m]: labels, -1 where pruned."""
    text_cluster: np.ndarray
    """int32 [m]: labels, -1 where pruned."""


def shard_sums(pairs: ShardPairs, matches: Matches, clusters: int) -> Sums:
    """Sum over the pairs of one shard; `clusters` is the K of each k-means."""
    image_match, text_match = _matches_of(pairs, matches, clusters)
    whole = np.append(matches.whole, False)
    shared = (image_match == text_match) & (image_match >= 0)
    on_image = np.flatnonzero(shared | whole[image_match])
    on_text = np.flatnonzero(shared | whole[text_match])

    touched = np.unique(np.concatenate([image_match[on_image], text_match[on_text]]))
    sums = empty_sums(touched, pairs.image_vectors.shape[1])
    image_group = np.searchsorted(touched, image_match[on_image])
    text_group = np.searchsorted(touched, text_match[on_text])
    used, row_of_used = np.unique(pairs.image_row[on_image], return_inverse=True)
    images = pairs.image_vectors[used].astype(np.float64)  # each once, however many captions it has
    sums.image += _summed(images, row_of_used, image_group, len(touched))
    texts = pairs.text_vectors[on_text].astype(np.float64)
    sums.text += _summed(texts, np.arange(len(texts)), text_group, len(touched))
    norms = np.linalg.norm(images, axis=1)[row_of_used]
    sums.image_norm += np.bincount(image_group, weights=norms, minlength=len(touched))
    sums.image_count += np.bincount(image_group, minlength=len(touched))
    sums.text_count += np.bincount(text_group, minlength=len(touched))
    for name in ("image", "text", "image_norm"):
        setattr(sums, name, summable(getattr(sums, name), SUM_BITS))
    for pair, row in zip(on_image, image_group, strict=True):
        if len(sums.members[row]) < MEMBER_SAMPLE:
            sums.members[row].append(f"{pairs.shard}/{pairs.keys[pair]}")
    return sums


def _matches_of(
    pairs: ShardPairs, matches: Matches, clusters: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the match of each pair's image cluster and of its text cluster, -1 for none. [m]."""
    of_image = np.full(clusters + 1, -1)  # one more slot: label -1 finds -1
    of_text = np.full(clusters + 1, -1)
    of_image[matches.image_cluster] = of_text[matches.text_cluster] = np.arange(
        len(matches.image_cluster)
    )
    return of_image[pairs.image_cluster], of_text[pairs.text_cluster]


def _summed(vectors: np.ndarray, rows: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
    """Sum the vectors, float64 [n, d], of each group in their order. float64 [groups, d].

    `rows[i]` is of `group[i]`, integers [m]. A sparse product, which has neither threads nor sums
    of parts: the bits are those of `np.add.at`, which is slow.
    """
    starts = np.concatenate([[0], np.cumsum(np.bincount(group, minlength=groups))])
    in_order = rows[np.argsort(group, kind="stable")]
    members = sp.csr_array((np.ones(len(rows)), in_order, starts), shape=(groups, len(vectors)))
    return members @ vectors


def add_sums(total: Sums, part: Sums) -> None:
    """Add the sums of some shards to those of matches that theirs are among.

    Called in shard order, for the members.
    """
    rows = np.searchsorted(total.match, part.match)
    total.image[rows] += part.image
    total.text[rows] += part.text
    total.image_count[rows] += part.image_count
    total.text_count[rows] += part.text_count
    total.image_norm[rows] += part.image_norm
    for row, theirs in zip(rows, part.members, strict=True):
        mine = total.members[row]
        mine.extend(theirs[: MEMBER_SAMPLE - len(mine)])


def touched(sums: Sums) -> Sums:
    """Return the sums of those matches that have any pair."""
    rows = np.flatnonzero(sums.image_count + sums.text_count)
    return Sums(
        sums.match[rows],
        sums.image[rows],
        sums.text[rows],
        sums.image_count[rows],
        sums.text_count[rows],
        sums.image_norm[rows],
        [sums.members[row] for row in rows],
    )


def added_sums(*parts: Sums) -> Sums:
    """Return the sums of neighbouring groups of shards, in their order."""
    match = np.unique(np.concatenate([part.match for part in parts]))
    total = empty_sums(match, parts[0].image.shape[1])
    for part in parts:
        add_sums(total, part)
    return total


@dataclass(frozen=True)
class Prototypes:
    """B prototypes in the order of falling cosine, each with the match it comes from."""

    image: np.ndarray
    """float32 [B, d]."""
    text: np.ndarray
    """float32 [B, d]."""
    cosine: np.ndarray
    """float64 [B], between the two."""
    match: np.ndarray
    """int64 [B], number of the match."""


def means(sums: Sums) -> Prototypes:
    """Turn sums into prototypes; leave out matches without any vector on one side.

    Those are matches of an empty cluster. Of equal cosines the lower match comes first.
    """
    alive = np.flatnonzero((sums.image_count > 0) & (sums.text_count > 0))
    image = sums.image[alive] / sums.image_count[alive, None]
    text = sums.text[alive] / sums.text_count[alive, None]
    return _in_order(image, text, sums.match[alive])


def merged(parts: Sequence[Prototypes]) -> Prototypes:
    """Join the prototypes of several ranges of matches, in their order."""
    cosine, match = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("cosine", "match")
    )
    order = np.lexsort((match, -cosine))
    # the one copy of the vectors
    image, text = np.empty((2, len(order), parts[0].image.shape[1]), np.float32)
    places = np.split(np.argsort(order), np.cumsum([len(part.match) for part in parts[:-1]]))
    for place, part in zip(places, parts, strict=True):
        image[place], text[place] = part.image, part.text
    return Prototypes(image, text, cosine[order], match[order])


def members(sums: Sums) -> Members:
    """Return the facts on the summed pairs that go with prototypes."""
    return Members(sums.match, sums.image_norm / np.maximum(sums.image_count, 1), sums.members)


def joined_members(parts: Sequence[Members]) -> Members:
    """Join the facts on several ranges of matches, which are in order."""
    match, norm = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("match", "norm")
    )
    return Members(match, norm, [own for part in parts for own in part.names])


def _in_order(image: np.ndarray, text: np.ndarray, match: np.ndarray) -> Prototypes:
    """Return vectors, float [B, d], of matches, ascending, as prototypes in their order."""
    norms = np.linalg.norm(image, axis=1) * np.linalg.norm(text, axis=1)
    cosine = np.einsum("bd,bd->b", image, text) / np.where(norms > 0, norms, 1)
    order = np.lexsort((match, -cosine))
    vectors = image[order].astype(np.float32), text[order].astype(np.float32)
    return Prototypes(*vectors, cosine[order], match[order])


@dataclass
class Medoids:
    """The real pair of each of T matches that is nearest to its two means, as far as it was seen.

    Nearest is the pair of the highest sum of both cosines.
    """

    match: np.ndarray
    """int64 [T]: numbers of the matches, ascending."""
    score: np.ndarray
    """float64 [T], the sum of the cosines; -inf before any pair was seen."""
    image: np.ndarray
    """float32 [T, d]."""
    text: np.ndarray
    """float32 [T, d]."""

    def taken(self, rows: np.ndarray) -> Medoids:
        """Return those of some rows: integers [m], or bool [T]."""
        return Medoids(self.match[rows], self.score[rows], self.image[rows], self.text[rows])


def no_medoids(matches: int, dim: int) -> Medoids:
    """Return the neutral element of `merge_medoids`, for all matches."""
    image, text = np.zeros((2, matches, dim), np.float32)
    return Medoids(np.arange(matches), np.full(matches, -np.inf), image, text)


def shard_medoids(
    pairs: ShardPairs, matches: Matches, clusters: int, centers: Prototypes
) -> Medoids:
    """Find the medoids among the pairs of one shard; of equals the first pair.

    Candidates are the shared pairs; of a match that is averaged whole, the pairs of both clusters.
    Matches without any are left out.
    """
    image_match, text_match = _matches_of(pairs, matches, clusters)
    whole = np.append(matches.whole, False)
    shared = np.flatnonzero((image_match == text_match) & (image_match >= 0))
    on_image, on_text = np.flatnonzero(whole[image_match]), np.flatnonzero(whole[text_match])
    pair = np.concatenate([shared, on_image, on_text])
    match = np.concatenate([image_match[shared], image_match[on_image], text_match[on_text]])
    center = np.full(len(matches.image_cluster), -1)
    center[centers.match] = np.arange(len(centers.match))
    alive = center[match] >= 0
    pair, match = pair[alive], match[alive]
    image, text = pairs.image_vectors[pairs.image_row[pair]], pairs.text_vectors[pair]
    score = sum(
        np.einsum("md,md->m", normalized(own.astype(np.float64)), normalized(means[center[match]]))
        for own, means in ((image, centers.image), (text, centers.text))
    )
    order = np.lexsort((pair, -score, match))
    matched, first = np.unique(match[order], return_index=True)
    best = order[first]
    return Medoids(matched, score[best], image[best], text[best])


def best_medoids(parts: Sequence[Medoids], at_least: np.ndarray) -> Medoids:
    """Return the best of some shards, in order, that are above the scores so far, float64 [C].

    The earlier shard wins a tie.
    """
    both = Medoids(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("match", "score", "image", "text")
        )
    )
    order = np.lexsort((-both.score, both.match))  # stable: of equals the earlier shard comes first
    best = both.taken(order[np.unique(both.match[order], return_index=True)[1]])
    return best.taken(best.score > at_least[best.match])


def merge_medoids(total: Medoids, part: Medoids) -> None:
    """Keep the better of both; called in shard order, the earlier shard wins a tie.

    `total` is of all matches.
    """
    part = part.taken(part.score > total.score[part.match])
    for name in ("score", "image", "text"):
        getattr(total, name)[part.match] = getattr(part, name)


def of_medoids(medoids: Medoids, centers: Prototypes) -> Prototypes:
    """Return the medoids as prototypes, in the order of their own cosines."""
    match = np.sort(centers.match)
    image, text = medoids.image[match], medoids.text[match]
    return _in_order(image.astype(np.float64), text.astype(np.float64), match)


@dataclass
class Nearest:
    """The best row so far for each of B queries."""

    cosine: np.ndarray
    """float32 [B], -inf before anything was seen."""
    shard: np.ndarray
    """int32 [B], the number of the row's shard; -1 for none."""
    row: np.ndarray
    """int32 [B], its place in the shard; -1 for none."""


def no_nearest(queries: int) -> Nearest:
    """Return the neutral element of `merge_nearest`."""
    nowhere = np.full(queries, -1, np.int32)
    return Nearest(np.full(queries, -np.inf, np.float32), nowhere, nowhere.copy())


def merge_nearest(total: Nearest, part: Nearest) -> None:
    """Keep the better of both; called in shard order, the earlier shard wins a tie."""
    better = part.cosine > total.cosine
    for name in ("cosine", "shard", "row"):
        getattr(total, name)[better] = getattr(part, name)[better]


@dataclass
class Improved:
    """Rows that are better than the best so far of m of the B queries."""

    query: np.ndarray
    """int32 [m], ascending."""
    cosine: np.ndarray
    """float32 [m]."""
    shard: np.ndarray
    """int32 [m]."""
    row: np.ndarray
    """int32 [m]."""


def improved(nearest: Nearest) -> Improved:
    """Return the queries for which any row was found: what a shard has to say, and no more."""
    query = np.flatnonzero(nearest.shard >= 0).astype(np.int32)
    return Improved(query, nearest.cosine[query], nearest.shard[query], nearest.row[query])


def merge_improved(total: Nearest, part: Improved) -> None:
    """Keep the better of both; called in shard order, the earlier shard wins a tie."""
    better = part.cosine > total.cosine[part.query]
    query = part.query[better]
    for name in ("cosine", "shard", "row"):
        getattr(total, name)[query] = getattr(part, name)[better]


def by_shard(nearest: Nearest) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Return the shards that hold a nearest row: number, the queries it serves and their rows."""
    order = np.argsort(nearest.shard, kind="stable")
    numbers, starts = np.unique(nearest.shard[order], return_index=True)
    parts = np.split(order, starts[1:])
    return [
        (int(number), mine, nearest.row[mine]) for number, mine in zip(numbers, parts, strict=False)
    ]


def why_fewer(cluster: Mapping[str, Any], match: Mapping[str, Any], empty: int) -> str:
    """Return why there are fewer prototypes than clusters.

    `cluster` and `match` are the counts of these stages, `empty` the matches that average nothing.
    """
    why = []
    if dropped := match["clusters"] - match["couples"]:
        why.append(f"{dropped:,} matches share no pair and were dropped")
    if empty:
        why.append(f"{empty:,} matches have an empty cluster")
    names = {"image": "images", "text": "captions", "joint": "pairs"}
    few = [
        f"{counts['distinct']:,} different {names[space]}"
        for space, counts in cluster.items()
        if "distinct" in counts
    ]
    return "; ".join(why) + (f": the data hold only {' and '.join(few)}" if few else "")


def fewer(asked: int, found: int, why: str) -> dict[str, str]:
    """Return a count that says why a stage finds fewer pairs than asked for; warn of it.

    Empty if there are as many.
    """
    if found >= asked:
        return {}
    text = f"{found:,} of the {asked:,} pairs asked for: {why}"
    log.event("fewer_pairs", f"pds-ray: {text}", "warning", asked=asked, found=found)
    return {"fewer": text}

"""Parts of a set besides one caption per image: further captions, and soft targets.

docs/methods.md, "extras" has the formulas.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pds_ray.stages.match import Table
from pds_ray.stages.vectors import normalized
from pds_ray.store.learned import Learned

BLOCK_ROWS = 1024  # rows of cosines in float64 at a time


@dataclass(frozen=True)
class Extras:
    """The extra parts of a set of B pairs; None for one that it does not have."""

    captions: list[list[str]] | None = None
    """Further captions of each pair, without its own."""
    similarity: np.ndarray | None = None
    """float32 [B, B]: how much caption j is a target of image i."""
    learned: tuple[Learned, np.ndarray] | None = None
    """Learned parts, and their images, float32 [B, 3, S, S]."""
    learned_captions: pa.Table | None = None
    """Rows of LEARNED_CAPTION_SCHEMA."""

    def first(self, pairs: int) -> Extras:
        """Return the parts of the first pairs alone."""
        captions, similarity, learned = self.captions, self.similarity, self.learned
        return Extras(
            None if captions is None else captions[:pairs],
            None if similarity is None else np.ascontiguousarray(similarity[:pairs, :pairs]),
            None if learned is None else (learned[0].first(pairs), learned[1][:pairs]),
            None if self.learned_captions is None else self.learned_captions[:pairs],
        )


def clip_similarity(
    image: np.ndarray, text: np.ndarray, temperature: float, share: float
) -> np.ndarray:
    """Return soft targets by cosine: a softmax over the captions, blended with the own caption.

    `image` and `text`, float32 [B, d], are the two embeddings of each pair -> float32 [B, B].
    """
    found = np.empty((len(image), len(text)), np.float32)
    images, texts = normalized(image).astype(np.float64), normalized(text).astype(np.float64)
    for start in range(0, len(image), BLOCK_ROWS):
        logits = images[start : start + BLOCK_ROWS] @ texts.T / temperature
        likely = np.exp(logits - logits.max(axis=1, keepdims=True))
        found[start : start + BLOCK_ROWS] = likely / likely.sum(axis=1, keepdims=True)
    return _blended(found, share)


def table_similarity(
    table: Table, image_cluster: np.ndarray, text_cluster: np.ndarray, share: float
) -> np.ndarray:
    """Return soft targets by the pairs that clusters share, blended with the own caption.

    int [B] are the clusters of each pair, all different -> float32 [B, B]. An image cluster that
    shares nothing with any chosen text cluster has its own caption alone.
    """
    found = np.zeros((len(image_cluster), len(text_cluster)), np.float32)
    rows, columns = np.full((2, table.clusters), -1)
    rows[image_cluster] = np.arange(len(image_cluster))
    columns[text_cluster] = np.arange(len(text_cluster))
    for cells, counts in table.parts:
        row, column = rows[cells // table.clusters], columns[cells % table.clusters]
        chosen = (row >= 0) & (column >= 0)
        row, column, shared = row[chosen], column[chosen], counts[chosen]
        of_row = np.bincount(row, weights=shared, minlength=len(found))
        found[row, column] = shared / of_row[row]
    found[(alone := np.flatnonzero(~found.any(axis=1))), alone] = 1
    return _blended(found, share)


def _blended(likely: np.ndarray, share: float) -> np.ndarray:
    """Return float32 [B, B] with `share` of each row as it is, the rest on the own caption."""
    found = (share * likely.astype(np.float64)).astype(np.float32)
    found[np.diag_indices(len(found))] += np.float32(1 - share)
    return found


Found = list[tuple[int, float, str]]
"""Captions that were found: the pair, the cosine by which they are ordered, the text."""


def image_captions(
    captions: pa.Table, keys: dict[str, list[int]], kept: np.ndarray | None
) -> Found:
    """Return the captions of a shard that belong to the images of some pairs.

    `captions` has key, caption and similarity; `keys` the pairs of each wanted key; `kept`, bool,
    leaves out what was pruned.
    """
    wanted = np.isin(captions.column("key").to_numpy(zero_copy_only=False), list(keys))
    rows = np.flatnonzero(wanted if kept is None else wanted & kept)
    found = captions.take(rows).to_pylist()
    return [(pair, row["similarity"], row["caption"]) for row in found for pair in keys[row["key"]]]


def member_captions(
    captions: pa.Table,
    vectors: np.ndarray,
    cell: np.ndarray,
    cells: np.ndarray,
    text: np.ndarray,
    limit: int,
) -> Found:
    """Return of a shard the captions in each pair's cell that are nearest to its text prototype.

    `captions` has caption, `vectors` float32 [n, d] are their embeddings and int64 [n] their cells;
    int64 [B] are the cells of the pairs and `text`, float32 [B, d], their text prototypes. Not more
    than `limit` different ones per pair.
    """
    order = np.argsort(cells, kind="stable")
    place = np.minimum(np.searchsorted(cells[order], cell), len(cells) - 1)
    rows = np.flatnonzero(cells[order][place] == cell)
    pairs = order[place[rows]]
    cosine = np.einsum("ij,ij->i", normalized(vectors[rows]), normalized(text[pairs]))
    texts = captions.column("caption").take(pa.array(rows)).to_pylist()
    found = [(int(p), float(c), t) for p, c, t in zip(pairs, cosine, texts, strict=True)]
    return [
        (pair, cosine, caption)
        for pair, best in _best(found, limit).items()
        for cosine, caption in best
    ]


def further_captions(found: Iterable[Found], own: list[str], limit: int) -> list[list[str]]:
    """Return at most `limit` captions of each of B pairs, none its own and none twice.

    They are in the order of falling cosine; of equals the first found comes first. Of the parts
    that were `found`, one is held at a time, and `limit` + 1 captions of each pair.
    """
    best: dict[int, list[tuple[float, str]]] = {}
    for part in found:
        pairs = {pair for pair, _, _ in part}
        before = [(pair, *entry) for pair in pairs for entry in best.get(pair, [])]
        best |= _best(before + part, limit + 1)  # the own may be among
    return [
        [caption for _, caption in best.get(pair, []) if caption != mine][:limit]
        for pair, mine in enumerate(own)
    ]


def _best(found: Found, limit: int) -> dict[int, list[tuple[float, str]]]:
    """Return for each pair its `limit` different captions of highest cosine, in order."""
    chosen: dict[int, dict[str, float]] = {}
    for pair, cosine, caption in sorted(found, key=lambda entry: -entry[1]):
        of_pair = chosen.setdefault(pair, {})
        if len(of_pair) < limit:
            of_pair.setdefault(caption, cosine)
    return {
        pair: [(cosine, caption) for caption, cosine in of_pair.items()]
        for pair, of_pair in chosen.items()
    }

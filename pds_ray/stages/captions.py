"""Captions of finished images, accepted only if they find the way back: docs/methods.md, "caption".

Each image has a list of captions, the nearest first. One is accepted if of all images the own is
nearest to it. What no caption of a list fulfils gets the first that no other image has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from pds_ray.errors import ConfigError
from pds_ray.stages import products
from pds_ray.stages.products import Vectors

LONGEST_LIST = 64
"""Captions looked at per image; equal texts count as often as they occur."""


def check_images(vectors: np.ndarray) -> None:
    """Raise ConfigError if embeddings of finished images, float32 [B, d], are not all finite."""
    if bad := int((~np.isfinite(vectors).all(axis=1)).sum()):
        raise ConfigError(
            f"the encoder gave NaN or infinity for {bad:,} of the {len(vectors):,} finished "
            "images, to which no caption is near; take --embed.precision fp32 with another --out"
        )


@dataclass
class TopRows:
    """The best rows so far for each of B queries: by falling cosine, earlier ones first in ties."""

    cosine: np.ndarray
    """float32 [B, k], -inf where there is none."""
    shard: np.ndarray
    """int32 [B, k], number of the row's shard; -1 for none."""
    row: np.ndarray
    """int32 [B, k], its place in the shard; -1 for none."""


def no_rows(queries: int, count: int) -> TopRows:
    """Return the neutral element of `merge_rows`."""
    nowhere = np.full((queries, count), -1, np.int32)
    return TopRows(np.full((queries, count), -np.inf, np.float32), nowhere, nowhere.copy())


def top_rows(
    queries: np.ndarray | Vectors,
    rows: np.ndarray,
    shard: int,
    count: int,
    at_least: np.ndarray | None = None,
) -> TopRows:
    """Return the `count` rows of highest cosine to each query, exactly.

    float32 [B, d], [n, d]; `shard` is the number of their shard. Rows below the cosine `at_least`,
    float32 [B], are left out.
    """
    cosine, row = products.top_rows(queries, rows, count, at_least)
    return TopRows(cosine, np.where(row < 0, -1, shard).astype(np.int32), row)


def merge_rows(total: TopRows, part: TopRows) -> TopRows:
    """Return the best of both; called in shard order, the earlier shard comes first in a tie."""
    cosine = np.concatenate([total.cosine, part.cosine], axis=1)
    order = np.argsort(-cosine, axis=1, kind="stable")[:, : total.cosine.shape[1]]
    shard = np.concatenate([total.shard, part.shard], axis=1)
    row = np.concatenate([total.row, part.row], axis=1)
    return TopRows(
        np.take_along_axis(cosine, order, axis=1),
        np.take_along_axis(shard, order, axis=1),
        np.take_along_axis(row, order, axis=1),
    )


@dataclass
class Entries:
    """Rows of a part of the shards that belong in the lists of some queries."""

    query: np.ndarray
    """int32 [m], ascending; of each query the rows are in the order of its list."""
    cosine: np.ndarray
    """float32 [m]."""
    shard: np.ndarray
    """int32 [m]."""
    row: np.ndarray
    """int32 [m]."""


def entries(part: TopRows, at_least: np.ndarray) -> Entries:
    """Return the rows that are above the last ones of the lists so far, float32 [B]."""
    query, place = np.nonzero(part.cosine > at_least[:, None])
    columns = (getattr(part, name)[query, place] for name in ("cosine", "shard", "row"))
    return Entries(query.astype(np.int32), *columns)


def merge_entries(total: TopRows, part: Entries) -> None:
    """Put rows into the lists; called in shard order, the earlier shard comes first in a tie."""
    queries, starts, counts = np.unique(part.query, return_index=True, return_counts=True)
    rows = np.repeat(np.arange(len(queries)), counts)
    places = np.arange(len(part.query)) - np.repeat(starts, counts)
    new = no_rows(len(queries), max(counts, default=0))
    mine = TopRows(total.cosine[queries], total.shard[queries], total.row[queries])
    for name in ("cosine", "shard", "row"):
        getattr(new, name)[rows, places] = getattr(part, name)
    merged = merge_rows(mine, new)
    for name in ("cosine", "shard", "row"):
        getattr(total, name)[queries] = getattr(merged, name)


def finds(captions: np.ndarray, images: np.ndarray, device: str = "cpu") -> np.ndarray:
    """Return the image of highest cosine to each caption, the first of equals. int32 [n].

    float32 [n, d], [B, d].
    """
    return products.nearest_rows(captions, images, device=device)[1]


def text_numbers(texts: Sequence[str]) -> np.ndarray:
    """Return numbers that equal texts have alike, and different ones hardly ever. int64 [n].

    They are the first 64 bits of a hash: of 6.4 million texts two collide once in a million times.
    """
    digests = b"".join(blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(digests, "<i8")


@dataclass
class Finds:
    """Facts on the captions of B lists of k."""

    image: np.ndarray
    """int32 [B, k], the image that each caption is nearest to; -1 for none."""
    text: np.ndarray
    """int64 [B, k], the number of its text."""


def no_finds(lists: int, count: int) -> Finds:
    """Return facts on empty lists."""
    return Finds(np.full((lists, count), -1, np.int32), np.zeros((lists, count), np.int64))


def choose(found: Finds) -> tuple[np.ndarray, np.ndarray]:
    """Return for each of B images the place of its caption in its list, and whether it is accepted.

    int64 [B], bool [B]. A list may be empty of captions that are free: then its first is taken.
    Raises IndexError for a list without captions.
    """
    if (found.image[:, 0] < 0).any():
        raise IndexError("a list has no caption")
    fits = found.image == np.arange(len(found.image))[:, None]
    places, accepted = fits.argmax(axis=1), fits.any(axis=1)
    # two accepted captions are nearest to different images, so that no two are the same text
    taken = set(found.text[accepted, places[accepted]].tolist())
    for image in np.flatnonzero(~accepted):
        texts = found.text[image, found.image[image] >= 0].tolist()
        places[image] = next((at for at, text in enumerate(texts) if text not in taken), 0)
        taken.add(texts[places[image]])
    return places, accepted

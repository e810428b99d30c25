"""Lists of the captions nearest to each query, each with the image that it is nearest to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from pds_ray.distributed import tasks
from pds_ray.distributed.sizes import QUERIES_PER_SHARD
from pds_ray.stages import captions as core
from pds_ray.stages import products
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.schemas import embeddings


@dataclass
class Listed:
    """A caption in the list of an image."""

    text: str
    shard: str
    key: str
    cosine: float
    finds: int
    """The image that it is nearest to."""


def _search(
    group: list[tuple[int, str]], store: EmbeddingStore, queries: np.ndarray, count: int
) -> core.TopRows:
    best = core.no_rows(len(queries), count)
    prepared = products.as_queries(queries)
    for number, shard in group:
        rows = embeddings(store.captions(shard, ["embedding"]))
        last = best.cosine[:, -1]
        best = core.merge_rows(best, core.top_rows(prepared, rows, number, count, last))
    return best


def _look_up(
    item: tuple[str, np.ndarray], store: EmbeddingStore, images: np.ndarray
) -> list[tuple[str, str, int]]:
    shard, rows = item
    found = store.captions(shard, ["key", "caption", "embedding"]).take(rows)
    texts, keys = found.column("caption").to_pylist(), found.column("key").to_pylist()
    return list(zip(texts, keys, core.finds(embeddings(found), images).tolist(), strict=True))


def nearest_captions(
    shards: list[str], store: EmbeddingStore, queries: np.ndarray, images: np.ndarray, bar: tqdm
) -> list[list[Listed]]:
    """Return for each query, float32 [B, d], the captions of highest cosine, the highest first.

    Each comes with the image, of `images` float32 [B, d], that it is nearest to. `bar` counts
    shards.
    """
    count = core.LONGEST_LIST
    best = core.no_rows(len(queries), count)
    numbered = list(enumerate(shards))
    size = 1 + len(queries) * count // QUERIES_PER_SHARD
    groups = [numbered[start : start + size] for start in range(0, len(shards), size)]
    parts = tasks.map_in_order(_search, groups, store, queries, count)
    for group, part in zip(groups, parts, strict=True):
        best = core.merge_rows(best, part)
        bar.update(len(group))
    of_shard = {int(number): best.shard == number for number in np.unique(best.shard)}
    of_shard.pop(-1, None)
    items = [(shards[number], best.row[where]) for number, where in of_shard.items()]
    lists: list[list[Listed | None]] = [[None] * count for _ in queries]
    looked_up = tasks.map_in_order(_look_up, items, store, images)
    for (shard, _), where, found in zip(items, of_shard.values(), looked_up, strict=True):
        for (query, place), (text, key, finds) in zip(np.argwhere(where), found, strict=True):
            cosine = float(best.cosine[query, place])
            lists[query][place] = Listed(text, shard, key, cosine, finds)
    return [[each for each in own if each is not None] for own in lists]

"""The nearest row of a store to each query, found shard by shard; only winners are looked up."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from pds_ray.distributed import tasks
from pds_ray.distributed.sizes import QUERIES_PER_SHARD
from pds_ray.stages import products
from pds_ray.stages import prototypes as core
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.schemas import embeddings

Side = Literal["images", "captions"]
NAMES = {"images": ["key"], "captions": ["key", "caption"]}  # columns looked up for the winners


def _read(side: Side, shard: str, store: EmbeddingStore, columns: list[str]) -> pa.Table:
    return store.images(shard, columns) if side == "images" else store.captions(shard, columns)


def search_shards(
    group: list[tuple[int, str]], side: Side, store: EmbeddingStore, queries: np.ndarray
) -> core.Nearest:
    """Find the nearest row of some shards, with their numbers, to each query."""
    best = core.no_nearest(len(queries))
    prepared = products.as_queries(queries)
    for number, shard in group:
        rows = embeddings(_read(side, shard, store, ["embedding"]))
        cosine, row = products.nearest_rows(prepared, rows, best.cosine)
        core.merge_nearest(best, core.Nearest(cosine, np.full(len(queries), number, np.int32), row))
    return best


def _look_up(item: tuple[str, np.ndarray], side: Side, store: EmbeddingStore) -> pa.Table:
    shard, rows = item
    found = _read(side, shard, store, NAMES[side]).take(rows)
    return found.append_column("shard", pa.array([shard] * len(rows), pa.string()))


def nearest(
    side: Side, shards: list[str], store: EmbeddingStore, queries: np.ndarray, bar: tqdm
) -> dict[str, np.ndarray | list[str]]:
    """Return the image or caption of highest cosine to each query; the earliest of equals.

    `queries` is float32 [B, d].

    The result is columns of B rows: cosine (float32), shard, key and, for captions, caption. `bar`
    counts shards.
    """
    best = core.no_nearest(len(queries))
    numbered = list(enumerate(shards))
    size = 1 + len(queries) // QUERIES_PER_SHARD
    groups = [numbered[start : start + size] for start in range(0, len(shards), size)]
    for group, part in zip(
        groups, tasks.map_in_order(search_shards, groups, side, store, queries), strict=True
    ):
        core.merge_nearest(best, part)
        bar.update(len(group))
    winners = core.by_shard(best)
    columns = {name: [""] * len(queries) for name in ("shard", *NAMES[side])}
    items = ((shards[number], rows) for number, _, rows in winners)
    for (_, mine, _), found in zip(
        winners, tasks.map_in_order(_look_up, items, side, store), strict=True
    ):
        for name, column in columns.items():
            for query, value in zip(mine, found.column(name).to_pylist(), strict=True):
                column[query] = value
    return {"cosine": best.cosine, **columns}

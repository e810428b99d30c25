"""The nearest rows of a store to some queries: one pass for captions and images, shard by shard.

Tasks answer for those queries alone that their shards improve, and only winners are looked up.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from pds_ray.distributed import pools, tasks
from pds_ray.distributed.sizes import column_seconds, product_seconds, task_count
from pds_ray.methods.base import Run
from pds_ray.stages import products
from pds_ray.stages import prototypes as core
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.schemas import embeddings

Side = Literal["images", "captions"]
Sides = Mapping[Side, Any]
NAMES: Sides = {"images": ["key"], "captions": ["key", "caption"]}  # looked up for the winners
COUNTED: Sides = {"images": "images", "captions": "pairs"}


def _read(side: Side, shard: str, store: EmbeddingStore, columns: list[str]) -> pa.Table:
    return store.images(shard, columns) if side == "images" else store.captions(shard, columns)


def search_shards(
    group: list[tuple[int, str]],
    store: EmbeddingStore,
    queries: Mapping[Side, np.ndarray],
    at_least: Mapping[Side, np.ndarray],
    device: str,
) -> dict[Side, core.Improved]:
    """Find the rows of some shards, with their numbers, that are nearer to queries than any before.

    `queries` are float32 [B, d], `at_least` the highest cosines in earlier shards, float32 [B].
    """
    best = {side: core.no_nearest(len(own)) for side, own in queries.items()}
    for side, cosine in at_least.items():
        best[side].cosine[:] = cosine
    prepared = {side: products.as_queries(own, device) for side, own in queries.items()}
    for number, shard in group:
        for side, own in prepared.items():
            rows = embeddings(_read(side, shard, store, ["embedding"]))
            cosine, row = products.nearest_rows(own, rows, best[side].cosine)
            shards = np.full(len(row), number, np.int32)
            core.merge_nearest(best[side], core.Nearest(cosine, shards, row))
    return {side: core.improved(found) for side, found in best.items()}


def _look_up(
    group: list[tuple[str, dict[Side, np.ndarray]]], store: EmbeddingStore
) -> list[dict[Side, pa.Table]]:
    """Return the names of rows of some shards, by side."""
    return [
        {side: _read(side, shard, store, NAMES[side]).take(rows) for side, rows in wanted.items()}
        for shard, wanted in group
    ]


def nearest(
    run: Run, queries: Mapping[Side, np.ndarray], bar: tqdm
) -> dict[Side, dict[str, np.ndarray | list[str]]]:
    """Return the captions and the images of highest cosine to queries; the earliest of equals.

    `queries` holds for one side or both float32 [B, d].

    The result of each is columns of B rows: cosine (float32), shard, key and, for captions,
    caption. `bar` counts shards.
    """
    shards, store, counts = run.shard_names, run.store, run.counts("embed")
    best = {side: core.no_nearest(len(own)) for side, own in queries.items()}
    share, each = pools.products(), max(1, len(shards))
    shard_s = sum(
        product_seconds(counts[COUNTED[side]] / each, len(own), own.shape[1], share.device)
        for side, own in queries.items()
    )
    groups = tasks.groups(list(enumerate(shards)), task_count(len(shards), shard_s))
    so_far = tasks.Latest(lambda: {side: found.cosine for side, found in best.items()})
    given = (store, queries, so_far, share.device)
    parts = tasks.map_in_order(search_shards, groups, *given, share=share)
    for group, part in zip(groups, parts, strict=True):
        for side, found in part.items():
            core.merge_improved(best[side], found)
        bar.update(len(group))
    return named(run, best)


def named(run: Run, best: Mapping[Side, core.Nearest]) -> dict[Side, dict[str, Any]]:
    """Return the columns of the nearest rows, whose names are read from their shards."""
    shards, counts = run.shard_names, run.counts("embed")
    winners = {
        side: {number: (queries, rows) for number, queries, rows in core.by_shard(found)}
        for side, found in best.items()
    }
    numbers = sorted(set().union(*winners.values()))
    items = [
        (shards[number], {side: own[number][1] for side, own in winners.items() if number in own})
        for number in numbers
    ]
    shard_s = sum(column_seconds(counts[COUNTED[side]] / len(shards)) for side in best)
    groups = tasks.groups(items, task_count(len(items), shard_s))
    columns = {
        side: {name: [""] * len(found.cosine) for name in ("shard", *NAMES[side])}
        for side, found in best.items()
    }
    looked_up = chain.from_iterable(tasks.map_in_order(_look_up, groups, run.store))
    for number, tables in zip(numbers, looked_up, strict=True):
        for side, table in tables.items():
            queries = winners[side][number][0]
            found = table.append_column("shard", pa.array([shards[number]] * len(queries)))
            for name, column in columns[side].items():
                for query, value in zip(queries, found.column(name).to_pylist(), strict=True):
                    column[query] = value
    return {side: {"cosine": found.cosine, **columns[side]} for side, found in best.items()}

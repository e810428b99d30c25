"""Lists of the captions nearest to each query, each with the image that it is nearest to."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from pds_ray.distributed import pools, tasks
from pds_ray.distributed.sizes import product_seconds, task_count
from pds_ray.methods.base import Run
from pds_ray.stages import captions as core
from pds_ray.stages import products
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.schemas import embeddings


def _search(
    group: list[tuple[int, str]],
    store: EmbeddingStore,
    queries: np.ndarray,
    count: int,
    at_least: np.ndarray,
    device: str,
) -> core.Entries:
    best, prepared = core.no_rows(len(queries), count), products.as_queries(queries, device)
    for number, shard in group:
        rows = embeddings(store.captions(shard, ["embedding"]))
        reached = np.maximum(best.cosine[:, -1], at_least)
        best = core.merge_rows(best, core.top_rows(prepared, rows, number, count, reached))
    return core.entries(best, at_least)


def _look_up(
    group: list[tuple[str, np.ndarray]], store: EmbeddingStore, images: np.ndarray, device: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return for rows of some shards the image that each is nearest to, and its text's number."""
    rows = [store.captions(shard, ["caption", "embedding"]).take(places) for shard, places in group]
    found = pa.concat_tables(rows)
    texts = core.text_numbers(found.column("caption").to_pylist())
    return core.finds(embeddings(found), images, device), texts


def nearest_captions(
    run: Run, queries: np.ndarray, images: np.ndarray, bar: tqdm
) -> tuple[core.TopRows, core.Finds]:
    """Return for each query, float32 [B, d], the captions of highest cosine, the highest first.

    Each comes with the image, of `images` float32 [B, d], that it is nearest to. `bar` counts
    shards.
    """
    count, shards, store = core.LONGEST_LIST, run.shard_names, run.store
    best = core.no_rows(len(queries), count)
    share, pairs = pools.products(), run.counts("embed")["pairs"]
    shard_s = product_seconds(
        pairs / max(1, len(shards)), len(queries), queries.shape[1], share.device
    )
    groups = tasks.groups(list(enumerate(shards)), task_count(len(shards), shard_s))
    given = (store, queries, count, tasks.Latest(lambda: best.cosine[:, -1]), share.device)
    parts = tasks.map_in_order(_search, groups, *given, share=share)
    for group, part in zip(groups, parts, strict=True):
        core.merge_entries(best, part)
        bar.update(len(group))
    return best, _finds(run, best, images)


def _finds(run: Run, best: core.TopRows, images: np.ndarray) -> core.Finds:
    """Return what is found out of the rows of lists from their shards: 12 bytes for each."""
    shards, share = run.shard_names, pools.products()
    place = np.flatnonzero(best.shard.ravel() >= 0)
    place = place[np.argsort(best.shard.ravel()[place], kind="stable")]
    numbers, starts = np.unique(best.shard.ravel()[place], return_index=True)
    rows = np.split(best.row.ravel()[place], starts[1:])
    items = [(shards[number], mine) for number, mine in zip(numbers, rows, strict=True)]
    mean_rows = run.counts("embed")["pairs"] / max(1, len(shards))
    shard_s = product_seconds(mean_rows, 0, images.shape[1], share.device) + product_seconds(
        len(place) / max(1, len(items)), len(images), images.shape[1], share.device
    )
    groups = tasks.groups(items, task_count(len(items), shard_s))
    given = (run.store, images, share.device)
    found, done = core.no_finds(*best.row.shape), 0
    for image, text in tasks.map_in_order(_look_up, groups, *given, share=share):
        mine = place[done : done + len(image)]
        found.image.ravel()[mine], found.text.ravel()[mine] = image, text
        done += len(image)
    return found

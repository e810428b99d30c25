"""Matching: shards count, tasks add up, the driver solves."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import ray
from tqdm import tqdm

from pds_ray.distributed import ranges, tasks
from pds_ray.distributed.sizes import column_seconds, table_ranges, task_count
from pds_ray.methods.base import Counts, Run
from pds_ray.stages import assign
from pds_ray.stages import match as core
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.schemas import COUPLE_SCHEMA
from pds_ray.telemetry.progress import progress_bar


def count_pairs(
    shards: list[str], folder: RunFolder, clusters: int, bounds: list[int]
) -> Iterator[core.Counts | int]:
    """Count the pairs of some shards in each cell, cut into ranges of image clusters.

    Yields the cells of each range, and at last the number of shards.
    """
    counts = [core.count_pairs(*folder.labels(shard), clusters) for shard in shards]
    yield from core.split_counts(core.merge_counts(*counts), bounds, clusters)
    yield len(shards)


def _sum_cosines(
    shards: list[str], store: EmbeddingStore, folder: RunFolder, text_of: np.ndarray
) -> np.ndarray:
    """Sum the cosines of the pairs of some shards that matched clusters share, float64 [K]."""
    total = np.zeros(len(text_of))
    for shard in shards:
        similarity = store.captions(shard, ["similarity"]).column("similarity").to_numpy()
        total += core.matched_cosines(*folder.labels(shard), similarity, text_of)
    return total


def _groups(run: Run) -> list[list[str]]:
    shards = run.shard_names
    seconds = column_seconds(run.counts("embed")["pairs"] / max(1, len(shards)))
    return tasks.groups(shards, task_count(len(shards), 2 * seconds))


def counted(run: Run, bar: tqdm) -> core.Table:
    """Return the contingency table, which is added up in tasks; `bar` counts shards.

    Its parts are fetched one after the other.
    """
    return _fetched(_added_up(run, bar), run.config.pairs)


def _added_up(run: Run, bar: tqdm) -> ranges.Parts:
    """Return the contingency table in ranges of image clusters; `bar` counts shards."""
    clusters = run.config.pairs
    count = table_ranges(run.counts("embed")["pairs"], clusters)
    given = (run.folder, clusters, ranges.bounds(clusters, count))
    return ranges.added_up(
        count_pairs, _groups(run), *given, ranges=count, add=core.merge_counts, bar=bar
    )


def _fetched(parts: ranges.Parts, clusters: int) -> core.Table:
    """Return a table whose ranges are in the object stores; each is fetched when it is its turn."""
    sizes = [
        tasks.wait_for(size, "the contingency table")
        for size in [tasks.in_store(core.size_of, part) for part in parts]
    ]
    cells, pairs = (sum(column) for column in zip(*sizes, strict=True))
    fetched = (tasks.wait_for(part, "the contingency table") for part in parts)
    return core.Table(clusters, cells, pairs, fetched)


def _assigned(table: core.Table, parts: ranges.Parts, solver: str) -> assign.Assigned:
    """Return the best assignment; of a large table no more than a core comes to this process."""
    if table.cells <= assign.CORE_LIMIT or assign.is_dense(table.clusters, solver):
        return assign.assign_clusters(table, solver)
    cores = [ray.put(core.NO_CELLS)] * len(parts)

    def grow(prices: assign.Prices, most: int) -> core.Table:
        given = (ray.put(prices), most)
        cores[:] = [
            tasks.in_store(assign.grown, mine, part, *given)
            for mine, part in zip(cores, parts, strict=True)
        ]
        return _fetched(cores, table.clusters)

    return assign.assign_by_core(table.clusters, grow)


def match(run: Run) -> Counts:
    """Write the matched clusters; return how many there are and what they share."""
    shards, config = run.shard_names, run.config
    with progress_bar("match", 2 * len(shards) + 1, "shards") as bar:
        parts = _added_up(run, bar)
        table = _fetched(parts, config.pairs)
        bar.set_postfix_str("the assignment", refresh=False)
        cells, pairs = table.cells, table.pairs
        text_of, shared = _assigned(table, parts, config.match.solver)
        del table, parts  # and with them what object stores hold
        bar.update()
        cosines, groups = np.zeros(config.pairs), _groups(run)
        sums = tasks.map_in_order(_sum_cosines, groups, run.store, run.folder, text_of)
        for group, part in zip(groups, sums, strict=True):
            cosines += part
            bar.update(len(group))
    columns = core.matched_clusters(text_of, shared, cosines, config.pairs, config.match)
    run.folder.save_couples(pa.table(columns, schema=COUPLE_SCHEMA))
    pairless = config.pairs - int((~columns["pairless"]).sum())
    return {
        "clusters": config.pairs,
        "cells": cells,
        "couples": len(columns["shared"]),
        "pairless": pairless,
        "pairless_policy": "kept" if core.keeps_empty(config.pairs, config.match) else "dropped",
        "shared_pairs": int(shared.sum()),
        "pairs_not_shared": pairs - int(shared.sum()),
    }

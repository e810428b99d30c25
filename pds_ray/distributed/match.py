"""Matching: shards count, the driver adds up and solves."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
from tqdm import tqdm

from pds_ray.distributed import tasks
from pds_ray.distributed.sizes import column_seconds, task_count
from pds_ray.methods.base import Counts, Run
from pds_ray.stages import match as core
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.schemas import COUPLE_SCHEMA
from pds_ray.telemetry.progress import progress_bar


def count_pairs(
    shards: list[str], store: EmbeddingStore, folder: RunFolder, clusters: int
) -> list[core.Counts]:
    """Count the pairs of each of some shards in each cell of the contingency table."""
    counts = []
    for shard in shards:
        similarity = store.captions(shard, ["similarity"]).column("similarity").to_numpy()
        counts.append(core.count_pairs(*folder.labels(shard), similarity, clusters))
    return counts


def counted(run: Run, bar: tqdm) -> Iterator[core.Counts]:
    """Yield the contingency table of each shard, in order; `bar` counts shards."""
    shards, pairs = run.shard_names, run.counts("embed")["pairs"]
    # not added up in the task: the cosines of a cell are summed in the order of the shards
    shard_s = 2 * column_seconds(pairs / max(1, len(shards)))
    groups = tasks.groups(shards, task_count(len(shards), shard_s))
    given = (run.store, run.folder, run.config.pairs)
    for parts in tasks.map_in_order(count_pairs, groups, *given):
        yield from parts
        bar.update(len(parts))


def match(run: Run) -> Counts:
    """Write the matched clusters; return how many there are and what they share."""
    shards, config = run.shard_names, run.config
    with progress_bar("match", len(shards) + 1, "shards") as bar:
        cells, counts, cosines = core.sum_counts(counted(run, bar))
        bar.set_postfix_str("the assignment", refresh=False)
        text_of = core.assign_clusters(cells, counts, config.pairs, config.match.solver)
        bar.update()
    columns = core.matched_clusters(cells, counts, cosines, text_of, config.pairs, config.match)
    run.folder.save_couples(pa.table(columns, schema=COUPLE_SCHEMA))
    shared = int(columns["shared"].sum())
    pairless = config.pairs - int((~columns["pairless"]).sum())
    return {
        "clusters": config.pairs,
        "cells": len(cells),
        "couples": len(columns["shared"]),
        "pairless": pairless,
        "pairless_policy": "kept" if core.keeps_empty(config.pairs, config.match) else "dropped",
        "shared_pairs": shared,
        "pairs_not_shared": int(counts.sum()) - shared,
    }

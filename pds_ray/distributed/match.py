"""Matching: shards count, the driver adds up and solves."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from pds_ray.distributed import tasks
from pds_ray.methods.base import Counts, Run
from pds_ray.stages import match as core
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.schemas import COUPLE_SCHEMA
from pds_ray.telemetry.progress import progress_bar


def count_pairs(shard: str, store: EmbeddingStore, folder: RunFolder, clusters: int) -> core.Counts:
    """Count the pairs of a shard in each cell of the contingency table."""
    similarity = store.captions(shard, ["similarity"]).column("similarity").to_numpy()
    return core.count_pairs(*folder.labels(shard), similarity, clusters)


def match(run: Run) -> Counts:
    """Write the matched clusters; return how many there are and what they share."""
    shards, config = run.shard_names, run.config
    with progress_bar("match", len(shards) + 1, "shards") as bar:

        def parts() -> Iterator[core.Counts]:
            for part in tasks.map_in_order(
                count_pairs, shards, run.store, run.folder, config.pairs
            ):
                bar.update()
                yield part

        cells, counts, cosines = core.sum_counts(parts())
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

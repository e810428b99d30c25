"""Selection: one task gathers all embeddings and picks; the picks are looked up in their shards."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from pds_ray import catalog
from pds_ray.config import ConfigError, RunConfig
from pds_ray.distributed import pools, tasks
from pds_ray.distributed.in_flight import InFlight
from pds_ray.methods.base import Counts, Run
from pds_ray.stages import select as core
from pds_ray.stages.prototypes import fewer
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.telemetry.progress import progress_bar


def _pick(
    shards: list[str], dim: int, store: EmbeddingStore, config: RunConfig, in_flight: InFlight
) -> Iterator[int]:
    with in_flight.doing("the embeddings to be loaded") as doing:
        candidates = core.load_candidates(shards, store, dim, doing.now)
        doing.now(f"the picks of {config.start}")
        yield from catalog.selector(config.start).select(
            candidates, config.pairs, config.seed, config.select
        )


def _look_up(picks: tuple[str, np.ndarray, np.ndarray], store: EmbeddingStore) -> pa.Table:
    return core.chosen_pairs(*picks, store)


def select(run: Run) -> Counts:
    """Write prototypes.parquet, with the chosen pairs; return what was chosen.

    Raises ConfigError if the embeddings do not fit in the memory of one node.
    """
    shards, store, config = run.shard_names, run.store, run.config
    counts, dim = run.counts("embed"), run.encoder.dim
    needed = core.candidate_bytes(counts["images"], counts["pairs"], dim)
    there = pools.most_memory()
    if needed > there:
        raise ConfigError(
            f"method {config.start} holds all embeddings at once, {needed / 2**30:,.1f} GiB of "
            f"{counts['pairs']:,} pairs; the largest node has {there / 2**30:,.1f} GiB for it; "
            "take larger nodes, fewer data, or method pds"
        )
    picks = []
    with InFlight() as in_flight, progress_bar("select", config.pairs, "pairs") as bar:
        bar.follow(in_flight.reports())
        for pick in tasks.stream(_pick, shards, dim, store, config, in_flight):
            picks.append(pick)
            bar.update()
    parts = core.split_by_shard(picks, shards, store)
    chosen = pa.concat_tables(tasks.map_in_order(_look_up, parts, store)).sort_by("pair")
    run.folder.save_prototypes(chosen)
    return {
        "prototypes": chosen.num_rows,
        **fewer(config.pairs, chosen.num_rows, f"method {config.start} picks no more"),
        "duplicate_captions": chosen.num_rows - len(set(chosen.column("caption").to_pylist())),
        "mean_cosine": float(np.mean(chosen.column("cosine").to_numpy())),
    }

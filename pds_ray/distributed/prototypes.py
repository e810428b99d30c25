"""Prototypes over shards: sums of pairs, then the caption and the image nearest to each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from pds_ray.distributed import tasks
from pds_ray.distributed.nearest import nearest
from pds_ray.methods.base import Counts, Run
from pds_ray.stages import prototypes as core
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.schemas import embeddings, prototype_schema, vector_array
from pds_ray.telemetry.progress import progress_bar


def sum_shard(
    shard: str, store: EmbeddingStore, folder: RunFolder, matches: core.Matches, clusters: int
) -> core.Sums:
    """Sum the vectors of a shard per matched clusters."""
    return core.shard_sums(_pairs(shard, store, folder), matches, clusters)


def _pairs(shard: str, store: EmbeddingStore, folder: RunFolder) -> core.ShardPairs:
    captions = store.captions(shard, ["key", "image_row", "embedding"])
    return core.ShardPairs(
        shard,
        captions.column("key").to_pylist(),
        embeddings(store.images(shard, ["embedding"])),
        captions.column("image_row").to_numpy(),
        embeddings(captions),
        *folder.labels(shard),
    )


def _find_medoids(
    shard: str,
    store: EmbeddingStore,
    folder: RunFolder,
    matches: core.Matches,
    clusters: int,
    centers: core.Prototypes,
) -> core.Medoids:
    return core.shard_medoids(_pairs(shard, store, folder), matches, clusters, centers)


def _medoids(
    run: Run, matches: core.Matches, centers: core.Prototypes, bar: tqdm
) -> core.Prototypes:
    """Return the real pairs nearest to the means, as prototypes."""
    given = (run.store, run.folder, matches, run.config.pairs, centers)
    total = core.no_medoids(len(matches.whole), run.encoder.dim)
    for part in tasks.map_in_order(_find_medoids, run.shard_names, *given):
        core.merge_medoids(total, part)
        bar.update()
    return core.of_medoids(total, centers)


def _matches(couples: pa.Table, only_shared: bool) -> core.Matches:
    """Return the matched clusters; empty ones are averaged whole, and all unless `only_shared`."""
    names = ("image_cluster", "text_cluster", "pairless")
    image, text, empty = (couples.column(name).to_numpy(zero_copy_only=False) for name in names)
    return core.Matches(image, text, empty if only_shared else np.ones_like(empty))


def _columns_of_matches(match: np.ndarray, couples: pa.Table, sums: core.Sums) -> dict[str, Any]:
    """Return the columns that a prototype has from its match; int64 [B] are their numbers."""
    clusters = {
        name: couples.column(name).to_numpy()[match]
        for name in ("image_cluster", "text_cluster", "shared")
    }
    return {
        **clusters,
        "member_norm": sums.image_norm[match] / sums.image_count[match],
        "members": [sums.members[number] for number in match],
    }


def _fewer(run: Run, count: int, empty: int) -> Counts:
    why = core.why_fewer(run.counts("cluster"), run.counts("match"), empty)
    return core.fewer(run.config.pairs, count, why)


def make_prototypes(run: Run) -> Counts:
    """Write prototypes.parquet; return what became of the matched clusters."""
    shards, store, config = run.shard_names, run.store, run.config
    couples = run.folder.couples()
    matches = _matches(couples, config.match.filter)
    medoids = config.prototypes.center == "medoid"
    with progress_bar("prototypes", (4 if medoids else 3) * len(shards), "shards") as bar:
        sums = core.empty_sums(np.arange(len(matches.whole)), run.encoder.dim)
        for part in tasks.map_in_order(sum_shard, shards, store, run.folder, matches, config.pairs):
            core.add_sums(sums, part)
            bar.update()
        prototypes = core.means(sums)
        if medoids:
            prototypes = _medoids(run, matches, prototypes, bar)
        caption = nearest("captions", shards, store, prototypes.text, bar)
        image = nearest("images", shards, store, prototypes.image, bar)
    count = len(prototypes.match)
    columns = _columns_of_matches(prototypes.match, couples, sums) | {
        "pair": np.arange(count, dtype=np.int32),
        "image_prototype": vector_array(prototypes.image),
        "text_prototype": vector_array(prototypes.text),
        "cosine": prototypes.cosine,
        "caption": caption["caption"],
        "caption_shard": caption["shard"],
        "caption_key": caption["key"],
        "caption_cosine": caption["cosine"],
        "nearest_shard": image["shard"],
        "nearest_key": image["key"],
        "nearest_cosine": image["cosine"],
    }
    run.folder.save_prototypes(pa.table(columns, schema=prototype_schema(run.encoder.dim)))
    empty = len(matches.whole) - count
    return {
        "prototypes": count,
        **(_fewer(run, count, empty) if count < config.pairs else {}),
        "empty_couples": empty,
        "duplicate_captions": count - len(set(caption["caption"])),
        "mean_cosine": float(prototypes.cosine.mean()) if count else 0.0,
    }

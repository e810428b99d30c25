"""Prototypes over shards: sums of pairs, then the caption and the image nearest to each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from pds_ray.distributed import ranges, tasks
from pds_ray.distributed.nearest import nearest
from pds_ray.distributed.sizes import match_ranges, sum_task_count
from pds_ray.methods.base import Counts, Run
from pds_ray.stages import prototypes as core
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.schemas import embeddings, prototype_schema, vector_array
from pds_ray.telemetry.progress import progress_bar


def sum_shards(
    shards: list[str],
    store: EmbeddingStore,
    folder: RunFolder,
    matches: core.Matches,
    clusters: int,
    dim: int,
    bounds: list[int],
) -> Iterator[core.Sums | int]:
    """Sum the vectors of some shards per matched clusters, cut into ranges of matches.

    Yields the sums of each range, of the matches that have any, and at last the number of shards.
    """
    total = core.empty_sums(np.arange(len(matches.whole)), dim)
    for shard in shards:
        core.add_sums(total, core.shard_sums(_pairs(shard, store, folder), matches, clusters))
    yield from map(core.touched, total.split(bounds))
    yield len(shards)


def _averaged(total: core.Sums) -> tuple[core.Prototypes, core.Members]:
    return core.means(total), core.members(total)


def _average(run: Run, matches: core.Matches, bar: tqdm) -> tuple[core.Prototypes, core.Members]:
    """Return the mean vectors of the matches.

    Their sums never come to the driver: for 100,000 matches, a task may have a gigabyte of them.
    """
    dim, clusters = run.encoder.dim, run.config.pairs
    count = match_ranges(len(matches.whole), dim)
    bounds = ranges.bounds(len(matches.whole), count)
    given = (run.store, run.folder, matches, clusters, dim, bounds)
    totals = ranges.added_up(
        sum_shards, _groups(run, matches), *given, ranges=count, add=core.added_sums, bar=bar
    )
    means = [tasks.in_store(_averaged, total) for total in totals]
    prototypes, members = zip(*(tasks.wait_for(own, "the means") for own in means), strict=True)
    return core.merged(prototypes), core.joined_members(members)


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
    shards: list[str],
    store: EmbeddingStore,
    folder: RunFolder,
    matches: core.Matches,
    clusters: int,
    centers: core.Prototypes,
    at_least: np.ndarray,
) -> core.Medoids:
    """Find the pairs of some shards that are nearer to the means than any before."""
    best = core.no_medoids(0, centers.image.shape[1])
    for shard in shards:
        part = core.shard_medoids(_pairs(shard, store, folder), matches, clusters, centers)
        best = core.best_medoids([best, part], at_least)
    return best


def _medoids(
    run: Run, matches: core.Matches, centers: core.Prototypes, bar: tqdm
) -> core.Prototypes:
    """Return the real pairs nearest to the means, as prototypes."""
    total = core.no_medoids(len(matches.whole), run.encoder.dim)
    given = (run.store, run.folder, matches, run.config.pairs, centers)
    groups = _groups(run, matches)
    so_far = tasks.Latest(lambda: total.score)
    parts = tasks.map_in_order(_find_medoids, groups, *given, so_far)
    for group, part in zip(groups, parts, strict=True):
        core.merge_medoids(total, part)
        bar.update(len(group))
    return core.of_medoids(total, centers)


def _groups(run: Run, matches: core.Matches) -> list[list[str]]:
    """Return the shards of each task whose answer holds vectors of matches."""
    counts, shards = run.counts("embed"), run.shard_names
    each = max(1, len(shards))
    rows = (counts["pairs"] + counts["images"]) / each
    members = counts["pairs"] if matches.whole.any() else run.counts("match")["shared_pairs"]
    count = sum_task_count(len(shards), rows, members / each, len(matches.whole), run.encoder.dim)
    return tasks.groups(shards, count)


def _matches(couples: pa.Table, only_shared: bool) -> core.Matches:
    """Return the matched clusters; empty ones are averaged whole, and all unless `only_shared`."""
    names = ("image_cluster", "text_cluster", "pairless")
    image, text, empty = (couples.column(name).to_numpy(zero_copy_only=False) for name in names)
    return core.Matches(image, text, empty if only_shared else np.ones_like(empty))


def _columns_of_matches(
    match: np.ndarray, couples: pa.Table, members: core.Members
) -> dict[str, Any]:
    """Return the columns that a prototype has from its match; int64 [B] are their numbers."""
    clusters = {
        name: couples.column(name).to_numpy()[match]
        for name in ("image_cluster", "text_cluster", "shared")
    }
    own = members.of(match)
    return {**clusters, "member_norm": own.norm, "members": own.names}


def _fewer(run: Run, count: int, empty: int) -> Counts:
    why = core.why_fewer(run.counts("cluster"), run.counts("match"), empty)
    return core.fewer(run.config.pairs, count, why)


def make_prototypes(run: Run) -> Counts:
    """Write prototypes.parquet; return what became of the matched clusters."""
    config = run.config
    couples = run.folder.couples()
    matches = _matches(couples, config.match.filter)
    medoids = config.prototypes.center == "medoid"
    with progress_bar("prototypes", (3 if medoids else 2) * len(run.shard_names), "shards") as bar:
        prototypes, members = _average(run, matches, bar)
        if medoids:
            prototypes = _medoids(run, matches, prototypes, bar)
        found = nearest(run, {"captions": prototypes.text, "images": prototypes.image}, bar)
    caption, image = found["captions"], found["images"]
    count = len(prototypes.match)
    columns = _columns_of_matches(prototypes.match, couples, members) | {
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

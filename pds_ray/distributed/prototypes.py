"""Prototypes over shards: sums of pairs, then the caption and the image nearest to each."""

from __future__ import annotations

from itertools import chain, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from pds_ray.distributed import tasks
from pds_ray.distributed.nearest import nearest
from pds_ray.distributed.sizes import (
    SUMS_ADDED_TOGETHER,
    match_ranges,
    sum_task_count,
)
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
    bounds: list[int],
) -> tuple[Any, ...]:
    """Sum the vectors of each of some shards per matched clusters, cut into ranges of matches.

    Returns the sums of each range, shard by shard, and at last the number of shards.
    """
    parts = [
        core.shard_sums(_pairs(shard, store, folder), matches, clusters).split(bounds)
        for shard in shards
    ]
    return *zip(*parts, strict=True), len(shards)


def _add_up(total: core.Sums, *groups: list[core.Sums]) -> core.Sums:
    # shard by shard, however they are grouped: sums are rounded in the order of the shards
    total = total.copy()
    for part in chain.from_iterable(groups):
        core.add_sums(total, part)
    return total


def _averaged(total: core.Sums) -> tuple[core.Prototypes, core.Members]:
    return core.means(total), core.members(total)


def _average(run: Run, matches: core.Matches, bar: tqdm) -> tuple[core.Prototypes, core.Members]:
    """Return the mean vectors of the matches.

    Their sums never come to the driver: for 100,000 matches, every shard has many megabytes of
    them. They are added up in the object stores of the cluster, in ranges of matches.
    """
    count, dim = len(matches.whole), run.encoder.dim
    ranges = match_ranges(count, dim)
    bounds = np.linspace(0, count, ranges + 1).astype(int).tolist()
    totals = [
        tasks.in_store(core.empty_sums, np.arange(start, end), dim)
        for start, end in pairwise(bounds)
    ]
    groups, waiting = _groups(run), []
    given = (run.store, run.folder, matches, run.config.pairs, bounds)
    parts = tasks.map_to_store(sum_shards, groups, *given, results=ranges + 1)
    for number, (group, (*part, _)) in enumerate(zip(groups, parts, strict=True), 1):
        waiting.append(part)
        bar.update(len(group))
        if len(waiting) == SUMS_ADDED_TOGETHER or number == len(groups):
            tasks.await_all(totals)  # else sums would come sooner than they are added up
            totals = [
                tasks.in_store(_add_up, total, *own)
                for total, own in zip(totals, zip(*waiting, strict=True), strict=True)
            ]
            waiting.clear()
    averaged = [tasks.wait_for(tasks.in_store(_averaged, total), "the means") for total in totals]
    prototypes, members = zip(*averaged, strict=True)
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
    parts = [
        core.shard_medoids(_pairs(shard, store, folder), matches, clusters, centers)
        for shard in shards
    ]
    return core.best_medoids(parts, at_least)


def _medoids(
    run: Run, matches: core.Matches, centers: core.Prototypes, bar: tqdm
) -> core.Prototypes:
    """Return the real pairs nearest to the means, as prototypes."""
    total = core.no_medoids(len(matches.whole), run.encoder.dim)
    given = (run.store, run.folder, matches, run.config.pairs, centers)
    groups = _groups(run)
    so_far = tasks.Latest(lambda: total.score)
    parts = tasks.map_in_order(_find_medoids, groups, *given, so_far)
    for group, part in zip(groups, parts, strict=True):
        core.merge_medoids(total, part)
        bar.update(len(group))
    return core.of_medoids(total, centers)


def _groups(run: Run) -> list[list[str]]:
    """Return the shards of each task whose answer holds vectors of matches."""
    counts, shards = run.counts("embed"), run.shard_names
    each = max(1, len(shards))
    pairs, rows = counts["pairs"] / each, (counts["pairs"] + counts["images"]) / each
    matches = min(pairs, run.config.pairs)
    return tasks.groups(shards, sum_task_count(len(shards), rows, matches, run.encoder.dim))


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
    return {
        **clusters,
        "member_norm": members.norm[match],
        "members": [members.names[number] for number in match],
    }


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

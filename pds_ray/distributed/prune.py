"""Pruning over shards: three passes over the similarities find the threshold, a last one writes.

The keep mask of a shard is kept as long as it belongs to the same pairs and the same share.
"""

from __future__ import annotations

import numpy as np

from pds_ray.distributed import tasks
from pds_ray.distributed.sizes import column_seconds, task_count
from pds_ray.methods.base import Counts, Run
from pds_ray.stages import prune as core
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.manifest import fingerprint
from pds_ray.store.run_folder import RunFolder
from pds_ray.telemetry.progress import progress_bar


def _similarity(shard: str, store: EmbeddingStore) -> np.ndarray:
    return store.captions(shard, ["similarity"]).column("similarity").to_numpy()


def histogram(shards: list[str], store: EmbeddingStore, high: int | None) -> np.ndarray:
    """Count the cosines of some shards by their upper or, below `high`, their lower bits."""
    counts = np.zeros(core.BUCKETS, np.int64)
    for shard in shards:
        counts += core.histogram(_similarity(shard, store), high)
    return counts


def count_ties(shards: list[str], store: EmbeddingStore, threshold: core.Threshold) -> list[int]:
    """Count the cosines of each of some shards that equal the threshold."""
    return [core.count_ties(_similarity(shard, store), threshold) for shard in shards]


def write_masks(
    group: list[tuple[str, int, bool]],
    store: EmbeddingStore,
    folder: RunFolder,
    threshold: core.Threshold,
) -> tuple[int, int]:
    """Save the keep masks of shards, unless they exist; return how many pairs and images they keep.

    An item of `group`: the shard, the pairs of the threshold's cosine before it, whether its mask
    exists.
    """
    pairs = images = 0
    for shard, ties_before, done in group:
        captions = store.captions(shard, ["image_row"] if done else ["image_row", "similarity"])
        if done:
            kept = folder.keep(shard)
        else:
            kept = core.keep_mask(captions.column("similarity").to_numpy(), threshold, ties_before)
            folder.save_keep(shard, kept)
        pairs += int(kept.sum())
        images += len(np.unique(captions.column("image_row").to_numpy()[kept]))
    return pairs, images


def _masked(run: Run) -> set[str]:
    """Return the shards with a mask; those of other data or another share are removed."""
    folder, manifest = run.folder, run.manifest
    made_from = fingerprint(run.fingerprints["prune"], manifest.data["store_content"])
    if manifest.data.get("masks_made_from") != made_from:
        folder.delete_masks()
        manifest.update(masks_made_from=made_from)
    return folder.masked()


def prune(run: Run) -> Counts:
    """Write the keep masks that are not there; return how many pairs and images stay."""
    shards, pairs = run.shard_names, run.counts("embed")["pairs"]
    store, folder = run.store, run.folder
    drop, done = core.drop_count(run.config.prune.ratio, pairs), _masked(run)
    shard_s = column_seconds(pairs / max(1, len(shards)))
    count = task_count(len(shards), shard_s)
    groups = tasks.groups(shards, count)
    with progress_bar("prune", 4 * len(shards), "shards") as bar:

        def counted(high: int | None) -> np.ndarray:
            total = np.zeros(core.BUCKETS, np.int64)
            parts = tasks.map_in_order(histogram, groups, store, high)
            for group, counts in zip(groups, parts, strict=True):
                total += counts
                bar.update(len(group))
            return total

        if drop == 0 or done.issuperset(shards):  # no mask needs a threshold
            threshold, ties = core.Threshold(0, 0), [0] * len(shards)
            bar.update(3 * len(shards))
        else:
            high, before = core.find_bucket(counted(None), drop - 1)
            low, before_low = core.find_bucket(counted(high), drop - 1 - before)
            threshold = core.Threshold((high << 16) | low, drop - before - before_low)
            ties = []
            for tied in tasks.map_in_order(count_ties, groups, store, threshold):
                ties += tied
                bar.update(len(tied))
        starts = [int(start) for start in np.cumsum([0, *ties[:-1]])]
        kept = images = 0
        exist = (shard in done for shard in shards)
        items = tasks.groups(list(zip(shards, starts, exist, strict=True)), count)
        parts = tasks.map_in_order(write_masks, items, store, folder, threshold)
        for group, (kept_here, images_here) in zip(items, parts, strict=True):
            kept += kept_here
            images += images_here
            bar.update(len(group))
    return {"pairs": pairs, "kept": kept, "dropped": pairs - kept, "images_kept": images}

"""Pruning over shards: three passes over the similarities find the threshold, a last one writes.

The keep mask of a shard is kept as long as it belongs to the same pairs and the same share.
"""

from __future__ import annotations

import numpy as np

from pds_ray.distributed import tasks
from pds_ray.methods.base import Counts, Run
from pds_ray.stages import prune as core
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.manifest import fingerprint
from pds_ray.store.run_folder import RunFolder
from pds_ray.telemetry.progress import progress_bar


def _similarity(shard: str, store: EmbeddingStore) -> np.ndarray:
    return store.captions(shard, ["similarity"]).column("similarity").to_numpy()


def histogram(shard: str, store: EmbeddingStore, high: int | None) -> np.ndarray:
    """Count the cosines of a shard by their upper or, below `high`, their lower bits."""
    return core.histogram(_similarity(shard, store), high)


def count_ties(shard: str, store: EmbeddingStore, threshold: core.Threshold) -> int:
    """Count the cosines of a shard that equal the threshold."""
    return core.count_ties(_similarity(shard, store), threshold)


def write_mask(
    item: tuple[str, int, bool], store: EmbeddingStore, folder: RunFolder, threshold: core.Threshold
) -> tuple[int, int]:
    """Save the keep mask of a shard, unless it exists; return how many pairs and images it keeps.

    `item`: the shard, the pairs of the threshold's cosine before it, whether its mask exists.
    """
    shard, ties_before, done = item
    captions = store.captions(shard, ["image_row"] if done else ["image_row", "similarity"])
    if done:
        kept = folder.keep(shard)
    else:
        kept = core.keep_mask(captions.column("similarity").to_numpy(), threshold, ties_before)
        folder.save_keep(shard, kept)
    return int(kept.sum()), len(np.unique(captions.column("image_row").to_numpy()[kept]))


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
    with progress_bar("prune", 4 * len(shards), "shards") as bar:
        if drop == 0 or done.issuperset(shards):  # no mask needs a threshold
            threshold, ties = core.Threshold(0, 0), [0] * len(shards)
            bar.update(3 * len(shards))
        else:
            upper = np.zeros(core.BUCKETS, np.int64)
            for counts in tasks.map_in_order(histogram, shards, store, None):
                upper += counts
                bar.update()
            high, before = core.find_bucket(upper, drop - 1)
            lower = np.zeros(core.BUCKETS, np.int64)
            for counts in tasks.map_in_order(histogram, shards, store, high):
                lower += counts
                bar.update()
            low, before_low = core.find_bucket(lower, drop - 1 - before)
            threshold = core.Threshold((high << 16) | low, drop - before - before_low)
            ties = []
            for tied in tasks.map_in_order(count_ties, shards, store, threshold):
                ties.append(tied)
                bar.update()
        starts = [int(start) for start in np.cumsum([0, *ties[:-1]])]
        kept = images = 0
        items = ((shard, start, shard in done) for shard, start in zip(shards, starts, strict=True))
        for kept_here, images_here in tasks.map_in_order(
            write_mask, items, store, folder, threshold
        ):
            kept += kept_here
            images += images_here
            bar.update()
    return {"pairs": pairs, "kept": kept, "dropped": pairs - kept, "images_kept": images}

"""Whitening over shards: each sums its vectors, the driver adds up and takes the root."""

from __future__ import annotations

import numpy as np

from pds_ray.distributed import tasks
from pds_ray.methods.base import Counts, Run
from pds_ray.stages import whiten as core
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.schemas import MODALITIES, embeddings
from pds_ray.telemetry.progress import progress_bar

Sides = dict[str, core.Moments]


def sum_shard(shard: str, store: EmbeddingStore, folder: RunFolder) -> Sides:
    """Sum over the kept pairs of a shard, images and captions apart."""
    kept = folder.keep(shard)
    captions = store.captions(shard, ["image_row", "embedding"])
    images = embeddings(store.images(shard, ["embedding"]))
    rows = captions.column("image_row").to_numpy()[kept]
    return {
        "image": core.moments(images, np.bincount(rows, minlength=len(images))),
        "text": core.moments(embeddings(captions), kept.astype(np.int64)),
    }


def whiten(run: Run) -> Counts:
    """Write the whitening of both modalities; return how many pairs it was computed from."""
    shards, dim = run.shard_names, run.encoder.dim
    sums = {side: core.no_moments(dim) for side in MODALITIES}
    with progress_bar("whiten", len(shards), "shards") as bar:
        for part in tasks.map_in_order(sum_shard, shards, run.store, run.folder):
            for side, total in sums.items():
                core.add_moments(total, part[side])
            bar.update()
    ridge = run.config.whiten.ridge
    found = {side: core.whitening(total, ridge) for side, total in sums.items()}
    run.folder.save_whitening(
        {
            f"{side}_{name}": getattr(white, name)
            for side, white in found.items()
            for name in ("mean", "matrix")
        }
    )
    return {"pairs": sums["text"].count}

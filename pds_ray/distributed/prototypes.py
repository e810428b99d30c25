"""Prototypes over shards: sums of pairs, then the nearest caption and the nearest image of each prototype."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from pds_ray.artifacts import EmbeddingStore, RunFolder, prototype_schema, vector_array, vectors
from pds_ray.config import RunConfig
from pds_ray.distributed import runtime
from pds_ray.progress import progress_bar
from pds_ray.stages import prototypes as core


def _sums(shard: str, store: EmbeddingStore, run: RunFolder, couples: core.Couples, clusters: int) -> core.Sums:
    captions = store.captions(shard, ["key", "image_row", "embedding"])
    image_rows = captions.column("image_row").to_numpy()
    images = vectors(store.images(shard, ["embedding"]), "embedding")
    return core.shard_sums(
        shard,
        captions.column("key").to_pylist(),
        images[image_rows],
        vectors(captions, "embedding"),
        *run.labels(shard),
        couples,
        clusters,
    )


def _nearest(shard: str, store: EmbeddingStore, prototypes: core.Prototypes) -> tuple[core.Nearest, core.Nearest]:
    captions = store.captions(shard, ["key", "caption", "embedding"])
    cosine, rows = core.nearest_rows(prototypes.text, vectors(captions, "embedding"))
    caption = core.Nearest(cosine, core.who(shard, rows, captions, "key", "caption"))
    images = store.images(shard, ["key", "embedding"])
    cosine, rows = core.nearest_rows(prototypes.image, vectors(images, "embedding"))
    return caption, core.Nearest(cosine, core.who(shard, rows, images, "key"))


def make_prototypes(
    shards: list[str], dim: int, store: EmbeddingStore, run: RunFolder, config: RunConfig
) -> dict[str, Any]:
    """Writes prototypes.parquet; returns what became of the couples."""
    table = run.couples()
    names = ("image_cluster", "text_cluster", "pairless")
    image_cluster, text_cluster, pairless = (table.column(name).to_numpy(zero_copy_only=False) for name in names)
    couples = core.Couples(image_cluster, text_cluster, pairless if config.match.filter else np.ones_like(pairless))
    with progress_bar("prototypes", 2 * len(shards), "shards") as bar:
        sums = core.empty_sums(np.arange(len(couples.whole)), dim)
        for part in runtime.map_in_order(_sums, shards, store, run, couples, config.pairs):
            core.add_sums(sums, part)
            bar.update()
        prototypes = core.means(sums)
        count = len(prototypes.couple)
        caption, image = core.no_nearest(count), core.no_nearest(count)
        for captions_of_shard, images_of_shard in runtime.map_in_order(_nearest, shards, store, prototypes):
            core.merge_nearest(caption, captions_of_shard)
            core.merge_nearest(image, images_of_shard)
            bar.update()
    of = prototypes.couple
    run.save_prototypes(
        pa.table(
            {
                "pair": np.arange(count, dtype=np.int32),
                "image_prototype": vector_array(prototypes.image, "float32"),
                "text_prototype": vector_array(prototypes.text, "float32"),
                "cosine": prototypes.cosine,
                "image_cluster": couples.image_cluster[of],
                "text_cluster": couples.text_cluster[of],
                "shared": table.column("shared").to_numpy()[of],
                "member_norm": sums.image_norm[of] / sums.image_count[of],
                "caption": [who[2] for who in caption.who],
                "caption_shard": [who[0] for who in caption.who],
                "caption_key": [who[1] for who in caption.who],
                "caption_cosine": caption.cosine,
                "nearest_shard": [who[0] for who in image.who],
                "nearest_key": [who[1] for who in image.who],
                "nearest_cosine": image.cosine,
                "members": [sums.members[couple] for couple in of],
            },
            schema=prototype_schema(dim),
        )
    )
    return {
        "prototypes": count,
        "empty_couples": len(couples.whole) - count,
        "duplicate_captions": count - len({who[2] for who in caption.who}),
        "mean_cosine": float(prototypes.cosine.mean()) if count else 0.0,
    }

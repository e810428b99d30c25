"""Prototypes over shards: sums of pairs, then the caption and the image nearest to each."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

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
    captions = store.captions(shard, ["key", "image_row", "embedding"])
    return core.shard_sums(
        shard,
        captions.column("key").to_pylist(),
        embeddings(store.images(shard, ["embedding"])),
        captions.column("image_row").to_numpy(),
        embeddings(captions),
        *folder.labels(shard),
        matches,
        clusters,
    )


def make_prototypes(run: Run) -> Counts:
    """Write prototypes.parquet; return what became of the matched clusters."""
    shards, store, config = run.shard_names, run.store, run.config
    dim, table = run.encoder.dim, run.folder.couples()
    names = ("image_cluster", "text_cluster", "pairless")
    image_cluster, text_cluster, pairless = (
        table.column(name).to_numpy(zero_copy_only=False) for name in names
    )
    matches = core.Matches(
        image_cluster, text_cluster, pairless if config.match.filter else np.ones_like(pairless)
    )
    with progress_bar("prototypes", 3 * len(shards), "shards") as bar:
        sums = core.empty_sums(np.arange(len(matches.whole)), dim)
        for part in tasks.map_in_order(sum_shard, shards, store, run.folder, matches, config.pairs):
            core.add_sums(sums, part)
            bar.update()
        prototypes = core.means(sums)
        count = len(prototypes.match)
        caption = nearest("captions", shards, store, prototypes.text, bar)
        image = nearest("images", shards, store, prototypes.image, bar)
    of = prototypes.match
    run.folder.save_prototypes(
        pa.table(
            {
                "pair": np.arange(count, dtype=np.int32),
                "image_prototype": vector_array(prototypes.image),
                "text_prototype": vector_array(prototypes.text),
                "cosine": prototypes.cosine,
                "image_cluster": matches.image_cluster[of],
                "text_cluster": matches.text_cluster[of],
                "shared": table.column("shared").to_numpy()[of],
                "member_norm": sums.image_norm[of] / sums.image_count[of],
                "caption": caption["caption"],
                "caption_shard": caption["shard"],
                "caption_key": caption["key"],
                "caption_cosine": caption["cosine"],
                "nearest_shard": image["shard"],
                "nearest_key": image["key"],
                "nearest_cosine": image["cosine"],
                "members": [sums.members[match] for match in of],
            },
            schema=prototype_schema(dim),
        )
    )
    return {
        "prototypes": count,
        "empty_couples": len(matches.whole) - count,
        "duplicate_captions": count - len(set(caption["caption"])),
        "mean_cosine": float(prototypes.cosine.mean()) if count else 0.0,
    }

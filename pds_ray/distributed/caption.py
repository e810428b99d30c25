"""Captions of the pictures: one task embeds them, then each takes the nearest caption of the source."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from PIL import Image

from pds_ray import catalog
from pds_ray.config import EmbedConfig, RunConfig
from pds_ray.distributed import pools, process
from pds_ray.distributed.nearest import nearest
from pds_ray.encoders.base import EncoderInfo
from pds_ray.stages.embed import embed_pictures
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.schemas import CHOSEN_CAPTION_SCHEMA
from pds_ray.store.storage import side_by_side
from pds_ray.telemetry.progress import progress_bar


def _embed(pairs: int, info: EncoderInfo, config: EmbedConfig, run: RunFolder) -> np.ndarray:
    encoder = process.load_model(catalog.load_encoder, info, config.precision)
    files = side_by_side(run.images.read_bytes, map(run.image_name, range(pairs)))
    pictures = (Image.open(io.BytesIO(file)) for file in files)
    return embed_pictures(pictures, encoder, info.preprocess, config.batch_size)


def caption(
    shards: list[str], info: EncoderInfo, store: EmbeddingStore, run: RunFolder, config: RunConfig
) -> dict[str, Any]:
    """Writes captions.parquet: the caption of each pair. Returns how many differ from the one that was retrieved.

    `config.embed.precision` is that of the store.
    """
    prototypes = run.prototypes()
    pairs = prototypes.num_rows
    if config.caption.nearest_to == "prototype":
        columns = ("pair", "caption", "caption_shard", "caption_key", "caption_cosine")
        run.save_captions(prototypes.select(columns))
        return {"pairs": pairs, "changed": 0}
    with progress_bar("caption", 1 + len(shards), "steps") as bar:
        actors = pools.pool(config.ray.embed_actors)
        settings = EmbedConfig(precision=config.embed.precision)
        pictures = ray.get(pools.start_model(actors, _embed, pairs, info, settings, run))
        bar.update()
        found = nearest("captions", shards, store, pictures, bar)
    chosen = found["caption"]
    run.save_captions(
        pa.table(
            {
                "pair": np.arange(pairs, dtype=np.int32),
                "caption": chosen,
                "caption_shard": found["shard"],
                "caption_key": found["key"],
                "caption_cosine": found["cosine"],
            },
            schema=CHOSEN_CAPTION_SCHEMA,
        )
    )
    retrieved = prototypes.column("caption").to_pylist()
    return {
        "pairs": pairs,
        "changed": sum(new != old for new, old in zip(chosen, retrieved, strict=True)),
        "duplicate_captions": pairs - len(set(chosen)),
    }

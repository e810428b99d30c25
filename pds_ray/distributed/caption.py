"""Captions of the images: they are embedded; each takes the nearest caption of the source."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from PIL import Image

from pds_ray import catalog
from pds_ray.config import EmbedConfig
from pds_ray.distributed import pools, process
from pds_ray.distributed.in_flight import InFlight
from pds_ray.distributed.nearest import named, nearest
from pds_ray.distributed.nearest_captions import nearest_captions
from pds_ray.distributed.sizes import ENCODED_TOGETHER
from pds_ray.encoders.base import EncoderInfo
from pds_ray.methods.base import Counts, Run
from pds_ray.stages import captions as core
from pds_ray.stages.embed import embed_images
from pds_ray.stages.prototypes import Nearest
from pds_ray.stages.vectors import normalized
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.schemas import CHOSEN_CAPTION_SCHEMA
from pds_ray.store.storage import side_by_side
from pds_ray.telemetry.progress import progress_bar

IMAGES = "images"


def _embed(
    pairs: range, info: EncoderInfo, config: EmbedConfig, folder: RunFolder, in_flight: InFlight
) -> np.ndarray:
    with in_flight.doing("the encoder to load"):
        encoder = process.load_model(catalog.load_encoder, info, config.precision)
    files = side_by_side(folder.images.read_bytes, map(folder.image_name, pairs))
    images = (Image.open(io.BytesIO(file)) for file in files)
    with in_flight.doing("the images to be encoded", f"{IMAGES}/{pairs.start}") as doing:
        return embed_images(
            images,
            encoder,
            info.preprocess,
            config.batch_size,
            lambda rows: doing.reach(doing.done + rows),
        )


def _parts(pairs: int, workers: int, batch: int) -> list[range]:
    """Cut the images into a part per worker, of ENCODED_TOGETHER images at least.

    Each part has whole batches, so that last bits do not depend on the number of parts.
    """
    count = min(workers, math.ceil(pairs / ENCODED_TOGETHER))
    each = math.ceil(pairs / count / batch) * batch
    return [range(start, min(start + each, pairs)) for start in range(0, pairs, each)]


def caption(run: Run) -> Counts:
    """Write captions.parquet, the caption of each pair; return how many were not retrieved."""
    config, folder = run.config, run.folder
    prototypes = folder.prototype_facts()
    pairs = prototypes.num_rows
    if config.caption.nearest_to == "prototype":
        columns = ("pair", "caption", "caption_shard", "caption_key", "caption_cosine")
        folder.save_captions(prototypes.select(columns))
        return {"pairs": pairs, "changed": 0}
    with (
        InFlight() as in_flight,
        progress_bar("caption", pairs + len(run.shard_names), "steps") as bar,
    ):
        bar.follow(in_flight.reports())
        actors = pools.pool(config.ray.embed_actors)
        # the images are compared with what is in the store, hence embedded in its precision
        precision = next(iter(run.embedded.values()))["precision"]
        settings = EmbedConfig(precision=precision)
        embedding = (run.encoder, settings, folder, in_flight)
        parts = [
            pools.start_model(actors, _embed, part, *embedding)
            for part in _parts(pairs, actors.workers, settings.batch_size)
        ]
        images = np.concatenate(ray.get(parts))
        core.check_images(images)
        bar.follow(None)
        bar.update(pairs)
        if config.caption.nearest_to == "both":
            text = folder.prototype_vectors("text").gathered()
            # the sum of both cosines is the product with the sum of both unit vectors
            queries = (normalized(images) + normalized(text)).astype(np.float32)
        else:
            queries = images
        if config.caption.round_trip:
            found, counts = _accepted(run, *nearest_captions(run, queries, images, bar))
        else:
            found, counts = nearest(run, {"captions": queries}, bar)["captions"], {}
    chosen = found["caption"]
    folder.save_captions(
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
        **counts,
    }


def _accepted(run: Run, lists: core.TopRows, finds: core.Finds) -> tuple[dict[str, Any], Counts]:
    """Return the columns of the captions that are chosen from lists, and how many are accepted."""
    places, accepted = core.choose(finds)
    chosen = np.arange(len(places)), places
    rows = Nearest(lists.cosine[chosen], lists.shard[chosen], lists.row[chosen])
    return named(run, {"captions": rows})["captions"], {"round_trip": int(accepted.sum())}

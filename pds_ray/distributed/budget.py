"""The choice for a budget: tasks read a sample and save it in each way; one task looks at it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import ray
import torch
from PIL import Image

from pds_ray import catalog
from pds_ray.config import DecodeConfig, EmbedConfig
from pds_ray.decoders.base import DecodeBatch
from pds_ray.distributed import pools, process, session, tasks
from pds_ray.distributed.in_flight import InFlight
from pds_ray.encoders.base import EncoderInfo
from pds_ray.methods.base import Counts, Run
from pds_ray.modalities.image import resized
from pds_ray.sources.base import Source
from pds_ray.stages import budget as core
from pds_ray.stages.embed import embed_images
from pds_ray.stages.vectors import normalized
from pds_ray.store.distilled_set import caption_bytes
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.schemas import embeddings
from pds_ray.telemetry.progress import progress_bar
from pds_ray.training.recall import recalls

IMAGES = "images"


@dataclass(frozen=True)
class Sample:
    """Some images of the source with all of their captions."""

    pixels: np.ndarray
    """uint8 [n, S, S, 3], S the largest side."""
    captions: np.ndarray
    """Their embeddings at unit length, float32 [m, d]."""
    owner: np.ndarray
    """The image of each caption, int64 [m]."""
    caption_bytes: np.ndarray
    """Bytes of each caption with its line end, int64 [m]."""

    def images(self) -> Iterator[Image.Image]:
        return map(Image.fromarray, self.pixels)


def budget(run: Run) -> Counts:
    """Write budget.json: pairs, side, format and quality for the budget; return what was chosen."""
    config = run.config
    full = config.decode.image_size or run.encoder.preprocess.size
    counted = {shard: marker["images"] for shard, marker in run.embedded.items()}
    places = core.draw(counted, config.seed)
    ways = core.savings(full, config.decode)
    images = sum(len(rows) for _, rows in places)
    with progress_bar("budget", images * (1 + len(ways)), "images") as bar:
        parts = []
        for part in tasks.map_in_order(_read, places, run.source, run.store, run.encoder, full):
            parts.append(part)
            bar.update(len(part.pixels))
        sample = _joined(parts)
        shared = ray.put(sample)
        sizes = {}
        for way, size in zip(ways, tasks.map_in_order(_mean_bytes, ways, sample), strict=True):
            sizes[way] = size
            bar.update(images)
        room = core.Room(
            budget=config.budget_bytes,
            pairs=config.pairs,
            there=_there(run),
            caption_bytes=float(sample.caption_bytes.mean()),
        )
        choice = _choose(run, room, sizes, shared)
    run.folder.save_budget(core.record(room, images, sizes, choice))
    chosen = {name.rpartition(".")[2]: value for name, value in choice.options().items()}
    about = {"budget": room.budget, "sampled": images, "bytes_per_image": sizes[choice.saving]}
    return {**about, "bytes_per_caption": room.caption_bytes, **chosen}


def _there(run: Run) -> int:
    """Return how many pairs the stages so far leave to make or choose."""
    if "prune" in run.method.names:
        kept = run.counts("prune")
        return min(kept["images_kept"], kept["kept"])
    return run.counts("embed")["images"]


def _read(
    place: tuple[str, np.ndarray],
    source: Source,
    store: EmbeddingStore,
    encoder: EncoderInfo,
    side: int,
) -> Sample:
    """Read some images of a shard as squares, with what the store has of their captions."""
    shard, rows = place
    keys = store.images(shard, ["key"]).column("key").take(rows).to_pylist()
    config = DecodeConfig(decoder="nearest")
    decoder = catalog.load_decoder(catalog.describe_decoder(config, encoder), config, source)
    nothing = np.zeros((len(rows), 0), np.float32)
    batch = DecodeBatch(nothing, [], [], [(shard, key) for key in keys])
    pixels = [np.asarray(resized(image, side)) for image in decoder.decode(batch)]
    captions = store.captions(shard, ["image_row", "caption", "embedding"])
    image_row = captions.column("image_row").to_numpy()
    mine = np.flatnonzero(np.isin(image_row, rows))
    texts = captions.column("caption").take(mine).to_pylist()
    return Sample(
        np.stack(pixels),
        normalized(embeddings(captions.take(mine))),
        np.searchsorted(rows, image_row[mine]),
        np.array([caption_bytes(text) for text in texts], np.int64),
    )


def _joined(parts: list[Sample]) -> Sample:
    starts = np.cumsum([0, *(len(part.pixels) for part in parts)])
    return Sample(
        np.concatenate([part.pixels for part in parts]),
        np.concatenate([part.captions for part in parts]),
        np.concatenate([part.owner + start for part, start in zip(parts, starts, strict=False)]),
        np.concatenate([part.caption_bytes for part in parts]),
    )


def _mean_bytes(way: core.Saving, sample: Sample) -> float:
    return core.mean_bytes(sample.images(), way)


def _choose(
    run: Run, room: core.Room, sizes: dict[core.Saving, float], sample: ray.ObjectRef
) -> core.Choice:
    # the images are compared with what is in the store, hence embedded in its precision
    precision = next(iter(run.embedded.values()))["precision"]
    settings = EmbedConfig(precision=precision)
    actors = pools.pool(run.config.ray.embed_actors)
    with InFlight() as in_flight, session.unwrapped_errors():
        looking = (_look, run.encoder, settings, room, sizes, sample, in_flight)
        return ray.get(pools.start_model(actors, *looking))


def _look(
    info: EncoderInfo,
    config: EmbedConfig,
    room: core.Room,
    sizes: dict[core.Saving, float],
    sample: Sample,
    in_flight: InFlight,
) -> core.Choice:
    with in_flight.doing("the encoder to load"):
        encoder = process.load_model(catalog.load_encoder, info, config.precision)
    # copies: arrays of the object store are read-only
    captions, owner = (torch.tensor(each) for each in (sample.captions, sample.owner))

    def r_mean(way: core.Saving) -> float:
        with in_flight.doing(f"the images saved as {way} to be encoded", IMAGES):
            images = (core.seen(image, way) for image in sample.images())
            rows = embed_images(images, encoder, info.preprocess, config.batch_size)
        return recalls(torch.from_numpy(normalized(rows)), captions, owner)["r_mean"]

    return core.choose(room, sizes, r_mean)

"""The choice for a budget: tasks read a sample and save it in each way; one task looks at it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import ray
from PIL import Image

from pds_ray import catalog
from pds_ray.config import DecodeConfig, EmbedConfig
from pds_ray.config import replace as configure
from pds_ray.decoders.base import DecodeBatch, DecoderInfo
from pds_ray.distributed import pools, process, session, tasks
from pds_ray.distributed.in_flight import InFlight
from pds_ray.encoders.base import EncoderInfo
from pds_ray.methods.base import Counts, Run
from pds_ray.modalities.image import resized
from pds_ray.sources.base import Source
from pds_ray.stages import budget as core
from pds_ray.stages.embed import embed_images
from pds_ray.stages.synthesize import pair_seed
from pds_ray.stages.vectors import normalized
from pds_ray.store.distilled_set import caption_bytes
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.schemas import embeddings
from pds_ray.telemetry.progress import progress_bar

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
    texts: list[str]
    """The captions."""
    vectors: np.ndarray
    """The images' embeddings, not normalised, float32 [n, d]."""
    places: list[tuple[str, str]]
    """Shard and key of each image."""
    rival_images: np.ndarray
    """Embeddings of other images at unit length, float32 [R, d]."""
    rival_captions: np.ndarray
    """Embeddings of a caption of each of these at unit length, float32 [R, d]."""

    def images(self) -> Iterator[Image.Image]:
        return map(Image.fromarray, self.pixels)


def budget(run: Run) -> Counts:
    """Write budget.json: pairs, side, format and quality for the budget; return what was chosen."""
    config = run.config
    full = config.decode.image_size or run.encoder.preprocess.size
    counted = {shard: marker["images"] for shard, marker in run.embedded.items()}
    places = core.draw(counted, config.seed)
    ways = core.savings(full, config.decode)
    images = sum(len(rows) for _, rows, _ in places)
    with progress_bar("budget", images * (1 + len(ways)), "images") as bar:
        parts = []
        for part in tasks.map_in_order(_read, places, run.source, run.store, run.encoder, full):
            parts.append(part)
            bar.update(len(part.pixels))
        sample = _joined(parts)
        shared = ray.put(sample)
        shown = sample.pixels if run.decoder.dim is None else _drawn(run, sample, full)
        sizes = {}
        for way, size in zip(ways, tasks.map_in_order(_mean_bytes, ways, shown), strict=True):
            sizes[way] = size
            bar.update(images)
        room = core.Room(
            budget=config.budget_bytes,
            pairs=config.pairs,
            there=_there(run),
            caption_bytes=float(np.mean([caption_bytes(text) for text in sample.texts]))
            * (1 + config.extras.captions),
        )
        choice = _choose(run, room, sizes, shared)
    run.folder.save_budget(core.record(room, images, len(shown), sizes, choice))
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
    place: tuple[str, np.ndarray, np.ndarray],
    source: Source,
    store: EmbeddingStore,
    encoder: EncoderInfo,
    side: int,
) -> Sample:
    """Read some images of a shard as squares, with what the store has of their captions."""
    shard, rows, rivals = place
    images = store.images(shard, ["key", "embedding"])
    table = images.take(rows)
    places = [(shard, key) for key in table.column("key").to_pylist()]
    config = DecodeConfig(decoder="nearest")
    decoder = catalog.load_decoder(catalog.describe_decoder(config, encoder), config, source)
    nothing = np.zeros((len(rows), 0), np.float32)
    batch = DecodeBatch(nothing, [], [], places)
    pixels = [np.asarray(resized(image, side)) for image in decoder.decode(batch)]
    captions = store.captions(shard, ["image_row", "caption", "embedding"])
    image_row = captions.column("image_row").to_numpy()
    mine = np.flatnonzero(np.isin(image_row, rows))
    _, first = np.unique(image_row, return_index=True)  # every image has a caption
    return Sample(
        np.stack(pixels),
        normalized(embeddings(captions.take(mine))),
        np.searchsorted(rows, image_row[mine]),
        captions.column("caption").take(mine).to_pylist(),
        embeddings(table),
        places,
        normalized(embeddings(images.take(rivals))),
        normalized(embeddings(captions.take(first[rivals]))),
    )


def _joined(parts: list[Sample]) -> Sample:
    starts = np.cumsum([0, *(len(part.pixels) for part in parts)])
    return Sample(
        np.concatenate([part.pixels for part in parts]),
        np.concatenate([part.captions for part in parts]),
        np.concatenate([part.owner + start for part, start in zip(parts, starts, strict=False)]),
        [text for part in parts for text in part.texts],
        np.concatenate([part.vectors for part in parts]),
        [place for part in parts for place in part.places],
        np.concatenate([part.rival_images for part in parts]),
        np.concatenate([part.rival_captions for part in parts]),
    )


def _drawn(run: Run, sample: Sample, side: int) -> np.ndarray:
    """Return some images of the sample as the decoder draws them, uint8 [DRAWN, side, side, 3].

    Their bytes may differ from those of real ones.
    """
    actors = pools.pool(run.config.ray.decode_actors)
    precision = pools.precision(run.config.decode.precision, actors, "fp16")
    config = configure(run.config, {"decode.precision": precision}).decode
    rows = np.arange(len(sample.places))[:: max(1, len(sample.places) // core.DRAWN)][: core.DRAWN]
    prompts = [sample.texts[int(np.argmax(sample.owner == row))] for row in rows]
    seeds = [pair_seed(run.config.seed, int(row)) for row in rows]
    size = config.batch_size
    batches = [
        DecodeBatch(
            sample.vectors[rows[start : start + size]],
            prompts[start : start + size],
            seeds[start : start + size],
            [sample.places[row] for row in rows[start : start + size]],
        )
        for start in range(0, len(rows), size)
    ]
    with InFlight() as in_flight, session.unwrapped_errors():
        drawing = (_draw, run.decoder, config, run.source, batches, side, in_flight)
        return ray.get(pools.start_model(actors, *drawing))


def _draw(
    info: DecoderInfo,
    config: DecodeConfig,
    source: Source,
    batches: list[DecodeBatch],
    side: int,
    in_flight: InFlight,
) -> np.ndarray:
    with in_flight.doing("the decoder to load"):
        decoder = process.load_model(catalog.load_decoder, info, config, source)
    with in_flight.doing("some images to be drawn", IMAGES):
        images = (image for batch in batches for image in decoder.decode(batch))
        return np.stack([np.asarray(resized(image, side)) for image in images])


def _mean_bytes(way: core.Saving, pixels: np.ndarray) -> float:
    return core.mean_bytes(map(Image.fromarray, pixels), way)


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

    def r_mean(way: core.Saving) -> float:
        with in_flight.doing(f"the images saved as {way} to be encoded", IMAGES):
            images = (core.seen(image, way) for image in sample.images())
            rows = normalized(embed_images(images, encoder, info.preprocess, config.batch_size))
        rivals = (sample.rival_images, sample.rival_captions)
        return core.found(rows, sample.captions, sample.owner, *rivals)

    return core.choose(room, sizes, r_mean)

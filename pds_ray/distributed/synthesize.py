"""Synthesis on Ray Data: chunks of prototypes go to a pool of decoders, which write the images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import TypeVar

import pyarrow as pa
import ray
from PIL import Image

from pds_ray import catalog
from pds_ray.config import ConfigError, RunConfig
from pds_ray.config import replace as configure
from pds_ray.decoders.base import DecoderInfo
from pds_ray.distributed import metrics, pools, process
from pds_ray.distributed.in_flight import Doing, InFlight
from pds_ray.distributed.sizes import LOOKED_UP_TOGETHER
from pds_ray.encoders.base import EncoderInfo
from pds_ray.methods.base import Counts, Run
from pds_ray.methods.pds import judged
from pds_ray.modalities.image import encode_image
from pds_ray.sources.base import Source
from pds_ray.stages import candidates
from pds_ray.stages import synthesize as core
from pds_ray.store.manifest import fingerprint
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.schemas import PROTOTYPE_VECTORS
from pds_ray.store.storage import side_by_side
from pds_ray.telemetry.progress import progress_bar

Item = TypeVar("Item")


class SynthesizeWorker:
    """Actor that loads the decoder once, decodes chunks and writes the images that are missing."""

    def __init__(
        self,
        info: DecoderInfo,
        config: RunConfig,
        source: Source,
        folder: RunFolder,
        in_flight: InFlight,
        judging: tuple[EncoderInfo, str] | None = None,
    ) -> None:
        """Load the decoder and, to choose among candidates, the encoder, given with precision."""
        is_model = info.dim is not None  # it takes embeddings
        load = (
            partial(process.load_model, catalog.load_decoder) if is_model else catalog.load_decoder
        )
        with in_flight.doing("the decoder to load"):
            self.decoder = process.keeping_error(load, info, config.decode, source)
        self.config = config
        self.source = source
        self.folder = folder
        self.in_flight = in_flight
        self.prototypes = folder.prototype_rows(core.COLUMNS)
        self.mean = None
        if config.decode.condition == "caption":
            parts = folder.prototype_parts(["image_prototype", "member_norm"])
            self.mean = core.mean_prototype(parts, config.decode)
        self.judge = None
        if judging:
            with in_flight.doing("the encoder to load"):
                self.judge = process.keeping_error(self._load_judge, *judging)
        self.free_since = time.monotonic()

    def _load_judge(self, info: EncoderInfo, precision: str) -> candidates.Judge:
        encoder = process.load_model(catalog.load_encoder, info, precision)
        prototypes = self.folder.prototypes(list(PROTOTYPE_VECTORS))
        return candidates.Judge(encoder, info.preprocess, prototypes, self.config.decode)

    def __call__(self, batch: pa.Table) -> pa.Table:
        (chunk,) = batch.to_pylist()
        what = f"the images from {self.folder.image_name(chunk['start'])} on"
        with self.in_flight.doing(what, str(chunk["start"])) as doing:
            written, busy_s = self._write(
                range(chunk["start"], chunk["stop"]), chunk["lacks"], doing
            )
        now = time.monotonic()
        idle_s, self.free_since = now - self.free_since - busy_s, now
        return pa.table(
            {
                "start": [chunk["start"]],
                "written": [written],
                "busy_s": [busy_s],
                "idle_s": [idle_s],
            }
        )

    def _write(self, pairs: range, lacks: int, doing: Doing) -> tuple[int, float]:
        """Decode a chunk that lacks some images and write those, while others are decoded.

        Returns how many were written, and the seconds that decoding took.
        """

        def tell(share: float) -> None:
            doing.reach(min(1.0, share) * lacks)

        made: Iterator[tuple[Image.Image, candidates.Choice | None]]
        if self.judge is None:
            made = ((image, None) for image in self._decode(pairs, tell))
        else:
            chosen = self._choose(self.judge(), pairs, tell)
            made = ((best.image, best.choice) for best in chosen)
        timed = _Timed(made)
        written = 0
        for new in side_by_side(self._save, zip(pairs, timed, strict=True)):
            written += new
            doing.reach(max(written, doing.done))  # a decoder that works image by image
        return written, timed.seconds

    def _save(self, item: tuple[int, tuple[Image.Image, candidates.Choice | None]]) -> bool:
        """Write the image of a pair, unless it is there; return whether it was not."""
        pair, (image, choice) = item
        name = self.folder.image_name(pair)
        if self.folder.images.exists(name) and self._recorded(pair, choice):
            return False
        if choice:
            self.folder.save_choice(asdict(choice))
        data = encode_image(image, self.config.decode.format, self.config.decode.quality)
        self.folder.images.write_bytes(name, data)
        return True

    def _recorded(self, pair: int, choice: candidates.Choice | None) -> bool:
        return choice is None or self.folder.images.exists(self.folder.choice_name(pair))

    def _decode(
        self, pairs: range, tell: Callable[[float], object], candidate: int = 0
    ) -> Iterator[Image.Image]:
        config, rows = self.config.decode, self.prototypes.rows(pairs)
        request = core.make_batch(rows, pairs, self.config.seed, config, tell, candidate, self.mean)
        return core.synthesize_chunk(self.decoder(), request, config)

    def _choose(
        self, judge: candidates.Judge, pairs: range, tell: Callable[[float], object]
    ) -> list[candidates.Judged]:
        """Return the best image of each pair of a chunk."""
        config = self.config.decode
        best: list[candidates.Judged] = []
        for number in range(config.candidates):

            def part(share: float, number: int = number) -> None:
                tell((number + min(1.0, share)) / config.candidates)

            drawn = self._decode(pairs, part, number)
            level = config.levels[number % len(config.levels)]
            found = judge.judge(pairs, drawn, candidates.SYNTHETIC, number, level)
            best = candidates.better(best, found) if best else found
        if config.real_fallback:
            real = judge.judge(pairs, self._real_images(pairs), candidates.REAL)
            best = candidates.fallen_back(best, real, config.real_margin)
        return best

    def _real_images(self, pairs: range) -> Iterator[Image.Image]:
        """Return the real image nearest to the image prototype of each pair."""
        config = replace(self.config.decode, decoder="nearest")
        nearest = catalog.load_decoder(DecoderInfo("nearest", None, "nearest"), config, self.source)
        request = core.make_batch(self.prototypes.rows(pairs), pairs, self.config.seed, config)
        return core.synthesize_chunk(nearest, request, config)


class _Timed(Iterator[Item]):
    """An iterator that adds up the seconds for which it is waited for."""

    def __init__(self, values: Iterator[Item]) -> None:
        self.seconds = 0.0
        self._values = values

    def __next__(self) -> Item:
        began = time.monotonic()
        try:
            return next(self._values)
        finally:
            self.seconds += time.monotonic() - began


def synthesize(run: Run) -> Counts:
    """Decode every pair whose image is not there; return how many were made and how many found."""
    # settled once, lest actors on unlike machines differ
    precision = pools.precision(run.config.decode.precision, _pool(run), "fp16")
    _keep_images_alike(run, precision)
    return _decode(run, configure(run.config, {"decode.precision": precision}))


def _decode(run: Run, config: RunConfig) -> Counts:
    """Decode what is missing with the settled `config`."""
    folder = run.folder
    pairs = folder.pair_count()
    folder.images.sweep()
    there = folder.images_done(pairs, judged(run))
    lacks = {
        chunk: sum(folder.image_name(pair) not in there for pair in chunk)
        for chunk in core.chunks(pairs, _together(run))
    }
    todo = [chunk for chunk, lacking in lacks.items() if lacking]
    found = sum(folder.image_name(pair) in there for pair in range(pairs))
    made, decoders = 0, metrics.ActorTime("decode")
    if todo:
        ended = set[str]()
        with (
            InFlight() as in_flight,
            progress_bar("decode", pairs, "images", found) as bar,
        ):
            bar.follow(in_flight.reports(ended.__contains__))
            dataset = ray.data.from_items(
                [
                    {"start": chunk.start, "stop": chunk.stop, "lacks": lacks[chunk]}
                    for chunk in todo
                ],
                override_num_blocks=len(todo),
            ).map_batches(
                SynthesizeWorker,
                fn_constructor_args=(
                    run.decoder,
                    config,
                    run.source,
                    folder,
                    in_flight,
                    _judging(run),
                ),
                batch_size=1,
                batch_format="pyarrow",
                **pools.actor_options(_pool(run)),
            )
            for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
                for row in pa.table(batch).to_pylist():
                    made += row["written"]
                    ended.add(str(row["start"]))
                    decoders.add(row)
                    metrics.count("pds_ray_pictures_decoded_total", row["written"])
                    bar.update(row["written"])
    return {
        "images": pairs,
        "made": made,
        "found": found,
        **(_choices(run) if judged(run) else {}),
        **decoders.counts("decoder"),
    }


def _judging(run: Run) -> tuple[EncoderInfo, str] | None:
    """Return the encoder that chooses among candidates, with its precision; None if none does."""
    if not judged(run):
        return None
    # its embeddings are compared with prototypes of what is in the store
    return run.encoder, next(iter(run.embedded.values()))["precision"]


def _choices(run: Run) -> Counts:
    """Write choices.parquet; return how many images are real, and how many find their prototype."""
    choices = run.folder.gather_choices(run.folder.pair_count())
    origins = choices.column("origin").to_pylist()
    return {
        "real": origins.count(candidates.REAL),
        "round_trip": sum(choices.column("round_trip").to_pylist()),
    }


def _together(run: Run) -> int:
    """Return the number of images of a chunk: real ones are looked up many at once."""
    together = run.config.decode.batch_size
    return together if run.decoder.dim is not None else max(together, LOOKED_UP_TOGETHER)


def _pool(run: Run) -> pools.Pool:
    return pools.pool(run.config.ray.decode_actors, on_gpu=run.decoder.dim is not None)


def _keep_images_alike(run: Run, precision: str) -> None:
    """Delete the images of another configuration or of other prototypes.

    Raises ConfigError if existing images were decoded with another precision or batch size.
    """
    folder, manifest = run.folder, run.manifest
    before = run.method.before("decode").name
    chosen = [folder.hashes(stage.name) for stage in run.method.stages if stage.settles]
    wanted = fingerprint(run.fingerprints["decode"], folder.hashes(before), *chosen)
    batch = run.config.decode.batch_size
    made = f"{precision}, batches of {batch}" if run.decoder.dim is not None else "no model"
    if manifest.data.get("images_fingerprint") != wanted:
        folder.images.delete_all()
        manifest.update(images_fingerprint=wanted, images_made=made)
    begun = manifest.data.get("images_made", made)
    if begun != made and not folder.image_names():
        manifest.update(images_made=made)
    elif begun != made:  # last bits depend on both: a set must not be made of two kinds of images
        raise ConfigError(
            f"the images in {folder.folder.shown} were begun in {begun}, here they would go on in "
            f"{made}; go on as they were begun, or say --decode.precision or --decode.batch_size, "
            "and give another --out"
        )

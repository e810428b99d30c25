"""Decoding on Ray with real images: those that are there are kept, missing ones come back alike."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pds_ray import catalog
from pds_ray.config import DecodeConfig, EmbedConfig, RunConfig
from pds_ray.config import replace as configure
from pds_ray.distributed.synthesize import synthesize
from pds_ray.sources.base import Sample
from pds_ray.sources.scenes import ScenesSource
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.schemas import prototype_schema, vector_array
from tests.support.stage_run import stage_run

pytestmark = pytest.mark.ray


def test_images_are_made_once_and_remade_alike(run_folder: RunFolder) -> None:
    source = ScenesSource("scenes:40:0:0:25")
    samples = {
        (shard.name, item.key): item.image
        for shard in source.shards()
        for item in source.read(shard)
    }
    wanted = list(samples)[2:40:4]
    count = len(wanted)
    columns = {
        name: pa.nulls(count, field.type)
        for name, field in zip(prototype_schema(4).names, prototype_schema(4), strict=True)
    }
    columns |= {
        "pair": pa.array(range(count), pa.int32()),
        "image_prototype": vector_array(np.ones((count, 4))),
        "caption": pa.array(["x"] * count),
        "nearest_shard": pa.array([shard for shard, _ in wanted]),
        "nearest_key": pa.array([key for _, key in wanted]),
    }
    run_folder.save_prototypes(pa.table(columns, schema=prototype_schema(4)))
    decode = DecodeConfig(decoder="nearest", batch_size=4, image_size=0)
    config = RunConfig(embed=EmbedConfig(encoder="demo"), decode=decode)
    info = catalog.describe_decoder(decode, catalog.describe_encoder(config.embed))

    store = run_folder.store(None, "")
    run = stage_run(store, run_folder, config, source=source, decoder=info)
    found = synthesize(run)
    assert (found["images"], found["made"], found["found"]) == (count, count, 0)
    assert found["decoder_busy_s"] > 0
    assert found["decoder_idle_s"] > 0
    folder = Path(run_folder.images.path)
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    for pair, place in enumerate(wanted):
        made = Image.open(io.BytesIO(first[run_folder.image_name(pair)]))
        assert np.array_equal(
            np.asarray(made), np.asarray(Image.open(io.BytesIO(samples[place])).convert("RGB"))
        )

    (folder / run_folder.image_name(6)).unlink()
    (folder / "000001.png.0123abcd.part").write_bytes(b"left behind by a killed worker")
    kept = folder / run_folder.image_name(5)
    stamp = kept.stat().st_mtime_ns
    again = synthesize(run)
    assert (again["images"], again["made"], again["found"]) == (count, 1, count - 1)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first
    assert kept.stat().st_mtime_ns == stamp


@pytest.mark.long
def test_the_best_candidate_is_kept_and_a_real_image_where_all_fail(run_folder: RunFolder) -> None:
    """Scores are those of the images that were written, and survive another cut into batches."""
    source = ScenesSource("scenes:12:3")
    (shard,) = source.shards()
    samples = [item for item in source.read(shard) if isinstance(item, Sample)][:4]
    decode = DecodeConfig(
        decoder="unclip",
        format="png",
        steps=2,
        candidates=2,
        real_fallback=True,
        real_margin=0.3,
        batch_size=4,
        image_size=0,
    )
    config = RunConfig(embed=EmbedConfig(encoder="demo"), decode=decode)
    info = catalog.describe_encoder(config.embed)
    encoder = catalog.load_encoder(info, "fp32")
    real = [Image.open(io.BytesIO(sample.image)).convert("RGB") for sample in samples]
    vectors = encoder.encode_images(np.stack([info.preprocess(image) for image in real]))
    texts = encoder.encode_captions([sample.captions[0] for sample in samples])
    schema = prototype_schema(info.dim)
    columns = {field.name: pa.nulls(len(samples), field.type) for field in schema}
    columns |= {
        "pair": pa.array(range(len(samples)), pa.int32()),
        "image_prototype": vector_array(vectors),
        "text_prototype": vector_array(texts),
        "caption": pa.array([sample.captions[0] for sample in samples]),
        "nearest_shard": pa.array([shard.name] * len(samples)),
        "nearest_key": pa.array([sample.key for sample in samples]),
    }
    run_folder.save_prototypes(pa.table(columns, schema=schema))
    run = stage_run(
        run_folder.store(None, ""),
        run_folder,
        config,
        source=source,
        encoder=info,
        decoder=catalog.describe_decoder(decode, info),
    )
    run = replace(run, embedded={shard.name: {"precision": "fp32"}})
    counts = synthesize(run)
    choices = run_folder.choices().to_pylist()
    assert counts["real"] == sum(row["origin"] == "real" for row in choices)
    for pair, row in enumerate(choices):
        image = Image.open(io.BytesIO(run_folder.images.read_bytes(run_folder.image_name(pair))))
        if row["origin"] == "real":
            assert np.array_equal(np.asarray(image), np.asarray(real[pair]))
            assert row["image_cosine"] == pytest.approx(1, abs=1e-3)
        vector = encoder.encode_images(np.stack([info.preprocess(image)]))[0]
        for name, other in (("image_cosine", vectors[pair]), ("text_cosine", texts[pair])):
            cosine = vector @ other / np.linalg.norm(vector) / np.linalg.norm(other)
            assert row[name] == pytest.approx(float(cosine), abs=1e-3)
        assert row["score"] == pytest.approx(row["image_cosine"] + row["text_cosine"], abs=1e-3)
        assert row["round_trip"] or row["origin"] == "real"
    assert {row["origin"] for row in choices} == {"real", "synthetic"}

    first = run_folder.images.read_bytes(run_folder.image_name(1))
    run_folder.images.delete(run_folder.choice_name(1))  # as a worker that was killed in between
    assert synthesize(run)["made"] == 1
    assert run_folder.images.read_bytes(run_folder.image_name(1)) == first
    assert run_folder.choices().to_pylist() == choices

    run_folder.images.delete_all()
    cut = replace(run, config=configure(config, {"decode.batch_size": 3}))
    synthesize(cut)
    again = run_folder.choices().to_pylist()
    assert [(row["origin"], row["candidate"]) for row in again] == [
        (row["origin"], row["candidate"]) for row in choices
    ]

"""Decoding on Ray with real images: those that are there are kept, missing ones come back alike."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pds_ray import catalog
from pds_ray.config import DecodeConfig, EmbedConfig, RunConfig
from pds_ray.distributed.synthesize import synthesize
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

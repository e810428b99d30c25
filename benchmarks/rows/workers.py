"""Row 10: what a second worker brings, and what a shard and an image cost beside their encoding."""

from __future__ import annotations

import io
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data import write_shards
from benchmarks.measure import Check, Found, Row, Runs, Task, median

ONE, TWO, OVERHEAD = "1 worker, 1 core", "2 workers, 2 cores", "null encoder"
SCENES = (4_000, 12_000)  # the difference counts: starting is no part of it; 1,000 are a shard, which one task reads
GRID = ((4, 8), (204, 8), (4, 5_008))  # shards, images in each


def _grid(task: Task) -> tuple[tuple[int, int], ...]:
    return ((2, 4), (6, 4), (2, 40)) if task.quick else GRID


def prepare(task: Task) -> Found:
    """Shards of tiny pictures."""
    from PIL import Image

    from benchmarks.null_encoder import SIDE

    encoded = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), "white").save(encoded, "JPEG")
    sample = {"jpg": encoded.getvalue(), "txt": b"a white square"}
    for number, (shards, images) in enumerate(_grid(task)):
        write_shards([sample] * (shards * images), task.data / str(number), images)
    return {}


def _embed_seconds(source_uri: str, info: Any, config: Any, folder: Path) -> float:
    from pds_ray import catalog
    from pds_ray.artifacts import EmbeddingStore
    from pds_ray.distributed.embed import embed
    from pds_ray.storage import Folder

    source = catalog.make_source(source_uri)
    store = EmbeddingStore(Folder(str(folder)))
    store.folder.create()
    began = time.perf_counter()
    embed(source, source.shards(), info, config, store)
    return time.perf_counter() - began


def _scale(task: Task, workers: int) -> Found:
    """A core and a worker more, nothing else."""
    cores = sorted(os.sched_getaffinity(0))[:workers]
    if len(cores) < workers:
        raise SystemExit(f"benchmarks: {workers} workers need as many cores")
    os.sched_setaffinity(0, cores)
    from pds_ray import catalog
    from pds_ray.config import RunConfig, replace
    from pds_ray.distributed import runtime

    ray = {"ray.num_cpus": workers, "ray.embed_workers": workers, "ray.object_store_gib": 0.5}
    config = replace(RunConfig(), {"embed.encoder": "demo", **ray})
    info = catalog.describe_encoder(config.embed)
    runtime.start(config.ray)
    sizes = (20, 60) if task.quick else SCENES
    _embed_seconds("scenes:16", info, config, task.out / "first")  # files are read for the first time, caches filled
    small, large = (_embed_seconds(f"scenes:{size}", info, config, task.out / str(size)) for size in sizes)
    runtime.stop()
    return {"seconds": large - small, "with_start": [small, large], "images": sizes[1] - sizes[0]}


def one_worker(task: Task) -> Found:
    return _scale(task, 1)


def two_workers(task: Task) -> Found:
    return _scale(task, 2)


def overhead(task: Task) -> Found:
    """Start, shards and images each have their price: three sizes give the three."""
    from benchmarks.null_encoder import describe
    from pds_ray.config import RunConfig, replace
    from pds_ray.distributed import runtime

    config = replace(RunConfig(), {"ray.object_store_gib": 0.5})
    grid = _grid(task)
    alone_ms = 1e3 * _seconds_without_ray(f"{task.data}/1/*.tar", config, task.out / "alone") / grid[1][0]
    runtime.start(config.ray)
    _embed_seconds(f"{task.data}/0/*.tar", describe(), config, task.out / "first")
    seconds = [
        _embed_seconds(f"{task.data}/{number}/*.tar", describe(), config, task.out / str(number))
        for number in range(len(grid))
    ]
    runtime.stop()
    start, shard, image = np.linalg.solve([[1, shards, shards * images] for shards, images in grid], seconds)
    costs = {"start_s": start, "shard_ms": 1e3 * shard, "image_ms": 1e3 * image, "alone_ms": alone_ms}
    return {"seconds": sum(seconds), **costs}


def _seconds_without_ray(source_uri: str, config: Any, folder: Path) -> float:
    """The same shards read, decoded, embedded and committed one after the other in this process."""
    from benchmarks.null_encoder import describe
    from pds_ray import catalog
    from pds_ray.artifacts import EmbeddingStore
    from pds_ray.stages.embed import embed_shard, shard_counts
    from pds_ray.storage import Folder

    source, info = catalog.make_source(source_uri), describe()
    encoder = catalog.load_encoder(info, "fp32")
    store = EmbeddingStore(Folder(str(folder)))
    store.folder.create()
    began = time.perf_counter()
    for shard in source.shards():
        tables = embed_shard(source, shard, encoder, info.preprocess, config.read, config.embed)
        store.commit(shard.name, *tables, {**shard_counts(*tables), "precision": "fp32"})
    return time.perf_counter() - began


def checks(runs: Runs, _: Found) -> list[Check]:
    efficiency = median(runs[ONE]) / median(runs[TWO]) / 2
    shard, image, alone = (median(runs[OVERHEAD], name) for name in ("shard_ms", "image_ms", "alone_ms"))
    images = GRID[1][1]
    return [
        Check("efficiency 0.85 of 2 workers", f"{efficiency:.2f}", efficiency >= 0.85),
        Check("under 30 ms a shard", f"{shard:.1f} ms", shard < 30),
        Check("", f"{alone:.1f} ms a shard of {images} images in one process without Ray", None),
        Check("under 0.3 ms an image", f"{image:.2f} ms", image < 0.3),
    ]


ROW = Row(
    10,
    "embedding 8,000 scenes with 1 and 2 workers; the cost of a shard and of an image with a null encoder",
    "ideal",
    {ONE: one_worker, TWO: two_workers, OVERHEAD: overhead},
    checks,
    prepare,
    notes="The first two: the difference of 12,000 and 4,000 scenes, so that starting is no part of it. The costs are "
    "by the clock, with all cores at work on 16-pixel JPEGs.",
)

"""Row 10: efficiency of a second worker, and the cost per shard and image without encoding."""

from __future__ import annotations

import io
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data import write_shards
from benchmarks.measure import Check, Found, Row, Runs, Task, median, median_and_range

ONE, TWO, OVERHEAD = "1 core, no Ray", "2 workers, 2 cores", "null encoder"
SCENES = (4_000, 12_000)  # the difference counts, without the start; one task reads 1,000
GRID = ((4, 8), (204, 8), (4, 5_008))  # shards, images in each


def _grid(task: Task) -> tuple[tuple[int, int], ...]:
    return ((2, 4), (6, 4), (2, 40)) if task.quick else GRID


def prepare(task: Task) -> Found:
    """Write shards of tiny images."""
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
    from pds_ray.distributed.embed import fill_store
    from tests.support.stage_run import embedding_run

    run = embedding_run(folder, catalog.make_source(source_uri), info, config)
    began = time.perf_counter()
    fill_store(run)
    return time.perf_counter() - began


def two_workers(task: Task) -> Found:
    """Embed on two cores, however many there are."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise SystemExit("benchmarks: two workers need as many cores")
    os.sched_setaffinity(0, cores)
    from pds_ray import catalog
    from pds_ray.config import RunConfig, replace
    from pds_ray.distributed import session

    ray = {"ray.num_cpus": 2, "ray.embed_workers": 2, "ray.object_store_gib": 0.5}
    config = replace(RunConfig(), {"embed.encoder": "demo", **ray})
    info = catalog.describe_encoder(config.embed)
    session.start(config.ray)
    sizes = (20, 60) if task.quick else SCENES
    _embed_seconds("scenes:16", info, config, task.out / "first")  # fills caches of files
    small, large = (
        _embed_seconds(f"scenes:{size}", info, config, task.out / str(size)) for size in sizes
    )
    session.stop()
    return {"seconds": large - small, "with_start": [small, large], "images": sizes[1] - sizes[0]}


def one_core(task: Task) -> Found:
    """Embed as many scenes as count for the others, shard after shard with one thread."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    import torch

    from pds_ray import catalog
    from pds_ray.config import RunConfig, replace

    torch.set_num_threads(1)
    config = replace(RunConfig(), {"embed.encoder": "demo"})
    info = catalog.describe_encoder(config.embed)
    _seconds_without_ray("scenes:16", info, config, task.out / "first")
    images = 40 if task.quick else SCENES[1] - SCENES[0]
    return {
        "seconds": _seconds_without_ray(f"scenes:{images}", info, config, task.out / "alone"),
        "images": images,
    }


def overhead(task: Task) -> Found:
    """Solve for the costs of start, shard and image from the seconds of three sizes."""
    from benchmarks.null_encoder import describe
    from pds_ray.config import RunConfig, replace
    from pds_ray.distributed import session

    config = replace(RunConfig(), {"ray.object_store_gib": 0.5})
    grid = _grid(task)
    _seconds_without_ray(f"{task.data}/0/*.tar", describe(), config, task.out / "alone-first")
    alone = [
        _seconds_without_ray(
            f"{task.data}/{number}/*.tar", describe(), config, task.out / f"alone-{number}"
        )
        for number in range(len(grid))
    ]
    session.start(config.ray)
    _embed_seconds(f"{task.data}/0/*.tar", describe(), config, task.out / "first")
    seconds = [
        _embed_seconds(f"{task.data}/{number}/*.tar", describe(), config, task.out / str(number))
        for number in range(len(grid))
    ]
    session.stop()
    system = [[1, shards, shards * images] for shards, images in grid]
    (start, shard, image), (_, alone_shard, alone_image) = (
        np.linalg.solve(system, each) for each in (seconds, alone)
    )
    costs = {"start_s": start, "shard_ms": 1e3 * shard, "image_ms": 1e3 * image}
    return {
        "seconds": sum(seconds),
        **costs,
        "alone_shard_ms": 1e3 * alone_shard,
        "alone_image_ms": 1e3 * alone_image,
    }


def _seconds_without_ray(source_uri: str, info: Any, config: Any, folder: Path) -> float:
    """Read, decode, embed and commit shard after shard in this process; return the seconds."""
    from pds_ray import catalog
    from pds_ray.stages.embed import embed_shard, shard_counts
    from pds_ray.store.embeddings import EmbeddingStore
    from pds_ray.store.storage import Folder

    source = catalog.make_source(source_uri)
    encoder = catalog.load_encoder(info, "fp32")
    store = EmbeddingStore(Folder(str(folder)))
    store.folder.create()
    began = time.perf_counter()
    for shard in source.shards():
        tables = embed_shard(source, shard, encoder, info.preprocess, config.read, config.embed)
        store.commit(shard.name, *tables, {**asdict(shard_counts(*tables)), "precision": "fp32"})
    return time.perf_counter() - began


def checks(runs: Runs, _: Found) -> list[Check]:
    efficiency = median(runs[ONE]) / median(runs[TWO]) / 2
    shard, image = (median(runs[OVERHEAD], name) for name in ("shard_ms", "image_ms"))
    alone = " and ".join(
        median_and_range(runs[OVERHEAD], name, 2) for name in ("alone_shard_ms", "alone_image_ms")
    )
    return [
        Check("efficiency 0.85 of 2 workers", f"{efficiency:.2f}", efficiency >= 0.85),
        Check(
            "under 30 ms per shard",
            f"{median_and_range(runs[OVERHEAD], 'shard_ms', 1)} ms",
            shard < 30,
        ),
        Check(
            "under 0.3 ms per image",
            f"{median_and_range(runs[OVERHEAD], 'image_ms', 2)} ms",
            image < 0.3,
        ),
        Check("", f"{alone} ms in one process without Ray", None),
    ]


ROW = Row(
    10,
    "embedding 8,000 scenes with 2 workers; cost per shard and per image with a null encoder",
    "ideal: twice one core with one thread and no Ray",
    {ONE: one_core, TWO: two_workers, OVERHEAD: overhead},
    checks,
    prepare,
    notes="Two workers: the difference of 12,000 and 4,000 scenes, so that starting is no part of "
    "it. The costs are by the clock, with all cores at work on 16-pixel JPEGs.",
)

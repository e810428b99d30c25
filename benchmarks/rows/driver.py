"""Row 13: what it costs to schedule embedding: tasks, CPU time, blocks per second."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import Check, Found, Row, Runs, Task, median, median_and_range

TASKS, ONE = "tasks of a shard", "executions: 1"
COUNTS = (1, 2, 4)
SIDE = 224
SHARD, SHARDS, SHARD_IMAGES = 10_000, 400, 100
FEW_BYTES = 1 << 16  # of a block: 5 of them in a shard of 100 images with 16 pixels a side


def prepare(task: Task) -> Found:
    """Write one shard of tiny images like LAION's in number, and many small ones."""
    import io

    from PIL import Image

    from benchmarks.data import write_shards
    from benchmarks.null_encoder import SIDE as TINY

    encoded = io.BytesIO()
    Image.new("RGB", (TINY, TINY), "white").save(encoded, "JPEG")
    sample = {"jpg": encoded.getvalue(), "txt": b"a white square"}
    shard, shards = (500, 8) if task.quick else (SHARD, SHARDS)
    write_shards([sample] * shard, task.data / "one", shard)
    write_shards([sample] * (shards * SHARD_IMAGES), task.data / "many", SHARD_IMAGES)
    return {}


def tasks(task: Task) -> Found:
    """Count Ray Data's tasks for one shard of 10,000 images at 224 pixels, in each way to read."""
    import ray

    from benchmarks.null_encoder import describe_blank
    from pds_ray import catalog
    from pds_ray.config import RunConfig, replace
    from pds_ray.distributed import embed_executions, pools, session, sizes
    from pds_ray.distributed.embed_workers import ShardFile
    from pds_ray.distributed.in_flight import InFlight
    from pds_ray.store.embeddings import EmbeddingStore
    from pds_ray.store.storage import Folder

    config = replace(RunConfig(), {"ray.object_store_gib": 1.0, "embed.precision": "fp32"})
    source = catalog.make_source(f"{task.data}/one/*.tar")
    store = EmbeddingStore(Folder(str(task.out / "store")))
    store.folder.create()
    info = describe_blank(SIDE)
    work = embed_executions.Work(source, info, config.read, config.embed, config.ray, store)
    files = [ShardFile(shard, changed=False) for shard in source.shards()]
    session.start(config.ray)
    actors = pools.pool(config.ray.embed_actors)
    found: dict[str, int] = {}
    for name, whole, on_gpu in (
        ("by blocks", False, False),
        ("whole shards", True, False),
        ("whole shards, blocks for a GPU", True, True),
    ):
        layout = embed_executions.Layout(actors, whole, sizes.pixel_block_bytes(whole, on_gpu))
        with InFlight() as in_flight:
            blocks = embed_executions.dataset(files, work, layout, in_flight).materialize()
        found[name] = sum(map(int, re.findall(r"(\d+) tasks executed", blocks.stats())))
    session.stop()
    return {"tasks": found, "version": ray.__version__}


def side_by_side(executions: int, task: Task) -> Found:
    """Embed small blocks with a null encoder in so many executions, on all cores.

    The CPU seconds are those of the processes that schedule: the driver and, of several executions,
    theirs.
    """
    from benchmarks.null_encoder import describe
    from pds_ray import catalog
    from pds_ray.config import RunConfig, replace
    from pds_ray.distributed import embed_executions, session, sizes
    from pds_ray.distributed.embed import fill_store
    from tests.support.stage_run import embedding_run

    sizes.BLOCK_BYTES = FEW_BYTES
    settings = {"ray.executions": executions, "ray.embed_workers": max(COUNTS)}
    config = replace(RunConfig(), {"ray.object_store_gib": 0.5, **settings})
    session.start(config.ray)

    def seconds(folder: Path, source: str) -> tuple[float, float]:
        run = embedding_run(folder, catalog.make_source(source), describe(), config)
        spent = folder.with_name(f"{folder.name}-spent")
        spent.mkdir()
        embed_executions._execution = _timed(spent)
        cpu, began = time.process_time(), time.perf_counter()
        fill_store(run)
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu
        return wall, cpu + sum(float(file.read_text()) for file in spent.iterdir())

    seconds(task.out / "first", f"{task.data}/many/0000[0-3].tar")  # workers start
    wall, cpu = seconds(task.out / "store", f"{task.data}/many/*.tar")
    session.stop()
    shards = 8 if task.quick else SHARDS
    blocks = shards * -(-SHARD_IMAGES * 3 * 16**2 // FEW_BYTES)
    return {
        "seconds": wall,
        "blocks_per_s": blocks / wall,
        "task_cpu_ms": 1e3 * cpu / (shards + blocks),
    }


def _timed(folder: Path) -> Callable[..., Iterator[Any]]:
    """Return an execution that leaves its CPU seconds in a file of a folder."""
    from pds_ray.distributed import embed_executions

    execution = embed_executions._execution

    def timed(*args: Any) -> Iterator[Any]:
        began = time.process_time()
        for report in execution(*args):
            (folder / str(os.getpid())).write_text(str(time.process_time() - began))
            yield report

    return timed


def checks(runs: Runs, _: Found) -> list[Check]:
    by_name: dict[str, Any] = runs[TASKS][0]["tasks"]
    counted = ", ".join(f"{count} {name}" for name, count in by_name.items())
    per_million = {
        name: 1e6 / SHARD * count * median(runs[ONE], "task_cpu_ms") / 1e3
        for name, count in by_name.items()
    }
    cost = ", ".join(f"{seconds:.1f} {name}" for name, seconds in per_million.items())
    rates = "; ".join(
        f"{count}: {median_and_range(runs[f'executions: {count}'], 'blocks_per_s', 0)}"
        for count in COUNTS
    )
    cpu = "; ".join(
        f"{count}: {median_and_range(runs[f'executions: {count}'], 'task_cpu_ms', 2)}"
        for count in COUNTS
    )
    return [
        Check("", f"Ray Data's tasks: {counted}", None),
        Check("", f"CPU seconds of scheduling per million images: {cost}", None),
        Check("", f"blocks per second by executions: {rates}", None),
        Check("", f"CPU ms of scheduling per task: {cpu}", None),
    ]


ROW = Row(
    13,
    "cost of the driver: a shard of 10,000 images at 224 px; 2,000 blocks with a null encoder",
    "",
    {
        TASKS: tasks,
        **{f"executions: {count}": partial(side_by_side, count) for count in COUNTS},
    },
    checks,
    prepare,
    notes="Blocks per second are those of a whole pipeline, whose readers, encoders and Ray's own "
    "processes take turns with the processes that schedule, on the same cores.",
)

"""Measure how the stages from pruning to prototypes scale: memory and time for millions of pairs.

    python -m benchmarks.scale run --pairs 10000000 --clusters 1000 --folder runs/scale --keep \\
        --json runs/10m-1k.json
    python -m benchmarks.scale assign --json runs/assign.json
    python -m benchmarks.scale table runs/*.json

`run` writes a store of that many embeddings to the folder, unless one was kept there, and runs
prune, cluster, match and prototypes on it with a local Ray; each call is a process of its own, so
that its peaks are its own. `assign` matches 100,000 clusters. Both write their figures as JSON and
print them as a Markdown table; `table` prints those of several calls.

The data: concepts of skewed popularity, each with one centre for its images and one for its
captions. A pair is an image and a caption of the same concept or, for the share STRAYS, of another
one: strays fill the contingency table away from the matched cells, as they do in real data.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from benchmarks.measure import GIB, peak_rss
from pds_ray.config import ClusterConfig, PruneConfig, RayConfig, RunConfig
from pds_ray.stages.assign import assign_clusters
from pds_ray.stages.embed import cosine
from pds_ray.stages.match import Counts, table_of
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.schemas import ERROR_SCHEMA, caption_schema, embedding_array, image_schema
from pds_ray.store.storage import Folder

DIM, SHARD_PAIRS = 128, 10_000
CONCEPTS, STRAYS, SPREAD = 20_000, 0.2, 0.7
RATIO = 0.2  # pruned


def shard_sizes(pairs: int) -> dict[str, int]:
    """Return shard name -> pairs; all shards but the last are full."""
    shards = -(-pairs // SHARD_PAIRS)
    return {
        f"{number:05d}": min(SHARD_PAIRS, pairs - number * SHARD_PAIRS) for number in range(shards)
    }


@functools.cache
def concepts(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return popularity, float64 [CONCEPTS], and centres of images and captions, float32
    [2, CONCEPTS, DIM]."""
    popularity = 1 / (np.arange(CONCEPTS) + 100)
    centres = np.random.default_rng(seed).standard_normal((2, CONCEPTS, DIM), np.float32)
    return popularity / popularity.sum(), centres


def shard_tables(number: int, rows: int, seed: int) -> tuple[pa.Table, pa.Table]:
    """Return images and captions of a shard, which depend on (seed, number) alone."""
    popularity, centres = concepts(seed)
    rng = np.random.default_rng([seed, number])
    seen, told = rng.choice(CONCEPTS, (2, rows), p=popularity)
    told = np.where(rng.random(rows) < STRAYS, told, seen)
    image, text = (
        (centre[concept] + SPREAD * rng.standard_normal((rows, DIM), np.float32)).astype(np.float16)
        for centre, concept in zip(centres, (seen, told), strict=True)
    )
    keys = [f"{row:07d}" for row in range(rows)]
    size = np.full(rows, 256, np.int32)
    images = {
        "key": keys,
        "index": np.arange(rows, dtype=np.int32),
        "embedding": embedding_array(image, "float16"),
    }
    captions = {
        "key": keys,
        "image_row": np.arange(rows, dtype=np.int32),
        "caption_index": np.zeros(rows, np.int32),
        "caption": [f"caption {row} of shard {number}" for row in range(rows)],
        "embedding": embedding_array(text, "float16"),
        "similarity": cosine(image.astype(np.float32), text.astype(np.float32)).astype(np.float32),
    }
    return (
        pa.table({**images, "width": size, "height": size}, schema=image_schema(DIM, "float16")),
        pa.table(captions, schema=caption_schema(DIM, "float16")),
    )


def write_shard(store: EmbeddingStore, shard: str, rows: int, seed: int) -> None:
    """Commit one shard of the store."""
    images, captions = shard_tables(int(shard), rows, seed)
    counts = {"images": rows, "pairs": rows, "bad": 0, "reasons": {}}
    store.commit(
        shard, images, captions, ERROR_SCHEMA.empty_table(), {**counts, "precision": "fp16"}
    )


def make_store(folder: Folder, pairs: int, seed: int, processes: int) -> EmbeddingStore:
    """Return the store of these pairs and this seed; write the shards that it lacks."""
    store = EmbeddingStore(folder, f"scale-{pairs}-{seed}")
    folder.create()
    have = store.committed()
    if have.keys() >= shard_sizes(pairs).keys():
        return store
    todo = [
        (store, shard, rows, seed)
        for shard, rows in shard_sizes(pairs).items()
        if shard not in have
    ]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.starmap(write_shard, todo, chunksize=1)
    return store


class Watch:
    """Measures seconds and peak memory of blocks: of this process, and of its largest child.

    On a busy machine CPU seconds, of this process and all its children, say more than the clock.
    """

    INTERVAL_S = 0.2

    def __init__(self) -> None:
        self.stages: dict[str, dict[str, float]] = {}
        self._me = psutil.Process()
        self._worker = 0
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while True:
            for child in self._me.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if child.name().startswith("ray::"):
                        self._worker = max(self._worker, child.memory_info().rss)
            time.sleep(self.INTERVAL_S)

    def now(self) -> np.ndarray:
        """Return the seconds of the clock and of CPU so far."""
        cpu = 0.0
        for process in (self._me, *self._me.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                spent = process.cpu_times()
                cpu += spent.user + spent.system
        return np.array([time.perf_counter(), cpu])

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the block."""
        Path("/proc/self/clear_refs").write_text("5")  # reset the kernel's own peak
        self._worker = 0
        began = self.now()
        yield
        seconds, cpu_seconds = self.now() - began
        self.stages[name] = {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "driver_peak_gib": peak_rss() / GIB,
            "worker_peak_gib": self._worker / GIB,
        }


def _load(name: str) -> None:
    import_module(name)


def run_stages(args: argparse.Namespace) -> dict[str, Any]:
    """Write the store and measure the stages on it."""
    folder = Folder(args.folder)
    store = make_store(folder / f"store-{args.pairs}-{args.seed}", args.pairs, args.seed, args.cpus)

    from pds_ray.distributed import session, tasks
    from tests.support.stage_run import do, stage_run

    config = RunConfig(
        pairs=args.clusters,
        seed=args.seed,
        prune=PruneConfig(ratio=RATIO),
        cluster=ClusterConfig(memory_gib=args.memory_gib, iterations=args.iterations),
    )
    place = RunFolder(folder / f"run-{args.clusters}")
    place.folder.delete_all()
    place.folder.create()
    run = stage_run(store, place, config, DIM)
    session.start(RayConfig(num_cpus=args.cpus, object_store_gib=args.object_store_gib))
    list(
        tasks.map_in_order(_load, ["pds_ray.distributed.prototypes", "faiss"] * args.cpus)
    )  # workers start
    watch, load = Watch(), os.getloadavg()
    counts: dict[str, Any] = {}
    with watch.stage("prune"):
        counts |= do(run, "prune")["prune"]
    fit, run_kmeans = np.zeros(2), tasks.run_kmeans

    def timed(*task: Any) -> Any:
        began = watch.now()
        found = run_kmeans(*task)
        fit[:] += watch.now() - began
        return found

    # the fit is timed by itself: its sample is bounded
    tasks.run_kmeans = timed  # type: ignore[assignment]
    with watch.stage("cluster"):
        counts |= do(run, "cluster")
    watch.stages["cluster"] |= {"fit_seconds": fit[0], "fit_cpu_seconds": fit[1]}
    with watch.stage("match"):
        counts |= do(run, "match")
    with watch.stage("prototypes"):
        counts |= do(run, "prototypes")
    session.stop()
    place.folder.delete_all()
    if not args.keep:
        store.folder.delete_all()
    return {"options": vars(args), "load": load, "stages": watch.stages, "counts": counts}


def random_table(clusters: int, each: int, seed: int) -> Counts:
    """Return a contingency table with at most `each` cells per row and skewed counts.

    Some text clusters are far more popular than others.
    """
    rng = np.random.default_rng(seed)
    popularity = 1 / (np.arange(clusters) + clusters / 100)
    columns = rng.choice(clusters, clusters * each, p=popularity / popularity.sum())
    cells = np.unique(
        np.repeat(np.arange(clusters), each) * clusters + rng.permutation(clusters)[columns]
    )
    return cells, rng.zipf(1.6, len(cells)).clip(max=100_000)


def run_assignment(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the matching of a random table on one core."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    table = table_of([random_table(args.clusters, args.each, args.seed)], args.clusters)
    load, watch = os.getloadavg(), Watch()
    with watch.stage("assign"):
        _, shared = assign_clusters(table)
    found = {
        "cells": table.cells,
        "shared_pairs": int(shared.sum()),
        "pairless": int((shared == 0).sum()),
    }
    return {"options": vars(args), "load": load, "stages": watch.stages, "counts": {"match": found}}


def table(results: list[dict[str, Any]]) -> str:
    """Return the figures as Markdown, with one line per stage."""
    lines = [
        "| pairs | clusters | stage | seconds | of CPU | driver peak GiB | largest worker GiB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        options = result["options"]
        pairs = (
            f"{options['pairs']:,}"
            if "pairs" in options
            else f"{result['counts']['match']['cells']:,} cells"
        )
        for name, stage in result["stages"].items():
            both = []
            for kind in ("seconds", "cpu_seconds"):
                fit = stage.get(f"fit_{kind}")
                both.append(
                    f"{fit:.1f} fit + {stage[kind] - fit:.1f} labels"
                    if fit
                    else f"{stage[kind]:.1f}"
                )
            peaks = f"{stage['driver_peak_gib']:.2f} | {stage['worker_peak_gib']:.2f}"
            lines.append(
                f"| {pairs} | {options['clusters']:,} | {name} | {' | '.join(both)} | {peaks} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Measure the stages from pruning to prototypes.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="prune to prototypes on a synthetic store")
    run.add_argument("--pairs", type=int, required=True)
    run.add_argument("--clusters", type=int, required=True)
    run.add_argument("--folder", required=True, help="the store is written here, or found")
    run.add_argument("--keep", action="store_true", help="keep the store for the next call")
    run.add_argument("--memory-gib", type=float, default=1.0, help="cluster.memory_gib")
    run.add_argument("--iterations", type=int, default=25, help="cluster.iterations")
    run.add_argument("--object-store-gib", type=float, default=0.5)
    run.add_argument("--cpus", type=int, default=2)
    run.set_defaults(measure=run_stages)
    assign = commands.add_parser("assign", help="the assignment alone, on one core")
    assign.add_argument("--clusters", type=int, default=100_000)
    assign.add_argument("--each", type=int, default=30, help="cells per row")
    assign.set_defaults(measure=run_assignment)
    for command in (run, assign):
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--json", required=True, help="file for the figures")
    show = commands.add_parser("table", help="the figures of several calls")
    show.add_argument("files", nargs="+")
    args = parser.parse_args()
    if args.command == "table":
        print(table([json.loads(Path(name).read_text()) for name in args.files]))
        return
    measure = args.measure
    del args.measure
    result = measure(args)
    Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
    print(table([result]))


if __name__ == "__main__":
    main()

"""Measure the figures of the cost model on this machine, with the engine's own code.

CPU work is timed in CPU seconds of all threads, GPU work and starts by the clock: so rates per core
hold on a busy machine, too, and starts do not.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import platform
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from PIL import Image
from tqdm import tqdm

from pds_ray import catalog
from pds_ray.config import ClusterConfig, RayConfig, RunConfig, replace
from pds_ray.decoders.base import DecodeBatch, DecoderInfo
from pds_ray.distributed import limits, malloc_env
from pds_ray.distributed.lifetime import session_kept
from pds_ray.encoders.base import EncoderInfo
from pds_ray.engine.run import distill
from pds_ray.errors import without_secrets
from pds_ray.planning.choose import decoder_name, unet_passes
from pds_ray.planning.figures import JPEG, SCHEMA_VERSION, parse_rates, read_prices
from pds_ray.planning.phases import FIT_GPUS, distance_flop
from pds_ray.planning.plan import make_plan
from pds_ray.planning.workload import make_cluster, survey
from pds_ray.sources.base import Shard, Source, SourceError
from pds_ray.stages import assign, products, prototypes
from pds_ray.stages import cluster as clustering
from pds_ray.stages import embed as embedding
from pds_ray.stages import match as matching
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.manifest import versions
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.schemas import (
    ERROR_SCHEMA,
    MODALITIES,
    caption_schema,
    embedding_array,
    image_schema,
)
from pds_ray.store.storage import Folder
from pds_ray.telemetry.progress import progress_bar

REPEATS, BUDGET_S = 3, 6.0
RUNS, RUN_IMAGES, RUN_PAIRS = 2, 16, 2  # whole runs, so small that their start is nearly all
BATCHES = (16, 64, 256)
SHARD_PAIRS, CLUSTERS, ITERATIONS = 10_000, 1_000, 3
GPU_QUERIES = 32_768
FEW = 16  # clusters where distances shall cost next to nothing
DENSE, SPARSE, CELLS = 1_000, 5_000, 30  # clusters of assignments, and cells per row
TASKS, BLOCKS, TASKS_PER_BLOCK = 500, 60, 3

Entry = dict[str, Any]
Result = TypeVar("Result")


def bench(config: RunConfig) -> dict[str, Any]:
    """Measure with the encoder, decoder, steps and source of `config`.

    Returns the content of a file of rates. Raises ConfigError or SourceError in one line if a model
    or the source cannot be used.
    """
    info = catalog.describe_encoder(config.embed)
    config = catalog.method(config.method).settled(config)
    decoder = catalog.describe_decoder(config.decode, info)
    uris = [config.source] if config.source else []
    # as for the engine's workers: waiting costs no CPU time
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    load = os.getloadavg()
    with (
        tempfile.TemporaryDirectory(prefix="pds-ray-bench-") as folder,
        progress_bar("bench", 4 + RUNS, "parts") as bar,
    ):
        jpegs = catalog.make_source(_write_jpegs(Path(folder) / "jpegs.tar"))
        sources = {JPEG: _source_figures(jpegs, info, config)}
        for uri in uris:
            source = catalog.make_source(uri, config.read)
            sources[without_secrets(uri)] = _source_figures(source, info, config)
        bar.update()
        with _environment({} if _gpus() else malloc_env()):  # as the engine's workers have it
            figures = _in_a_process(_model_figures, info, decoder, jpegs, config)
        bar.update()
        figures |= _pass_figures(Folder(folder), info.dim, config) | _arithmetic_figures(info.dim)
        if _gpus():
            figures |= _in_a_process(_gpu_figures, info.dim)
        figures["commit"] = _one_after_the_other(
            figures.pop("around_encoder"), figures.pop("store")
        )
        bar.update()
        figures |= _in_a_process(_ray_figures, config.ray)
        bar.update()
        data = {**_about(config, info, load), "sources": sources, "figures": figures}
        figures |= _start_figures(Folder(folder), config, data, bar)
    return data


def _about(config: RunConfig, info: EncoderInfo, load: tuple[float, float, float]) -> Entry:
    """Return what was measured: date, machine with its `load` before, versions and models."""
    return {
        "schema": SCHEMA_VERSION,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {**_machine(config), "load": load},
        "versions": versions(),
        "encoder": {"name": info.name, "dim": info.dim, "size": info.preprocess.size},
        "decoder": {
            "name": decoder_name(config),
            "steps": config.decode.steps,
            "passes": unet_passes(config),
        },
    }


# ---- timing ------------------------------------------------------------------------------------


def _seconds(action: Callable[[], object], clock: Callable[[], float]) -> list[float]:
    """Return the seconds of REPEATS calls after one that warms up.

    Where the first alone takes half of BUDGET_S, it is the only one.
    """
    found: list[float] = []
    for _ in range(1 + REPEATS):
        began = clock()
        action()
        found.append(clock() - began)
        if len(found) == 1 and found[0] > BUDGET_S / 2:
            return found
    return found[1:]


def _entry(values: Sequence[float], unit: str, per: str) -> Entry:
    """Return median and range; the worst is the longest time or the lowest rate."""
    low, high = min(values), max(values)
    worst, best = (high, low) if unit in ("s", "bytes") else (low, high)
    median = statistics.median(values)
    return {
        "value": median,
        "worst": worst,
        "best": best,
        "unit": unit,
        "per": per,
        "repeats": len(values),
    }


def _rate(action: Callable[[], object], work: float, unit: str, per: str = "core") -> Entry:
    clock = time.perf_counter if per == "GPU" else time.process_time
    return _entry([work / seconds for seconds in _seconds(action, clock)], unit, per)


def _one_after_the_other(first: Entry, second: Entry) -> Entry:
    """Return the rate of doing both."""
    return {
        **first,
        **{case: 1 / (1 / first[case] + 1 / second[case]) for case in ("value", "worst", "best")},
    }


def _in_a_process(function: Callable[..., Result], *args: Any) -> Result:
    """Call `function` in a fresh process, so that nothing of it stays on a GPU."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *args).result()


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables for the processes that are started inside the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _machine(config: RunConfig) -> dict[str, Any]:
    return {
        "cpu": cpu_name(),
        "cpus": config.ray.num_cpus or limits.cpus(),
        "gpus": _gpus(),
        "memory_bytes": limits.memory_bytes(),
    }


def cpu_name() -> str:
    """Return the CPU's name by the kernel; its architecture if there is none."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def _gpus() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


# ---- images and models -------------------------------------------------------------------------


def _write_jpegs(path: Path) -> str:
    """Write JPEGs of 341 x 256 pixels and about 24 kB, like web data; return the shard's path."""
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for number in range(embedding.BLOCK_SAMPLES):
            coarse = Image.fromarray(rng.integers(0, 256, (8, 11, 3), np.uint8)).resize((341, 256))
            noisy = np.asarray(coarse) + rng.normal(0, 12, (256, 341, 1))
            file = io.BytesIO()
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=80)
            for suffix, data in (("jpg", file.getvalue()), ("txt", _caption(number).encode())):
                member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return str(path)


def _caption(number: int) -> str:
    return f"a photograph of {number} things that stand beside one another on a table"


def _first_block(source: Source) -> tuple[Shard, pa.Table]:
    """Return the first shard and its first block."""
    shard = source.shards()[0]
    block = next(embedding.read_blocks(source, shard))
    if not block.column("captions").drop_null().length():
        raise SourceError(
            f"the first samples of {without_secrets(source.uri)} hold no captioned image"
        )
    return shard, block


def _source_figures(source: Source, info: EncoderInfo, config: RunConfig) -> dict[str, Entry]:
    shard, block = _first_block(source)
    images = block.column("image").drop_null()
    count, size = len(images), sum(len(image.as_py()) for image in images)
    return {
        "read": _rate(lambda: next(embedding.read_blocks(source, shard)), count, "images"),
        "preprocess": _rate(
            lambda: embedding.decode_block(block, info.preprocess, config.read), count, "images"
        ),
        "image_bytes": _entry([size / count], "bytes", "image"),
    }


def _model_figures(
    info: EncoderInfo, decoder: DecoderInfo, source: Source, config: RunConfig
) -> dict[str, Entry]:
    return {**_encoder_figures(info, source, config), **_decoder_figures(decoder, source, config)}


class _NoEncoder:
    """An encoder at no cost, so that only the work around it is measured."""

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def encode_images(self, pixels: np.ndarray) -> np.ndarray:
        return np.ones((len(pixels), self.dim), np.float32)

    def encode_captions(self, captions: list[str]) -> np.ndarray:
        return np.ones((len(captions), self.dim), np.float32)


def _encoder_figures(info: EncoderInfo, source: Source, config: RunConfig) -> dict[str, Entry]:
    """Measure encoding at a few batch sizes, and the work around it, without the commit."""
    import torch

    from pds_ray.distributed.process import load_model

    per = "GPU" if torch.cuda.is_available() else "core"
    began = time.perf_counter()
    encoder = load_model(catalog.load_encoder, info, config.embed.precision)
    loaded = time.perf_counter() - began
    side = info.preprocess.size
    block = embedding.decode_block(_first_block(source)[1], info.preprocess, config.read)
    good = [row for row in block.to_pylist() if row["reason"] is None]
    pixels = np.frombuffer(b"".join(row["image"] for row in good), np.uint8).reshape(
        -1, side, side, 3
    )
    captions = np.array([row["captions"][0] for row in good], object)
    bare, size = _NoEncoder(info.dim), config.embed.batch_size
    around = _rate(
        lambda: embedding.embed_block(block, bare, side, config.embed), len(good), "pairs"
    )
    return {
        **_by_batch(
            "encode_images",
            lambda few: encoder.encode_images(pixels[few]),
            len(good),
            size,
            "images",
            per,
        ),
        **_by_batch(
            "encode_captions",
            lambda few: encoder.encode_captions(captions[few].tolist()),
            len(good),
            size,
            "captions",
            per,
        ),
        "around_encoder": around,
        "load_encoder": _entry([loaded], "s", "process"),
    }


def _by_batch(
    name: str,
    encode: Callable[[np.ndarray], object],
    items: int,
    configured: int,
    unit: str,
    per: str,
) -> dict[str, Entry]:
    """Return the rate at a few batch sizes, as NAME@SIZE, and the best of them as NAME.

    `encode` takes indices of items.
    """
    found: dict[str, Entry] = {}
    slowest = 0.0  # seconds per item
    for size in sorted({*BATCHES, configured}):
        if found and size * slowest > BUDGET_S / 2:
            break
        few = np.arange(size) % items
        entry = _rate(partial(encode, few), size, unit, per)
        found[f"{name}@{size}"] = {**entry, "batch": size}
        slowest = max(slowest, 1 / entry["value"])
    return {name: max(found.values(), key=lambda entry: entry["value"]), **found}


def _decoder_figures(info: DecoderInfo, source: Source, config: RunConfig) -> dict[str, Entry]:
    """Measure drawing at the configured steps, without and with the loading of the model.

    The decoder `nearest` has no model, hence no figures.
    """
    if info.dim is None:
        return {}
    import torch

    from pds_ray.distributed.process import load_model

    per = "GPU" if torch.cuda.is_available() else "core"
    began = time.perf_counter()
    decoder = load_model(catalog.load_decoder, info, config.decode, source)
    loaded = time.perf_counter() - began
    count = config.decode.batch_size if per == "GPU" else min(config.decode.batch_size, FEW)
    vectors = np.random.default_rng(0).standard_normal((count, info.dim), np.float32)
    batch = DecodeBatch(vectors, ["an image"] * count, list(range(count)), [("", "")] * count)
    decoder.decode(batch)
    first = time.perf_counter() - began
    return {
        "draw": {**_rate(lambda: decoder.decode(batch), count, "images", per), "batch": count},
        "draw_with_start": {**_entry([count / first], "images", "process"), "batch": count},
        "load_decoder": _entry([loaded], "s", "process"),
    }


# ---- the stages between ------------------------------------------------------------------------


def _write_store(
    folder: Folder, dim: int, dtype: str
) -> tuple[EmbeddingStore, str, Callable[[], object], int]:
    """Write a store of one shard of random vectors.

    Returns the store, the shard's name, a function that commits it again and its bytes on the disk.
    """
    rng, shard = np.random.default_rng(0), "00000"
    vectors = rng.standard_normal((2, SHARD_PAIRS, dim), np.float32)
    rows = np.arange(SHARD_PAIRS, dtype=np.int32)
    keys = [f"{row:09d}" for row in rows]
    images = pa.table(
        {
            "key": keys,
            "index": rows,
            "embedding": embedding_array(vectors[0], dtype),
            "width": rows,
            "height": rows,
        },
        schema=image_schema(dim, dtype),
    )
    captions = pa.table(
        {
            "key": keys,
            "image_row": rows,
            "caption_index": np.zeros_like(rows),
            "caption": [_caption(int(row)) for row in rows],
            "embedding": embedding_array(vectors[1], dtype),
            "similarity": embedding.cosine(*vectors),
        },
        schema=caption_schema(dim, dtype),
    )
    store = EmbeddingStore(folder, "bench")
    store.folder.create()

    def commit() -> None:
        store.commit(shard, images, captions, ERROR_SCHEMA.empty_table(), {})

    commit()
    size = sum(Path(store.folder.full(name)).stat().st_size for name in store.folder.names())
    return store, shard, commit, size


def _pass_figures(folder: Folder, dim: int, config: RunConfig) -> dict[str, Entry]:
    """Measure each pass over a shard but for its distances, and the bytes that are stored."""
    from pds_ray.distributed import cluster, match, nearest, prune
    from pds_ray.distributed import prototypes as averaging
    from pds_ray.stages.prune import Threshold

    dtype = config.embed.store_dtype
    store, shard, commit, stored = _write_store(folder / "store", dim, dtype)
    run = RunFolder(folder / "stages")
    run.folder.create()
    few = np.random.default_rng(1).standard_normal((FEW, dim), np.float32)
    centroids = dict.fromkeys(MODALITIES, few)
    each = np.arange(FEW, dtype=np.int32)
    matches = prototypes.Matches(each, each, np.zeros(FEW, bool))
    plain = replace(config, {"cluster.normalize": False})

    def four_passes() -> None:
        prune.histogram([shard], store, None)
        prune.histogram([shard], store, 1 << 15)
        prune.count_ties([shard], store, Threshold(1 << 31, 0))
        prune.write_masks([(shard, 0, False)], store, run, Threshold(0, 0))  # all are kept

    passes: dict[str, tuple[str, Callable[[], object]]] = {  # each reads the files of those before
        "store": ("pairs", commit),
        "prune": ("pairs", four_passes),
        "sample": ("vectors", lambda: cluster.sampled([shard], "text", store, run, 0.5, plain)),
        "label_rows": (
            "pairs",
            lambda: cluster.label_shards([(shard, False)], store, run, centroids, False, "cpu"),
        ),
        "match": ("pairs", lambda: list(match.count_pairs([shard], run, FEW, [0, FEW]))),
        "sums": (
            "pairs",
            lambda: list(averaging.sum_shards([shard], store, run, matches, FEW, dim, [0, FEW])),
        ),
        "search_rows": (
            "rows",
            lambda: nearest.search_shards([(0, shard)], store, {"captions": few[:1]}, {}, "cpu"),
        ),
    }
    text = stored / SHARD_PAIRS - 2 * dim * np.dtype(dtype).itemsize
    return {
        **{name: _rate(action, SHARD_PAIRS, unit) for name, (unit, action) in passes.items()},
        "text": _entry([text], "bytes", "pair"),
    }


def _arithmetic_figures(dim: int) -> dict[str, Entry]:
    """Measure distances and assignments, on arrays in memory."""
    rows = np.random.default_rng(1).standard_normal((SHARD_PAIRS, dim), np.float32)
    centroids = rows[:CLUSTERS] + np.float32(0.1)
    config = ClusterConfig(iterations=ITERATIONS, tolerance=0)  # all of them: the rate is theirs
    weights, flop = np.ones(len(rows), np.float32), distance_flop(SHARD_PAIRS, CLUSTERS, dim)

    gpus = _faiss_gpus()

    def fit() -> None:
        clustering.lloyd(rows, weights, CLUSTERS, centroids, 0, config)

    def solve(clusters: int, solver: str, power: int) -> Entry:
        table = _table(clusters)
        return _rate(
            lambda: assign.assign_clusters(table, solver),
            clusters**power,
            f"clusters^{power}",
            "driver",
        )

    return {
        # it takes all GPUs of the machine, which the plan counts alike
        "fit": _rate(
            fit,
            (ITERATIONS + 1) * flop / min(FIT_GPUS, max(1, gpus)),
            "FLOP",
            "GPU" if gpus else "core",
        ),
        "label": _rate(lambda: products.assign(rows, centroids), flop, "FLOP"),
        "solve_dense": solve(DENSE, "dense", 3),
        "solve_sparse": solve(SPARSE, "sparse", 2),
        "search": _rate(lambda: products.nearest_rows(centroids, rows), flop, "FLOP"),
    }


def _gpu_figures(dim: int) -> dict[str, Entry]:
    """Measure products on a GPU, with as many queries as keep it busy."""
    rng = np.random.default_rng(1)
    rows, vectors = (
        rng.standard_normal((count, dim), np.float32) for count in (SHARD_PAIRS, GPU_QUERIES)
    )
    queries = products.as_queries(vectors, "cuda")
    flop = distance_flop(SHARD_PAIRS, GPU_QUERIES, dim)
    rate = _rate(lambda: products.nearest_rows(queries, rows), flop, "FLOP", "GPU")
    return {"products": rate}


def _table(clusters: int) -> matching.Table:
    """Return a contingency table of CELLS cells per row with skewed counts."""
    rng = np.random.default_rng(clusters)
    cells = np.unique(rng.integers(0, clusters**2, clusters * CELLS))
    return matching.table_of([(cells, rng.zipf(1.6, len(cells)).clip(max=100_000))], clusters)


def _faiss_gpus() -> int:
    import faiss

    return faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0


# ---- Ray and whole runs ------------------------------------------------------------------------


@session_kept()
def _ray_figures(config: RayConfig) -> dict[str, Entry]:
    """Measure Ray's own work in the driver, on a local Ray."""
    from pds_ray.distributed import session
    from pds_ray.distributed.bench import block_seconds, task_seconds

    session.start(config)
    task_seconds(FEW)  # workers start
    tasks = [TASKS / task_seconds(TASKS) for _ in range(REPEATS)]
    blocks = [TASKS_PER_BLOCK * BLOCKS / block_seconds(BLOCKS) for _ in range(REPEATS)]
    return {"tasks": _entry(tasks, "tasks", "driver"), "blocks": _entry(blocks, "tasks", "driver")}


def _whole_run(config: RunConfig) -> dict[str, float]:
    """Run the stages; return the seconds of each, and under "" those outside of all stages."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):
        manifest = distill(config)
    seconds = {stage: entry["seconds"] for stage, entry in manifest["stages"].items()}
    return {**seconds, "": manifest["last_run_seconds"] - sum(seconds.values())}


def _start_figures(
    folder: Folder, config: RunConfig, data: dict[str, Any], bar: tqdm
) -> dict[str, Entry]:
    """Measure the start of each stage: the seconds of small runs less those of their work."""
    small = replace(
        config,
        {
            "source": f"scenes:{RUN_IMAGES}",
            "out": "",
            "pairs": RUN_PAIRS,
            "method": "pds",
            "embed.store": None,
        },
    )
    measured = parse_rates(data)
    plan = make_plan(
        small, survey(small.source), make_cluster(None, None, measured), measured, read_prices(None)
    )
    runs = []
    for number in range(RUNS):
        runs.append(
            _in_a_process(_whole_run, replace(small, {"out": folder.full(f"run-{number}")}))
        )
        bar.update()
    starts = {"start": _entry([run[""] for run in runs], "s", "run")}
    for stage in plan.stages:
        work = stage.seconds - stage.start.value
        starts[f"start_{stage.name}"] = _entry(
            [max(0.0, run[stage.name] - work) for run in runs], "s", "run"
        )
    return starts

"""The distilled set: what `extras` asks for is gathered from the shards; tasks write it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from pds_ray.distributed import tasks
from pds_ray.distributed.match import counted
from pds_ray.distributed.sizes import TARS_AT_ONCE
from pds_ray.methods.base import Counts, Run
from pds_ray.methods.pds import judged
from pds_ray.stages import extras as core
from pds_ray.stages import materialize as writing
from pds_ray.stages.candidates import REAL
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.schemas import MODALITIES, embeddings
from pds_ray.telemetry.progress import progress_bar

NO_CELL = np.iinfo(np.int64).min
"""The cell of a pair that takes no captions of its clusters."""


def materialize(run: Run) -> Counts:
    """Write the distilled set of a run whose other stages are done; return its counts."""
    config = run.config.extras
    captions = _captions(run) if config.captions else None
    similarity = _similarity(run) if config.similarity != "off" else None
    return writing.materialize(run, core.Extras(captions, similarity), _in_tasks)


def _in_tasks(function: Callable[[Any], Any], items: list[Any]) -> Iterator[Any]:
    """Apply a function to parts of a set in tasks: to few tars at once."""
    tars = TARS_AT_ONCE if function is writing.write_tar else None
    return tasks.map_in_order(function, items, at_once=tars)


def _similarity(run: Run) -> np.ndarray:
    """Return the soft targets of the pairs, float32 [B, B]."""
    config, folder = run.config.extras, run.folder
    if config.similarity == "clip":
        image, text = (folder.prototype_vectors(side).gathered() for side in MODALITIES)
        return core.clip_similarity(image, text, config.temperature, config.share)
    with progress_bar("soft targets", len(run.shard_names), "shards") as bar:
        table = counted(run, bar)
    facts = folder.prototype_facts()
    image, text = (facts.column(f"{side}_cluster").to_numpy() for side in MODALITIES)
    return core.table_similarity(table, image, text, config.share)


def _captions(run: Run) -> list[list[str]]:
    """Return the further captions of each pair.

    They are captions of its image where that is a real one, or where nothing was clustered; else of
    the pairs that its matched clusters share.
    """
    prototypes, limit = run.folder.prototype_facts(), run.config.extras.captions
    has_captions = "caption" in run.method.names
    own = (run.folder.captions() if has_captions else prototypes).column("caption").to_pylist()
    real = _real(run, prototypes.num_rows)
    images, shards = _by_shard(prototypes, real), [] if real.all() else run.shard_names
    pruned = "prune" in run.method.names
    text = run.folder.prototype_vectors("text").gathered()
    members = run.store, run.folder, _cells(prototypes, real), text, limit + 1
    with progress_bar("captions", len(images) + len(shards), "shards") as bar:
        found = chain(
            tasks.map_in_order(_of_images, images, run.store, run.folder, pruned),
            tasks.map_in_order(_of_members, shards, *members),
        )
        return core.further_captions(_counted(found, bar), own, limit)


def _counted(parts: Iterable[core.Found], bar: tqdm) -> Iterator[core.Found]:
    """Yield parts as they come; `bar` counts those that are done with."""
    for part in parts:
        yield part
        bar.update()


def _real(run: Run, pairs: int) -> np.ndarray:
    """Return whether each pair has the captions of a real image, bool [pairs]."""
    if run.decoder.dim is None or "cluster" not in run.method.names:
        return np.ones(pairs, bool)
    if not judged(run):
        return np.zeros(pairs, bool)
    return np.array(run.folder.choices().column("origin").to_pylist()) == REAL


def _by_shard(prototypes: pa.Table, real: np.ndarray) -> list[tuple[str, dict[str, list[int]]]]:
    """Return the shards with the image of a real pair, in order, and the pairs of each key."""
    found: dict[str, dict[str, list[int]]] = {}
    places = (prototypes.column(f"nearest_{name}").to_pylist() for name in ("shard", "key"))
    for pair, (shard, key) in enumerate(zip(*places, strict=True)):
        if real[pair]:
            found.setdefault(shard, {}).setdefault(key, []).append(pair)
    return sorted(found.items())


def _of_images(
    item: tuple[str, dict[str, list[int]]], store: EmbeddingStore, folder: RunFolder, pruned: bool
) -> core.Found:
    shard, keys = item
    captions = store.captions(shard, ["key", "caption", "similarity"])
    return core.image_captions(captions, keys, folder.keep(shard) if pruned else None)


def _of_members(
    shard: str,
    store: EmbeddingStore,
    folder: RunFolder,
    cells: np.ndarray,
    text: np.ndarray,
    limit: int,
) -> core.Found:
    captions = store.captions(shard, ["caption", "embedding"])
    cell = _packed(*folder.labels(shard))
    return core.member_captions(captions, embeddings(captions), cell, cells, text, limit)


def _cells(prototypes: pa.Table, real: np.ndarray) -> np.ndarray:
    """Return the cell of each pair, int64 [pairs]; NO_CELL of a real one."""
    clusters = [prototypes.column(f"{side}_cluster").to_numpy() for side in MODALITIES]
    return np.where(real, NO_CELL, _packed(*clusters))


def _packed(image_cluster: np.ndarray, text_cluster: np.ndarray) -> np.ndarray:
    """Return one number per pair of clusters, int64 [n]; negative where pruned."""
    return image_cluster.astype(np.int64) << 32 | text_cluster.astype(np.int64)

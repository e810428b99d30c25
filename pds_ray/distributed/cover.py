"""Coverage over shards: each ranks its images, the lowest ranks are gathered; tasks pick."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from pds_ray.config import ConfigError
from pds_ray.distributed import pools, tasks
from pds_ray.distributed.in_flight import InFlight
from pds_ray.methods.base import Counts, Run
from pds_ray.stages import cover as core
from pds_ray.stages.prototypes import fewer
from pds_ray.stages.select import chosen_pairs, split_by_shard
from pds_ray.stages.whiten import Whitening
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.schemas import MODALITIES, embeddings
from pds_ray.telemetry.progress import Bar, progress_bar

Part = tuple[str, core.Candidates, int]
"""A part of the candidates: its name, the candidates, and how many of them are to be picked."""


def rank_shard(
    shard: str, store: EmbeddingStore, folder: RunFolder, seed: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the `count` lowest ranks of a shard, ascending, and the rows of their pairs.

    An image is ranked by its kept pair of highest cosine; images without a kept pair have none.
    """
    captions = store.captions(shard, ["key", "image_row", "caption", "similarity"])
    rows = core.best_pairs(
        captions.column("image_row").to_numpy(),
        captions.column("similarity").to_numpy(),
        folder.keep(shard),
    )
    pairs = captions.select(["key", "caption"]).take(rows)
    names = zip(*(column.to_pylist() for column in pairs.columns), strict=True)
    ranks = np.array([core.rank(seed, key, caption) for key, caption in names], np.uint64)
    lowest = np.argsort(ranks, kind="stable")[:count]
    return ranks[lowest], rows[lowest]


def whitened(
    item: tuple[str, np.ndarray, np.ndarray],
    store: EmbeddingStore,
    whitening: dict[str, Whitening],
) -> tuple[np.ndarray, np.ndarray]:
    """Return the whitened images and captions of some pairs of a shard, float32 [c, d] both."""
    shard, _, rows = item
    captions = store.captions(shard, ["image_row", "embedding"]).take(rows)
    images = store.images(shard, ["embedding"]).take(captions.column("image_row"))
    return whitening["image"](embeddings(images)), whitening["text"](embeddings(captions))


def pick(part: Part, herded: float, in_flight: InFlight) -> list[int]:
    """Return the picks of a part, as rows of it, in their order."""
    name, candidates, count = part
    picks: list[int] = []
    with in_flight.doing(f"the first pick of {name}", name) as doing:
        for row in core.choose(candidates, count, herded):
            picks.append(row)
            doing.now(f"the picks of {name}")
            doing.reach(len(picks))
    return picks


def _look_up(picks: tuple[str, np.ndarray, np.ndarray], store: EmbeddingStore) -> pa.Table:
    return chosen_pairs(*picks, store)


def _drawn(run: Run, count: int, bar: Bar) -> list[int]:
    """Return the pairs of the `count` lowest ranks, numbered over all shards, ascending by rank."""
    shards, store = run.shard_names, run.store
    starts = np.cumsum([0, *(run.embedded[shard]["pairs"] for shard in shards)])
    ranks, pairs = np.zeros(0, np.uint64), np.zeros(0, np.int64)
    parts = tasks.map_in_order(rank_shard, shards, store, run.folder, run.config.seed, count)
    for start, (more_ranks, rows) in zip(starts, parts, strict=False):
        ranks, pairs = np.append(ranks, more_ranks), np.append(pairs, start + rows)
        if len(ranks) > 2 * count:
            ranks, pairs = core.lowest(ranks, pairs, count)
        bar.update()
    return core.lowest(ranks, pairs, count)[1].tolist()


def _gathered(run: Run, drawn: list[int], bar: Bar) -> core.Candidates:
    """Return the whitened embeddings of the pairs drawn, in their order."""
    tensors = run.folder.whitening()
    whitening = {
        side: Whitening(tensors[f"{side}_mean"], tensors[f"{side}_matrix"]) for side in MODALITIES
    }
    shape = len(drawn), run.encoder.dim
    candidates = core.Candidates(np.empty(shape, np.float32), np.empty(shape, np.float32))
    items = split_by_shard(drawn, run.shard_names, run.store)
    found = tasks.map_in_order(whitened, items, run.store, whitening)
    for (_, places, _), (image, text) in zip(items, found, strict=True):
        candidates.image[places], candidates.text[places] = image, text
        bar.update()
    bar.update(len(run.shard_names) - len(items))
    return candidates


def _picks(run: Run, candidates: core.Candidates, bar: Bar) -> list[int]:
    """Return the picks of all parts, as rows of the candidates."""
    pairs, herded = run.config.pairs, run.config.cover.herded
    parts = core.split(candidates, core.PART)
    counts = core.shares([len(rows) for rows in parts], pairs)
    items: Iterator[Part] = (
        (f"part {number} of {len(parts)}", candidates.take(rows), count)
        for number, (rows, count) in enumerate(zip(parts, counts, strict=True), 1)
    )
    found: list[np.ndarray] = []
    ended = set[str]()
    with InFlight() as in_flight:
        bar.follow(in_flight.reports(ended.__contains__))
        for number, picks in enumerate(tasks.map_in_order(pick, items, herded, in_flight), 1):
            found.append(parts[number - 1][picks])
            ended.add(f"part {number} of {len(parts)}")
            bar.update(len(picks))
        bar.follow(None)
    return core.interleaved(found).tolist()


def cover(run: Run) -> Counts:
    """Write prototypes.parquet, with the chosen pairs; return what was chosen.

    Raises ConfigError if the candidates do not fit in the memory of one node.
    """
    shards, config = run.shard_names, run.config
    count = core.candidates_of(config.pairs, config.cover.candidates)
    count = min(count, run.counts("prune")["images_kept"])
    _check_memory(run, count)
    with progress_bar("cover", 2 * len(shards), "shards") as bar:
        drawn = _drawn(run, count, bar)
        candidates = _gathered(run, drawn, bar)
    with progress_bar("cover", min(config.pairs, len(drawn)), "pairs") as bar:
        picks = [drawn[row] for row in _picks(run, candidates, bar)]
    parts = split_by_shard(picks, shards, run.store)
    chosen = pa.concat_tables(tasks.map_in_order(_look_up, parts, run.store)).sort_by("pair")
    run.folder.save_prototypes(chosen)
    return {
        "prototypes": chosen.num_rows,
        **fewer(config.pairs, chosen.num_rows, "pruning leaves no more images"),
        "candidates": len(drawn),
        "duplicate_captions": chosen.num_rows - len(set(chosen.column("caption").to_pylist())),
        "mean_cosine": float(np.mean(chosen.column("cosine").to_numpy())),
    }


def _check_memory(run: Run, count: int) -> None:
    """Raise ConfigError if `count` candidates do not fit in the memory of one node."""
    needed, there = core.candidate_bytes(count, run.encoder.dim), pools.most_memory()
    if needed > there:
        raise ConfigError(
            f"method coverage holds {count:,} candidates at once, {needed / 2**30:,.1f} GiB; the "
            f"largest node has {there / 2**30:,.1f} GiB for it; take larger nodes, fewer --pairs, "
            "or fewer --cover.candidates"
        )

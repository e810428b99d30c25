"""Clustering: the sample is gathered and fitted in one heavy task a k-means, then every shard is labelled."""

from __future__ import annotations

from typing import Any

import numpy as np

from pds_ray.artifacts import EmbeddingStore, RunFolder, vectors
from pds_ray.config import RunConfig
from pds_ray.distributed import runtime
from pds_ray.progress import progress_bar
from pds_ray.stages import cluster as core


def gather(
    space: str, shards: list[str], store: EmbeddingStore, run: RunFolder, share: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The sampled training vectors of one space, in shard order, and their weights.

    float32 [n, d] ([n, 2d] if joint), float32 [n]. A row is an image in "image", a pair in "text" and "joint".
    """
    parts, weights = [], []
    for shard in shards:
        owner = store.captions(shard, ["image_row"]).column("image_row").to_numpy()
        weight = run.keep(shard).astype(np.float32)
        if space == "image":
            weight = np.bincount(owner, weight).astype(np.float32)
        candidates = np.flatnonzero(weight)
        chosen = candidates[core.sample_rows(len(candidates), share, seed, f"{space}/{shard}")]
        parts.append(_vectors(space, shard, store, owner, chosen))
        weights.append(weight[chosen])
    return np.concatenate(parts), np.concatenate(weights)


def _vectors(
    space: str, shard: str, store: EmbeddingStore, owner: np.ndarray, rows: np.ndarray | slice = slice(None)
) -> np.ndarray:
    """Some rows of a shard in one space: float32 [rows, d], [rows, 2d] if joint. `owner`: image row of each pair."""
    if space == "image":
        return vectors(store.images(shard, ["embedding"]), "embedding")[rows]
    texts = vectors(store.captions(shard, ["embedding"]), "embedding")[rows]
    if space == "text":
        return texts
    return core.joined(vectors(store.images(shard, ["embedding"]), "embedding")[owner[rows]], texts)


def _fit(
    space: str, shards: list[str], store: EmbeddingStore, run: RunFolder, share: float, config: RunConfig
) -> dict[str, Any]:
    rows, weights = gather(space, shards, store, run, share, config.seed)
    fitted = core.fit(rows, weights, config.pairs, config.seed, config.cluster)
    run.save_centroids(space, fitted.centroids)
    return {"rows": fitted.rows, "objective": fitted.objective}


def _label(
    shard: str, store: EmbeddingStore, run: RunFolder, centroids: dict[str, np.ndarray], normalize: bool
) -> np.ndarray:
    """Saves the labels of a shard's pairs; returns the pairs of each cluster, int64 [spaces, K]."""
    kept = run.keep(shard)
    owner = store.captions(shard, ["image_row"]).column("image_row").to_numpy()
    labels, sizes = [], []
    for space, fitted in centroids.items():
        found = core.assign(_vectors(space, shard, store, owner), fitted, normalize)
        of_pair = found[owner] if space == "image" else found
        labels.append(np.where(kept, of_pair, -1).astype(np.int32))
        sizes.append(np.bincount(of_pair[kept], minlength=len(fitted)))
    run.save_labels(shard, labels[0], labels[-1])  # one k-means alone labels both sides
    return np.stack(sizes)


def cluster(
    shards: list[str], counts: dict[str, int], dim: int, store: EmbeddingStore, run: RunFolder, config: RunConfig
) -> dict[str, Any]:
    """Fits what is clustered and labels every pair. `counts`: of pruning. Returns sizes and objectives."""
    run.clusters.delete_all()  # another modality's centroids would outlive a redone run
    spaces = core.spaces(config.cluster)
    result: dict[str, Any] = {}
    with progress_bar("cluster", len(spaces) + len(shards), "steps") as bar:
        for space in spaces:
            rows = counts["images_kept"] if space == "image" else counts["kept"]
            width = 2 * dim if space == "joint" else dim
            bar.set_postfix_str(f"k-means of {rows:,} {space} vectors, K = {config.pairs:,}", refresh=False)
            share = core.sample_share(rows, width, config.cluster, config.pairs)
            result[space] = runtime.run_kmeans(_fit, space, shards, store, run, share, config)
            bar.update()
        centroids = {space: run.centroids(space) for space in spaces}
        sizes = np.zeros((len(spaces), config.pairs), np.int64)
        bar.set_postfix_str("labels", refresh=False)
        for part in runtime.map_in_order(_label, shards, store, run, centroids, config.cluster.normalize):
            sizes += part
            bar.update()
    for space, size in zip(spaces, sizes, strict=True):
        result[space] |= {
            "empty": int((size == 0).sum()),
            "smallest": int(size.min()),
            "median": float(np.median(size)),
            "largest": int(size.max()),
        }
    return result

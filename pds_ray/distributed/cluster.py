"""Clustering: the sample is gathered and fitted in one heavy task a modality, then every shard is labelled."""

from __future__ import annotations

from typing import Any

import numpy as np

from pds_ray.artifacts import MODALITIES, EmbeddingStore, RunFolder, vectors
from pds_ray.config import RunConfig
from pds_ray.distributed import runtime
from pds_ray.progress import progress_bar
from pds_ray.stages import cluster as core


def gather(
    modality: str, shards: list[str], store: EmbeddingStore, run: RunFolder, share: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The sampled training vectors of one modality, in shard order, and their weights. float32 [n, d], float32 [n]."""
    parts, weights = [], []
    for shard in shards:
        kept = run.keep(shard)
        if modality == "image":
            images = store.images(shard, ["embedding"])
            owner = store.captions(shard, ["image_row"]).column("image_row").to_numpy()
            weight = np.bincount(owner[kept], minlength=images.num_rows).astype(np.float32)
            rows = vectors(images, "embedding")
        else:
            rows = vectors(store.captions(shard, ["embedding"]), "embedding")
            weight = kept.astype(np.float32)
        candidates = np.flatnonzero(weight)
        chosen = candidates[core.sample_rows(len(candidates), share, seed, f"{modality}/{shard}")]
        parts.append(rows[chosen])
        weights.append(weight[chosen])
    return np.concatenate(parts), np.concatenate(weights)


def _fit(
    modality: str, shards: list[str], store: EmbeddingStore, run: RunFolder, share: float, config: RunConfig
) -> dict[str, Any]:
    rows, weights = gather(modality, shards, store, run, share, config.seed)
    fitted = core.fit(rows, weights, config.pairs, config.seed, config.cluster)
    run.save_centroids(modality, fitted.centroids)
    return {"rows": fitted.rows, "objective": fitted.objective}


def _label(
    shard: str, store: EmbeddingStore, run: RunFolder, centroids: dict[str, np.ndarray], normalize: bool
) -> np.ndarray:
    kept = run.keep(shard)
    captions = store.captions(shard, ["image_row", "embedding"])
    image_labels = core.assign(vectors(store.images(shard, ["embedding"]), "embedding"), centroids["image"], normalize)
    image = image_labels[captions.column("image_row").to_numpy()]
    text = core.assign(vectors(captions, "embedding"), centroids["text"], normalize)
    image, text = np.where(kept, image, -1).astype(np.int32), np.where(kept, text, -1).astype(np.int32)
    run.save_labels(shard, image, text)
    clusters = len(centroids["image"])
    return np.stack([np.bincount(labels[labels >= 0], minlength=clusters) for labels in (image, text)])


def cluster(
    shards: list[str], counts: dict[str, int], dim: int, store: EmbeddingStore, run: RunFolder, config: RunConfig
) -> dict[str, Any]:
    """Fits both modalities and labels every pair. `counts`: of pruning. Returns sizes and objectives."""
    result: dict[str, Any] = {}
    with progress_bar("cluster", len(MODALITIES) + len(shards), "steps") as bar:
        for modality, rows in zip(MODALITIES, (counts["images_kept"], counts["kept"]), strict=True):
            bar.set_postfix_str(f"k-means of {rows:,} {modality} vectors, K = {config.pairs:,}", refresh=False)
            share = core.sample_share(rows, dim, config.cluster, config.pairs)
            result[modality] = runtime.run_kmeans(_fit, modality, shards, store, run, share, config)
            bar.update()
        centroids = {modality: run.centroids(modality) for modality in MODALITIES}
        sizes = np.zeros((2, config.pairs), np.int64)
        bar.set_postfix_str("labels", refresh=False)
        for part in runtime.map_in_order(_label, shards, store, run, centroids, config.cluster.normalize):
            sizes += part
            bar.update()
    for modality, size in zip(MODALITIES, sizes, strict=True):
        result[modality] |= {
            "empty": int((size == 0).sum()),
            "smallest": int(size.min()),
            "median": float(np.median(size)),
            "largest": int(size.max()),
        }
    return result

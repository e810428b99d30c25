"""Clusters and their matching, counted over all shards."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pds_ray.report.run import OpenRun
from pds_ray.report.values import Json

MATCH_LIMIT = 150
"""Matched clusters in the heat map."""


def gather_clusters(run: OpenRun, step: Callable[[], object]) -> Json | None:
    """Return sizes, shared counts and the contingency table of the largest matched clusters.

    None without clusters or embeddings. `step` is called after each shard.
    """
    if "cluster" not in run.counts or not run.markers:
        return None
    match = run.counts.get("match", {})
    count = int(match.get("clusters") or run.config["pairs"])
    matches, shared = _matches(run)
    largest = matches[np.lexsort((matches[:, 0], -shared))[:MATCH_LIMIT]]
    sizes, table = _count(run, count, largest, step)
    return {
        "clusters": count,
        "sizes": {modality: values.tolist() for modality, values in sizes.items()},
        "empty": {modality: int((values == 0).sum()) for modality, values in sizes.items()},
        "shared": shared.tolist(),
        "pairless": match.get("pairless"),
        "pairless_policy": match.get("pairless_policy"),
        "shared_pairs": match.get("shared_pairs"),
        "kept_pairs": int(sizes["image"].sum()),
        "table": table.tolist(),
        "matches": largest.tolist(),
        "matches_total": len(matches),
    }


def _matches(run: OpenRun) -> tuple[np.ndarray, np.ndarray]:
    """Return image and text cluster of the matched ones, int [K, 2], and their pairs, int [K]."""
    if "match" not in run.counts:
        return np.zeros((0, 2), np.int64), np.zeros(0, np.int64)
    table = run.folder.couples()
    image, text, shared = (
        table.column(name).to_numpy() for name in ("image_cluster", "text_cluster", "shared")
    )
    return np.stack([image, text], axis=1), shared


def _count(
    run: OpenRun, count: int, matches: np.ndarray, step: Callable[[], object]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Count the kept pairs per cluster, and in each image cluster x text cluster of `matches`."""
    row_of, column_of = np.full(count, -1), np.full(count, -1)
    row_of[matches[:, 0]] = column_of[matches[:, 1]] = np.arange(len(matches))
    table = np.zeros((len(matches), len(matches)), np.int64)
    sizes = {"image": np.zeros(count, np.int64), "text": np.zeros(count, np.int64)}
    for shard in run.markers:
        image, text = run.folder.labels(shard)
        kept = (image >= 0) & (text >= 0)
        image, text = image[kept], text[kept]
        sizes["image"] += np.bincount(image, minlength=count)
        sizes["text"] += np.bincount(text, minlength=count)
        row, column = row_of[image], column_of[text]
        inside = (row >= 0) & (column >= 0)
        np.add.at(table, (row[inside], column[inside]), 1)
        step()
    return sizes, table

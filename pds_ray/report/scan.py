"""One pass over all embeddings: the real images nearest to each pair, and a map of the space."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pds_ray.report import space
from pds_ray.report.run import OpenRun
from pds_ray.report.values import Json
from pds_ray.store.distilled_set import DistilledSet
from pds_ray.store.schemas import embeddings

NEAREST = 3
"""Real images shown with each pair."""
SAMPLE, DRAWN, SAMPLE_SEED = 5_000, 2_000, 0
"""Number of embeddings that the map is fitted on, and how many of them are drawn."""


@dataclass(frozen=True)
class Scan:
    """The results of one pass over all embeddings."""

    nearest: list[list[Json]]
    """Per shown pair, its nearest real images: shard, key, cosine; empty lists in a selection."""
    space: Json | None
    """The map; None without pairs."""
    coverage: dict[str, tuple[float, float]]
    """Cosines of a sample of images, and of captions, to the nearest pairs; empty without."""


def scan_embeddings(run: OpenRun, step: Callable[[], object]) -> Scan:
    """Find the real images nearest to each shown prototype, and fit a map on a sample.

    `step` is called after each shard.
    """
    distilled, shards = run.distilled, list(run.markers)
    images, texts, starts = [], [], [0]
    image_rows, text_rows = _sample(run, "images", 0), _sample(run, "pairs", 1)
    prototypes = distilled.image_prototypes[: run.shown] if distilled else np.zeros((0, 0))
    search = run.shown > 0 and not (distilled and distilled.is_selection)
    top = space.no_rows(run.shown, NEAREST)
    for shard, rows, pairs in zip(shards, image_rows, text_rows, strict=True):
        table = embeddings(run.store.images(shard, ["embedding"]))
        images.append(table[rows])
        starts.append(starts[-1] + len(table))
        if search:
            space.add_rows(top, prototypes, table)
        texts.append(embeddings(run.store.captions(shard, ["embedding"]).take(pa.array(pairs))))
        step()
    nearest = _named(run, shards, starts, top) if search else [[] for _ in range(run.shown)]
    if distilled is None:
        return Scan(nearest, None, {})
    sample = {"images": np.concatenate(images), "captions": np.concatenate(texts)}
    plot = _map(distilled, run.shown, sample["images"], sample["captions"])
    return Scan(nearest, plot, _coverage(distilled, sample))


def _coverage(
    distilled: DistilledSet, sample: dict[str, np.ndarray]
) -> dict[str, tuple[float, float]]:
    """Return mean and 5th percentile of the cosine to the nearest pair, of each modality."""
    pairs = {"images": distilled.image_prototypes, "captions": distilled.text_prototypes}
    return {
        side: space.covered(rows, pairs[side])
        for side, rows in sample.items()
        if len(rows) and len(distilled)
    }


def _sample(run: OpenRun, count: str, stream: int) -> list[np.ndarray]:
    """Return the sampled rows of each shard, of images or of pairs."""
    sizes = [marker[count] for marker in run.markers.values()]
    return space.sample_places(sizes, SAMPLE, SAMPLE_SEED + stream)


def _named(run: OpenRun, shards: list[str], starts: list[int], top: space.Top) -> list[list[Json]]:
    """Return shard, key and cosine of rows that are counted over the whole store."""
    number = np.searchsorted(starts, top.row, side="right") - 1
    keys: dict[int, str] = {}
    for shard in np.unique(number[top.row >= 0]):
        rows = np.unique(top.row[number == shard])
        column = run.store.images(shards[shard], ["key"]).column("key")
        names = column.take(pa.array(rows - starts[shard])).to_pylist()
        keys.update(zip(rows.tolist(), names, strict=True))
    return [
        [
            {"shard": shards[of], "key": keys[row], "cosine": round(float(cosine), 4)}
            for of, row, cosine in zip(*found, strict=True)
            if row >= 0
        ]
        for found in zip(number.tolist(), top.row.tolist(), top.cosine, strict=True)
    ]


def _map(distilled: DistilledSet, shown: int, images: np.ndarray, texts: np.ndarray) -> Json | None:
    """Return sample and prototypes on a plane per modality; None if there is too little to fit."""
    if min(len(images), len(texts)) <= 2 or images.shape[1] <= 1:
        return None
    return {
        "made": not distilled.is_selection,
        "image": _pca(images, distilled.image_prototypes[:shown]),
        "text": _pca(texts, distilled.text_prototypes[:shown]),
        "captions": distilled.captions[:shown],
    }


def _pca(sample: np.ndarray, prototypes: np.ndarray) -> Json:
    """Return sample and prototypes on the first two principal components of the sample."""
    plane = space.fit_plane(sample)
    drawn = plane.project(sample[:: -(-len(sample) // DRAWN)])  # every n-th: shards are in order
    return {
        "sample": np.round(drawn, 4).tolist(),
        "prototypes": np.round(plane.project(prototypes), 4).tolist(),
        "explained": [round(share, 4) for share in plane.explained],
        "fitted_on": len(sample),
    }

"""Embedding stores made of numbers, and the same numbers in one piece for brute-force oracles."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from pds_ray.stages.embed import cosine, shard_counts
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.schemas import ERROR_SCHEMA, caption_schema, embedding_array, image_schema
from pds_ray.store.storage import Folder


@dataclass
class Gathered:
    """The content of a store as plain arrays in shard order: data of the brute-force oracles."""

    shards: list[str]
    image: np.ndarray
    text: np.ndarray
    similarity: np.ndarray
    keys: list[str]
    captions: list[str]


def make_store(
    folder: Path,
    rows_per_shard: list[int],
    seed: int = 0,
    dim: int = 8,
    distinct: tuple[int, int] | None = None,
) -> tuple[EmbeddingStore, Gathered]:
    """A store of a seeded mixture: one to three captions per image, near it.

    `distinct` are numbers of different images and captions, of which there are copies then.
    """
    rng = np.random.default_rng(seed)
    images = sum(rows_per_shard)
    centers = rng.normal(size=(6, dim)) * 3
    image = (centers[rng.integers(6, size=images)] + rng.normal(size=(images, dim))).astype(
        np.float32
    )
    counts = rng.integers(1, 4, size=images)
    owner = np.repeat(np.arange(images), counts)
    text = (image[owner] + rng.normal(size=(len(owner), dim)) * 0.7).astype(np.float32)
    if distinct:
        image = image[np.arange(images) % distinct[0]]
        text = text[np.searchsorted(owner, owner % distinct[1])]
    similarity = cosine(image[owner], text)
    store = EmbeddingStore(Folder(str(folder)))
    names, start = [], 0
    for number, rows in enumerate(rows_per_shard):
        name = f"{number:05d}"
        mine = np.flatnonzero((owner >= start) & (owner < start + rows))
        keys = [f"k{start + row}" for row in range(rows)]
        tables = (
            pa.table(
                {
                    "key": keys,
                    "index": np.arange(rows, dtype=np.int32),
                    "embedding": embedding_array(image[start : start + rows], "float32"),
                    "width": np.full(rows, 8, np.int32),
                    "height": np.full(rows, 8, np.int32),
                },
                schema=image_schema(dim, "float32"),
            ),
            pa.table(
                {
                    "key": [f"k{row}" for row in owner[mine]],
                    "image_row": (owner[mine] - start).astype(np.int32),
                    "caption_index": np.zeros(len(mine), np.int32),
                    "caption": [f"caption {pair}" for pair in mine],
                    "embedding": embedding_array(text[mine], "float32"),
                    "similarity": similarity[mine],
                },
                schema=caption_schema(dim, "float32"),
            ),
            ERROR_SCHEMA.empty_table(),
        )
        store.commit(name, *tables, {**asdict(shard_counts(*tables)), "precision": "fp32"})
        names.append(name)
        start += rows
    captions = [f"caption {pair}" for pair in range(len(owner))]
    return store, Gathered(
        names, image[owner], text, similarity, [f"k{row}" for row in owner], captions
    )

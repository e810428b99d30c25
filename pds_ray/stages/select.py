"""Selection: real pairs instead of prototypes (docs/methods.md, "Selectors").

A chosen pair goes on as a prototype does: its two embeddings are the prototypes, its caption the
retrieved one, its image the nearest one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa

from pds_ray.selectors.base import Candidates
from pds_ray.stages.vectors import normalized
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.schemas import embeddings, prototype_schema, vector_array


def candidate_bytes(images: int, pairs: int, dim: int) -> int:
    """Return the memory that the result of `load_candidates` takes."""
    return 4 * dim * (images + pairs) + (8 + 4) * pairs


def load_candidates(
    shards: list[str],
    store: EmbeddingStore,
    dim: int,
    tell: Callable[[str], object] = lambda _what: None,
) -> Candidates:
    """Load all pairs of the shards, in their order.

    Besides the result no more than one shard is held at a time. `tell` is called with what is
    waited for, here and by selectors.
    """
    markers = store.committed()
    images, pairs = (sum(markers[shard][name] for shard in shards) for name in ("images", "pairs"))
    candidates = Candidates(
        np.empty((images, dim), np.float32),
        np.empty((pairs, dim), np.float32),
        np.empty(pairs, np.int64),
        np.empty(pairs, np.float32),
        tell,
    )
    image = pair = 0
    for shard in shards:
        tell(f"the embeddings of shard {shard} to be loaded")
        vectors = normalized(embeddings(store.images(shard, ["embedding"])))
        captions = store.captions(shard, ["image_row", "embedding", "similarity"])
        rows = slice(pair, pair + captions.num_rows)
        candidates.image[image : image + len(vectors)] = vectors
        candidates.text[rows] = normalized(embeddings(captions))
        candidates.owner[rows] = captions.column("image_row").to_numpy().astype(np.int64) + image
        candidates.similarity[rows] = captions.column("similarity").to_numpy()
        image, pair = image + len(vectors), rows.stop
    return candidates


def split_by_shard(
    picks: list[int], shards: list[str], store: EmbeddingStore
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Split picks by shard: shard, places among the picks and rows in it, int64 both.

    Shards without a pick are left out.
    """
    markers = store.committed()
    starts = np.concatenate([[0], np.cumsum([markers[shard]["pairs"] for shard in shards])])
    rows = np.asarray(picks, np.int64)
    of = np.searchsorted(starts, rows, side="right") - 1
    return [
        (shards[number], np.flatnonzero(of == number), rows[of == number] - starts[number])
        for number in np.unique(of)
    ]


def chosen_pairs(
    shard: str, places: np.ndarray, rows: np.ndarray, store: EmbeddingStore
) -> pa.Table:
    """Return rows of prototypes.parquet for the chosen pairs of a shard, numbered by place."""
    captions = store.captions(shard).take(rows)
    images = store.images(shard, ["embedding"]).take(captions.column("image_row"))
    image, text = embeddings(images), embeddings(captions)
    keys = captions.column("key").to_pylist()
    count = len(rows)
    return pa.table(
        {
            "pair": places.astype(np.int32),
            "image_prototype": vector_array(image),
            "text_prototype": vector_array(text),
            "cosine": captions.column("similarity").to_numpy().astype(np.float64),
            "image_cluster": np.full(count, -1, np.int32),
            "text_cluster": np.full(count, -1, np.int32),
            "shared": np.ones(count, np.int64),
            "member_norm": np.linalg.norm(image.astype(np.float64), axis=1),
            "caption": captions.column("caption"),
            "caption_shard": [shard] * count,
            "caption_key": keys,
            "caption_cosine": np.ones(count, np.float32),
            "nearest_shard": [shard] * count,
            "nearest_key": keys,
            "nearest_cosine": np.ones(count, np.float32),
            "members": [[f"{shard}/{key}"] for key in keys],
        },
        schema=prototype_schema(image.shape[1]),
    )

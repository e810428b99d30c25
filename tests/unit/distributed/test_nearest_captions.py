"""Lists of captions over shards, against a sort of all captions; tasks run in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tqdm import tqdm

from pds_ray.distributed import caption, nearest_captions, tasks
from pds_ray.stages import captions as core
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.schemas import caption_schema, embedding_array
from pds_ray.store.storage import Folder

DIM = 6


def in_this_process(
    function: Callable[..., Any], items: Iterable[Any], *shared: Any
) -> Iterator[Any]:
    return (function(item, *shared) for item in items)


def fill(store: EmbeddingStore, shard: str, texts: list[str], vectors: np.ndarray) -> None:
    columns = {
        "key": [f"{shard}-{n}" for n in range(len(texts))],
        "image_row": np.zeros(len(texts), np.int32),
        "caption_index": np.zeros(len(texts), np.int32),
        "caption": texts,
        "embedding": embedding_array(vectors, "float32"),
        "similarity": np.zeros(len(texts), np.float32),
    }
    table = pa.table(columns, schema=caption_schema(DIM, "float32"))
    store.folder.write_table(shard + store.CAPTIONS, table)


def test_lists_are_exact_and_name_the_nearest_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "map_in_order", in_this_process)
    monkeypatch.setattr(core, "LONGEST_LIST", 12)
    rng = np.random.default_rng(0)
    store = EmbeddingStore(Folder(str(tmp_path)))
    store.folder.create()
    shards, texts, parts = ["a", "b", "c"], [], []
    for shard, count in zip(shards, (20, 3, 30), strict=True):
        vectors = rng.standard_normal((count, DIM)).astype(np.float32)
        fill(store, shard, [f"{shard} {n}" for n in range(count)], vectors)
        texts += [f"{shard} {n}" for n in range(count)]
        parts.append(vectors)
    vectors = np.concatenate(parts)
    images = rng.standard_normal((5, DIM)).astype(np.float32)
    queries = rng.standard_normal((5, DIM)).astype(np.float32)
    with tqdm(disable=True) as bar:
        lists = nearest_captions.nearest_captions(shards, store, queries, images, bar)

    def cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        norms = np.outer(np.linalg.norm(left, axis=1), np.linalg.norm(right, axis=1))
        return left @ right.T / norms

    to_queries, to_images = cosines(queries, vectors), cosines(vectors, images)
    for query, own in enumerate(lists):
        order = np.argsort(-to_queries[query])[:12]
        assert [each.text for each in own] == [texts[row] for row in order]
        assert [each.finds for each in own] == to_images[order].argmax(axis=1).tolist()
        found = [each.cosine for each in own]
        np.testing.assert_allclose(found, to_queries[query][order], atol=1e-6)
        assert all(each.key == each.text.replace(" ", "-") for each in own)
        assert all(each.shard == each.text[0] for each in own)

    columns, counts = caption._accepted(lists)
    for image, own in enumerate(lists):
        fitting = [each.text for each in own if each.finds == image]
        if fitting:
            assert columns["caption"][image] == fitting[0]
    finding = [any(each.finds == image for each in own) for image, own in enumerate(lists)]
    assert counts == {"round_trip": sum(finding)}

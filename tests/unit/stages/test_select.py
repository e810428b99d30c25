"""Candidates of selectors, and the table of the chosen, against the same numbers gathered."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from pds_ray.stages.select import chosen_pairs, load_candidates, split_by_shard
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.schemas import prototype_schema, vectors
from tests.support.synthetic_store import Gathered, make_store

ROWS = [5, 1, 12, 7]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[EmbeddingStore, Gathered]:
    return make_store(tmp_path_factory.mktemp("select") / "store", ROWS)


def shard_of(data: Gathered, pair: int) -> str:
    """Keys of the synthetic store count all images."""
    return data.shards[
        int(np.searchsorted(np.cumsum(ROWS), int(data.keys[pair][1:]), side="right"))
    ]


def test_the_candidates_are_the_gathered_arrays(made: tuple[EmbeddingStore, Gathered]):
    store, data = made
    candidates = load_candidates(data.shards, store, 8)
    assert candidates.image.shape == (sum(ROWS), 8)
    assert [array.dtype for array in (candidates.image, candidates.text)] == [np.float32] * 2
    assert candidates.owner.tolist() == [int(key[1:]) for key in data.keys]

    def unit(rows: np.ndarray) -> np.ndarray:
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    np.testing.assert_allclose(candidates.image[candidates.owner], unit(data.image), rtol=1e-6)
    np.testing.assert_allclose(candidates.text, unit(data.text), rtol=1e-6)
    assert (candidates.similarity == data.similarity).all()


def test_a_chosen_pair_is_recorded_as_it_is_in_the_source(made: tuple[EmbeddingStore, Gathered]):
    store, data = made
    picks = np.random.default_rng(3).permutation(len(data.keys))[:11].tolist()
    parts = split_by_shard(picks, data.shards, store)
    assert [shard for shard, _, _ in parts] == sorted({shard_of(data, pick) for pick in picks})
    table = pa.concat_tables(chosen_pairs(*part, store) for part in parts).sort_by("pair")
    assert table.schema == prototype_schema(8)
    assert table.column("pair").to_pylist() == list(range(11))
    assert (vectors(table, "image_prototype") == data.image[picks]).all()
    assert (vectors(table, "text_prototype") == data.text[picks]).all()
    for row, pick in zip(
        table.drop_columns(["image_prototype", "text_prototype"]).to_pylist(), picks, strict=True
    ):
        shard, key = shard_of(data, pick), data.keys[pick]
        norm = np.linalg.norm(data.image[pick].astype(np.float64))
        assert row.pop("member_norm") == pytest.approx(norm, rel=1e-12)
        assert row.pop("pair") == picks.index(pick)
        assert row == {
            "cosine": float(data.similarity[pick]),
            "image_cluster": -1,
            "text_cluster": -1,
            "shared": 1,
            "caption": data.captions[pick],
            "caption_shard": shard,
            "caption_key": key,
            "caption_cosine": 1.0,
            "nearest_shard": shard,
            "nearest_key": key,
            "nearest_cosine": 1.0,
            "members": [f"{shard}/{key}"],
        }

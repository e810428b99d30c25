"""The data contract: what is saved comes back, bit for bit."""

from __future__ import annotations

import hashlib
import math
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pds_ray.store import schemas
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.schemas import embedding_array, embeddings, vector_array, vectors
from pds_ray.store.storage import Folder


@settings(max_examples=40)
@given(
    st.integers(0, 30),
    st.integers(1, 9),
    st.sampled_from(["float16", "float32"]),
    st.integers(0, 30),
    st.integers(0, 30),
    st.integers(0, 10**6),
)
def test_embeddings_come_back(rows, dim, dtype, start, length, seed):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((rows, dim)).astype(np.float32)
    stored, names = values.astype(dtype).astype(np.float32), [f"k{row}" for row in range(rows)]
    schema = pa.schema([("key", pa.string()), schemas.embedding_field(dim, dtype)])
    table = pa.table({"key": names, "embedding": embedding_array(values, dtype)}, schema=schema)
    file = pa.BufferOutputStream()
    pq.write_table(table, file, row_group_size=7)
    for each in (table, pq.read_table(pa.BufferReader(file.getvalue()))):
        assert embeddings(each).dtype == np.float32
        np.testing.assert_array_equal(embeddings(each), stored)
        np.testing.assert_array_equal(
            embeddings(each.slice(start, length)), stored[start : start + length]
        )
        twice = pa.concat_tables(
            [each.slice(start), each.select(["embedding", "key"]).select(["key", "embedding"])]
        )
        np.testing.assert_array_equal(embeddings(twice), np.concatenate([stored[start:], stored]))
        np.testing.assert_array_equal(embeddings(twice.combine_chunks()), embeddings(twice))
        some = rng.integers(0, rows, length if rows else 0)
        np.testing.assert_array_equal(
            embeddings(each.take(pa.array(some, pa.int64()))), stored[some]
        )


def test_embeddings_are_little_endian_numbers_one_after_the_other():
    (found,) = embedding_array(np.array([[1.0, -2.5, 65504.0]]), "float16").to_pylist()
    assert found == struct.pack("<3e", 1.0, -2.5, 65504.0)
    (found,) = embedding_array(np.array([[1.0, 1e30]]), "float32").to_pylist()
    assert found == struct.pack("<2f", 1.0, 1e30)


def test_no_rows_keep_the_width():
    schema = schemas.image_schema(7, "float16")
    assert embeddings(schema.empty_table()).shape == (0, 7)
    assert embeddings(pa.concat_tables([schema.empty_table()] * 2)).shape == (0, 7)
    assert embeddings(pa.Table.from_batches([], schema=schema)).shape == (0, 7)
    prototypes = schemas.prototype_schema(7)
    assert vectors(prototypes.empty_table(), "image_prototype").shape == (0, 7)
    assert vectors(pa.Table.from_batches([], schema=prototypes), "image_prototype").shape == (0, 7)


@settings(max_examples=20)
@given(
    st.integers(0, 30),
    st.integers(1, 9),
    st.integers(0, 30),
    st.integers(0, 30),
    st.integers(0, 10**6),
)
def test_vectors_come_back(rows, dim, start, length, seed):
    values = np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
    table = pa.table({"v": vector_array(values)})
    assert table.schema.field("v").type == pa.list_(pa.float32(), dim)
    np.testing.assert_array_equal(vectors(table, "v"), values)
    np.testing.assert_array_equal(
        vectors(table.slice(start, length), "v"), values[start : start + length]
    )
    twice = pa.concat_tables([table.slice(start), table])
    np.testing.assert_array_equal(vectors(twice, "v"), np.concatenate([values[start:], values]))


@pytest.mark.parametrize(
    "values", [np.zeros((3, 8))[:, ::2], np.zeros((4, 3)).T, np.arange(12.0).reshape(3, 4)[::-1]]
)
def test_views_are_taken_as_they_look(values):
    np.testing.assert_array_equal(vectors(pa.table({"v": vector_array(values)}), "v"), values)
    schema = pa.schema([schemas.embedding_field(values.shape[1], "float32")])
    table = pa.table({"embedding": embedding_array(values, "float32")}, schema=schema)
    np.testing.assert_array_equal(embeddings(table), values)


def tables(dim=3, dtype="float16", rows=4):
    embedding = np.random.default_rng(0).standard_normal((rows, dim))
    keys = [f"k{i}" for i in range(rows)]
    numbers = np.arange(rows, dtype=np.int32)
    images = pa.table(
        {
            "key": keys,
            "index": numbers,
            "embedding": embedding_array(embedding, dtype),
            "width": numbers,
            "height": numbers,
        },
        schema=schemas.image_schema(dim, dtype),
    )
    captions = pa.table(
        {
            "key": keys,
            "image_row": numbers,
            "caption_index": numbers,
            "caption": ["", "ü|\n", "x" * 3000, "a"][:rows],
            "embedding": embedding_array(-embedding, dtype),
            "similarity": embedding[:, 0].astype(np.float32),
        },
        schema=schemas.caption_schema(dim, dtype),
    )
    errors = pa.table(
        {"key": ["e"], "reason": ["not_a_tar"], "detail": [""]}, schema=schemas.ERROR_SCHEMA
    )
    return images, captions, errors


COUNTS = {"images": 4, "pairs": 4, "bad": 1, "reasons": {"not_a_tar": 1}, "precision": "fp32"}


def test_a_shard_is_there_when_its_marker_is(tmp_path, monkeypatch):
    store = EmbeddingStore(Folder(str(tmp_path)))
    images, captions, errors = tables()

    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write_json", dies)
        with pytest.raises(KeyboardInterrupt):
            store.commit("s0", images, captions, errors, COUNTS)
    assert store.committed() == {}

    store.folder.write_json(store.STORE, {})
    store.commit("s0", images, captions, errors, COUNTS)
    store.commit("s1.x-y_z", *(table.slice(0, 0) for table in (images, captions, errors)), COUNTS)
    assert store.committed().keys() == {"s0", "s1.x-y_z"}
    assert EmbeddingStore(store.folder, "of other data").committed() == {}, (
        "markers of another fingerprint count"
    )
    assert store.images("s0").equals(images, check_metadata=True)
    assert store.captions("s0").equals(captions, check_metadata=True)
    assert store.errors("s0").equals(errors)
    assert store.captions("s0", ["key"]).column_names == ["key"]
    assert store.images("s1.x-y_z").schema.equals(images.schema, check_metadata=True)

    marker = store.committed()["s0"]
    assert marker["images"] == 4
    assert len(marker["sha256"]) == 3
    for name, digest in marker["sha256"].items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest


def test_shards_as_another_version_wrote_them_are_not_there(tmp_path):
    store = EmbeddingStore(Folder(str(tmp_path)))
    for name in ("old", "mine"):
        store.commit(name, *tables(), COUNTS)
    marker = store.folder.read_json("old.json")
    store.folder.write_json("old.json", {**marker, "schema": marker["schema"] - 1})
    assert store.committed().keys() == {"mine"}
    del marker["schema"]
    store.folder.write_json("old.json", marker)
    assert store.committed().keys() == {"mine"}


class Killed(BaseException):
    """As by SIGKILL: nobody cleans up behind it."""


def whole(store):
    """The shards that are there; each with the very files that its marker means."""
    there = store.committed()
    for marker in there.values():
        for name, digest in marker["sha256"].items():
            assert (
                hashlib.sha256((Path(store.folder.path) / name).read_bytes()).hexdigest() == digest
            )
    return there


def kill_at(step, after, patch):
    """The process dies before or after the given change of files."""
    steps = iter(range(100))

    def dying(method):
        def call(*args):
            mine = next(steps) == step
            if mine and not after:
                raise Killed
            method(*args)
            if mine:
                raise Killed

        return call

    for name in ("delete", "write_bytes"):
        patch.setattr(Folder, name, dying(getattr(Folder, name)))


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    "step", range(6)
)  # the marker away, three files, the marker, the note of failure away
def test_a_shard_that_is_committed_again_is_never_a_mixture(tmp_path, monkeypatch, step, after):
    """Killed at any step it is as it was, as it is to be, or not there; a repetition mends it."""
    store = EmbeddingStore(Folder(str(tmp_path)))
    old, new = tables(), tables(rows=3)
    store.commit("s0", *old, COUNTS)
    store.fail("s0", "to be tried again")
    with monkeypatch.context() as patch:
        kill_at(step, after, patch)
        with pytest.raises(Killed):
            store.commit("s0", *new, COUNTS)
    assert bool(whole(store)) == (step + after in (0, 5, 6))
    if whole(store):
        assert store.images("s0").equals((new if step else old)[0])
    store.commit("s0", *new, COUNTS)
    assert whole(store).keys() == {"s0"}
    assert store.images("s0").equals(new[0])
    assert store.failed() == {}


@pytest.fixture
def run(tmp_path):
    return RunFolder(Folder(str(tmp_path)))


def test_centroids(run):
    centroids = np.random.default_rng(1).standard_normal((5, 3)).astype(np.float32)
    for modality in schemas.MODALITIES:
        run.save_centroids(modality, centroids)
        found = run.centroids(modality)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, centroids)
        assert run.cells(modality) == {}


def test_centroids_in_cells(run):
    assert not run.has_centroids("text")
    centroids, coarse = np.eye(5, 3, dtype=np.float32), np.ones((2, 3), np.float32)
    run.save_centroids("text", centroids, coarse=coarse, starts=np.array([0, 1, 5]))
    assert run.has_centroids("text")
    np.testing.assert_array_equal(run.centroids("text"), centroids)
    cells = run.cells("text")
    np.testing.assert_array_equal(cells.pop("coarse"), coarse)
    assert cells.pop("starts").tolist() == [0, 1, 5]
    assert cells == {}
    weights = np.arange(5, dtype=np.float32)
    run.save_cell_sample("text", 7, centroids, weights)
    for saved, found in zip((centroids, weights), run.cell_sample("text", 7), strict=True):
        np.testing.assert_array_equal(found, saved)


def test_what_is_clustered_already(run):
    assert run.fits() == {}
    assert run.labelled() == set()
    run.save_fits({"made_from": 1})
    assert run.fits() == {"made_from": 1}
    run.save_labels("a.b", np.zeros(2, np.int32), np.ones(2, np.int32))
    assert run.labelled() == {"a.b"}


@pytest.mark.parametrize("rows", [0, 1, 13])
def test_masks_and_labels(run, rows):
    rng = np.random.default_rng(rows)
    kept = rng.random(rows) < 0.5
    image, text = rng.integers(-1, 9, (2, rows)).astype(np.int32)
    run.save_keep("a.b", kept)
    run.save_labels("a.b", image, text)
    assert run.keep("a.b").dtype == bool
    np.testing.assert_array_equal(run.keep("a.b"), kept)
    np.testing.assert_array_equal(run.labels("a.b")[0], image)
    np.testing.assert_array_equal(run.labels("a.b")[1], text)
    assert run.labels("a.b")[0].dtype == np.int32


def test_couples_and_prototypes(run):
    couples = pa.table(
        {
            "image_cluster": [0],
            "text_cluster": [2],
            "shared": [7],
            "pairless": [False],
            "mean_cosine": [math.pi],
        },
        schema=schemas.COUPLE_SCHEMA,
    )
    run.save_couples(couples)
    assert run.couples().equals(couples)
    schema = schemas.prototype_schema(3)
    vector = vector_array(np.arange(3.0)[None])
    values = {field.name: ["x"] if field.type == pa.string() else [1] for field in schema}
    values |= {"image_prototype": vector, "text_prototype": vector, "members": [["s/a", "s/b"]]}
    prototypes = pa.table(values, schema=schema)
    run.save_prototypes(prototypes)
    assert run.prototypes().equals(prototypes)


def test_pictures_sort_by_pair(run):
    names = [run.image_name(pair) for pair in (0, 9, 10, 99_999, 100_000)]
    assert names == sorted(names)

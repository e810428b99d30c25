"""Arrays come back from tables bit for bit."""

from __future__ import annotations

import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pds_ray.store import schemas
from pds_ray.store.schemas import embedding_array, embeddings, vector_array, vectors


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


def test_every_half_is_read_bit_for_bit():
    """Zeros, subnormals, infinities and all that are not numbers; of finite ones alone, too."""
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    for halves in (every, every[np.isfinite(every)]):
        schema = pa.schema([schemas.embedding_field(len(halves), "float16")])
        table = pa.table({"embedding": embedding_array(halves[None], "float16")}, schema=schema)
        exact = [struct.unpack("<e", half.tobytes())[0] for half in halves]
        expected = np.array(exact, np.float32)
        found = embeddings(table)[0]
        numbers = ~np.isnan(expected)
        np.testing.assert_array_equal(np.isnan(found), ~numbers)
        assert found[numbers].tobytes() == expected[numbers].tobytes()


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

"""Columns and dtypes of every table, and tables as arrays and back."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

STORE_SCHEMA_VERSION = (
    3  # 2: captions are embedded in contexts of their length; 3: embeddings as bytes
)

MODALITIES = ("image", "text")

MARKER_FIELDS = {  # what a commit marker says besides its fingerprint and the version of its files
    "shard": str,
    "images": int,
    "pairs": int,
    "bad": int,
    "reasons": dict,  # of the bad samples -> how many
    "precision": str,
    "sha256": dict,
}

SHARD_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("location", pa.string()),
        ("size", pa.int64()),
        ("version", pa.string()),
    ]
)

ERROR_SCHEMA = pa.schema([("key", pa.string()), ("reason", pa.string()), ("detail", pa.string())])

KEEP_SCHEMA = pa.schema([("kept", pa.bool_())])

LABEL_SCHEMA = pa.schema([("image_cluster", pa.int32()), ("text_cluster", pa.int32())])

CHOSEN_CAPTION_SCHEMA = pa.schema(
    [
        ("pair", pa.int32()),
        ("caption", pa.string()),
        ("caption_shard", pa.string()),
        ("caption_key", pa.string()),
        (
            "caption_cosine",
            pa.float32(),
        ),  # to what it was chosen by: the picture, or the text prototype
    ]
)

COUPLE_SCHEMA = pa.schema(
    [
        ("image_cluster", pa.int32()),
        ("text_cluster", pa.int32()),
        ("shared", pa.int64()),
        ("pairless", pa.bool_()),
        ("mean_cosine", pa.float64()),
    ]
)


def embedding_field(dim: int, dtype: str) -> pa.Field:
    """A column of embeddings: the d numbers of each as bytes, little-endian; their dtype is in the field's metadata.

    Parquet reads and writes lists number by number, which takes longer than all that is done with the embeddings;
    prototypes, which are few, stay lists that others can read.
    """
    return pa.field(
        "embedding",
        pa.binary(dim * np.dtype(dtype).itemsize),
        nullable=False,
        metadata={"dtype": dtype},
    )


def image_schema(dim: int, dtype: str) -> pa.Schema:
    """Columns of S.images.parquet."""
    return pa.schema(
        [
            ("key", pa.string()),
            ("index", pa.int32()),
            embedding_field(dim, dtype),
            ("width", pa.int32()),
            ("height", pa.int32()),
        ]
    )


def caption_schema(dim: int, dtype: str) -> pa.Schema:
    """Columns of S.captions.parquet."""
    return pa.schema(
        [
            ("key", pa.string()),
            ("image_row", pa.int32()),
            ("caption_index", pa.int32()),
            ("caption", pa.string()),
            embedding_field(dim, dtype),
            ("similarity", pa.float32()),
        ]
    )


def prototype_schema(dim: int) -> pa.Schema:
    """Columns of prototypes.parquet, one row per distilled pair."""
    vector = pa.list_(pa.float32(), dim)
    return pa.schema(
        [
            ("pair", pa.int32()),
            ("image_prototype", vector),
            ("text_prototype", vector),
            ("cosine", pa.float64()),  # between the two prototypes; the pairs fall in it
            ("image_cluster", pa.int32()),
            ("text_cluster", pa.int32()),
            (
                "shared",
                pa.int64(),
            ),  # pairs in both clusters: those averaged, if there are any and match.filter is on
            ("member_norm", pa.float64()),  # mean norm of the averaged image embeddings
            ("caption", pa.string()),  # retrieved: the caption nearest to the text prototype
            ("caption_shard", pa.string()),
            ("caption_key", pa.string()),
            ("caption_cosine", pa.float32()),
            ("nearest_shard", pa.string()),  # the real image nearest to the image prototype
            ("nearest_key", pa.string()),
            ("nearest_cosine", pa.float32()),
            (
                "members",
                pa.list_(pa.string()),
            ),  # up to MEMBER_SAMPLE of the averaged pairs, as shard/key
        ]
    )


MEMBER_SAMPLE = 8


def embeddings(table: pa.Table) -> np.ndarray:
    """The embeddings of a table with an `embedding_field`, float32 [rows, d]."""
    field, column = table.schema.field("embedding"), table.column("embedding")
    dtype = np.dtype(field.metadata[b"dtype"].decode()).newbyteorder("<")
    row_bytes = field.type.byte_width
    found = np.empty((len(column), row_bytes // dtype.itemsize), np.float32)
    done = 0
    for chunk in filter(len, column.chunks):
        data = np.frombuffer(
            chunk.buffers()[1], dtype, len(chunk) * found.shape[1], chunk.offset * row_bytes
        )
        found[done : done + len(chunk)] = data.reshape(len(chunk), -1)
        done += len(chunk)
    return found


def embedding_array(values: np.ndarray, dtype: str) -> pa.FixedSizeBinaryArray:
    """[rows, d] as what an `embedding_field` of that `dtype` holds."""
    data = np.ascontiguousarray(values, dtype=np.dtype(dtype).newbyteorder("<"))
    rows, dim = data.shape
    return pa.Array.from_buffers(pa.binary(dim * data.itemsize), rows, [None, pa.py_buffer(data)])


def vectors(table: pa.Table, column: str) -> np.ndarray:
    """A fixed-size-list column as float32 [rows, d]."""
    array = table.column(column).combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    width = array.type.list_size
    return np.asarray(array.flatten()).reshape(-1, width)


def vector_array(values: np.ndarray) -> pa.FixedSizeListArray:
    """[rows, d] as a fixed-size-list array of float32."""
    flat = pa.array(np.ascontiguousarray(values, dtype=np.float32).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])

"""Columns and dtypes of every table, and conversions between tables and arrays."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

# 2: captions are embedded in contexts of their length; 3: embeddings as bytes
STORE_SCHEMA_VERSION = 3

MODALITIES = ("image", "text")

# fields of a commit marker besides the fingerprint and the schema version
MARKER_FIELDS = {
    "shard": str,
    "images": int,
    "pairs": int,
    "bad": int,
    "reasons": dict,  # reason -> number of bad samples
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
        # to what caption.nearest_to names: the image, or the text prototype
        ("caption_cosine", pa.float32()),
    ]
)

CHOICE_SCHEMA = pa.schema(
    [
        ("pair", pa.int32()),
        ("origin", pa.string()),  # synthetic or real
        ("candidate", pa.int32()),  # null for a real image
        ("noise_level", pa.int32()),  # null for a real image
        ("image_cosine", pa.float64()),  # of the image to the pair's image prototype
        ("text_cosine", pa.float64()),  # of the image to the pair's text prototype
        ("score", pa.float64()),
        ("round_trip", pa.bool_()),  # of all image prototypes its own is nearest to the image
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


PROTOTYPE_VECTORS = ("image_prototype", "text_prototype")
"""The columns of prototypes.parquet that are large."""
MEMBER_SAMPLE = 8
HALVES_AT_ONCE = 1 << 17  # numbers whose float32 the cache holds


def embedding_field(dim: int, dtype: str) -> pa.Field:
    """Return the field of an embedding column: d little-endian numbers of `dtype` as bytes.

    The dtype is in the field's metadata. Parquet reads and writes lists number by number, which
    takes longer than all the work on the embeddings; prototypes, which are few, stay lists that
    other tools can read.
    """
    return pa.field(
        "embedding",
        pa.binary(dim * np.dtype(dtype).itemsize),
        nullable=False,
        metadata={"dtype": dtype},
    )


def image_schema(dim: int, dtype: str) -> pa.Schema:
    """Return the columns of S.images.parquet."""
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
    """Return the columns of S.captions.parquet."""
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
    """Return the columns of prototypes.parquet, one row per distilled pair.

    A selection fills them with the chosen pair itself: its embeddings are the prototypes, it is its
    own nearest image and only member, and its clusters are -1.
    """
    vector = pa.list_(pa.float32(), dim)
    return pa.schema(
        [
            ("pair", pa.int32()),
            ("image_prototype", vector),
            ("text_prototype", vector),
            ("cosine", pa.float64()),  # between the two prototypes; the rows are sorted by it
            ("image_cluster", pa.int32()),
            ("text_cluster", pa.int32()),
            # pairs in both clusters: those averaged, if there are any and match.filter is on
            ("shared", pa.int64()),
            ("member_norm", pa.float64()),  # mean norm of the averaged image embeddings
            ("caption", pa.string()),  # the one nearest to the text prototype
            ("caption_shard", pa.string()),
            ("caption_key", pa.string()),
            ("caption_cosine", pa.float32()),
            ("nearest_shard", pa.string()),  # the real image nearest to the image prototype
            ("nearest_key", pa.string()),
            ("nearest_cosine", pa.float32()),
            # up to MEMBER_SAMPLE of the averaged pairs, as shard/key
            ("members", pa.list_(pa.string())),
        ]
    )


def embeddings(table: pa.Table) -> np.ndarray:
    """Return the embeddings of a table with an `embedding_field`, float32 [rows, d]."""
    field, column = table.schema.field("embedding"), table.column("embedding")
    dtype = np.dtype(field.metadata[b"dtype"].decode()).newbyteorder("<")
    row_bytes = field.type.byte_width
    found = np.empty((len(column), row_bytes // dtype.itemsize), np.float32)
    flat, copy = found.reshape(-1), _copy_halves if dtype.itemsize == 2 else np.copyto
    done = 0
    for chunk in filter(len, column.chunks):
        count = len(chunk) * found.shape[1]
        data = np.frombuffer(chunk.buffers()[1], dtype, count, chunk.offset * row_bytes)
        copy(flat[done : done + count], data)
        done += count
    return found


def _copy_halves(to: np.ndarray, halves: np.ndarray) -> None:
    """Copy float16 [m] to float32 [m], bit for bit as `np.copyto` does but three times as fast.

    That converts number by number. Here sign, exponent and fraction are moved to their places in a
    float32 and its exponent, which begins to count 112 lower, is set right by a product.
    """
    for start in range(0, len(to), HALVES_AT_ONCE):
        own, found = halves[start : start + HALVES_AT_ONCE], to[start : start + HALVES_AT_ONCE]
        bits, moved = own.view("<i2"), found.view(np.int32)
        if (bits & 0x7FFF).max() >= 0x7C00:  # infinite, or not a number
            found[:] = own
            continue
        moved[:] = bits
        moved <<= 13
        moved &= -0x70002000  # less the copies of the sign
        found *= np.float32(2.0**112)


def embedding_array(values: np.ndarray, dtype: str) -> pa.FixedSizeBinaryArray:
    """Return `values` [rows, d] as an array for an `embedding_field` of that `dtype`."""
    data = np.ascontiguousarray(values, dtype=np.dtype(dtype).newbyteorder("<"))
    rows, dim = data.shape
    return pa.Array.from_buffers(pa.binary(dim * data.itemsize), rows, [None, pa.py_buffer(data)])


def vectors(table: pa.Table, column: str) -> np.ndarray:
    """Return a fixed-size-list column as float32 [rows, d]."""
    array = table.column(column).combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    width = array.type.list_size
    return np.asarray(array.flatten()).reshape(-1, width)


def vector_array(values: np.ndarray) -> pa.FixedSizeListArray:
    """Return `values` [rows, d] as a fixed-size-list array of float32."""
    flat = pa.array(np.ascontiguousarray(values, dtype=np.float32).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])

"""Embedding: samples of a shard -> un-normalised CLIP vectors of its images and captions.

A shard flows through as Arrow tables ("blocks"): `read_blocks` -> `decode_block` -> `embed_block`
-> `merge_parts`. Each image is embedded once, each caption once (docs/methods.md). Bad samples
become error rows. Rows carry their ordinal in the shard, so that blocks may arrive in any order and
any size.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from pds_ray.config import EmbedConfig, ReadConfig
from pds_ray.encoders.base import ROW_MULTIPLE, Encoder
from pds_ray.modalities.image import ImageError, Preprocess, decode_image
from pds_ray.modalities.text import CLEANERS
from pds_ray.sources.base import SHARD_ENDS, Fault, Shard, Source, read_shard
from pds_ray.store.schemas import ERROR_SCHEMA, caption_schema, embedding_array, image_schema

END = "end"  # reason of the row that closes a shard; its ordinal is the number of rows before it
DETAIL_CHARACTERS = 500
BLOCK_SAMPLES = 256
BLOCK_BYTES = 32 << 20
# Exceeded by at most one sample's captions; the embeddings of a block are held at once.
BLOCK_CAPTIONS = 8192

RAW_SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("ordinal", pa.int32()),
        ("key", pa.string()),
        # encoded image; after decode_block raw RGB pixels; null for a bad sample
        ("image", pa.large_binary()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("captions", pa.list_(pa.string())),
        ("reason", pa.string()),  # null for a good sample
        ("detail", pa.string()),
    ]
)


@dataclass(frozen=True)
class ShardCounts:
    """Numbers of a shard, or of several added up; its fields are those of a commit marker."""

    images: int = 0
    pairs: int = 0
    bad: int = 0
    """Samples."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Reason -> bad samples, in the order of the reasons."""

    def __add__(self, other: ShardCounts) -> ShardCounts:
        return ShardCounts(
            self.images + other.images,
            self.pairs + other.pairs,
            self.bad + other.bad,
            dict(sorted((Counter(self.reasons) + Counter(other.reasons)).items())),
        )


def shard_counts(images: pa.Table, captions: pa.Table, errors: pa.Table) -> ShardCounts:
    """Return the counts of a shard's tables."""
    reasons = Counter(errors.column("reason").to_pylist())
    return ShardCounts(
        images.num_rows, captions.num_rows, errors.num_rows, dict(sorted(reasons.items()))
    )


def damage(errors: pa.Table) -> str:
    """Return reason and detail if the file of a shard is damaged or none at all, else ""."""
    for row in errors.to_pylist():
        if row["reason"] in SHARD_ENDS:
            return f"{row['reason']}: {row['detail']}"
    return ""


def marker_damage(marker: Mapping[str, Any]) -> str:
    """Return what a commit marker says of the damage of its shard's file, "" if it is whole."""
    reasons = [reason for reason in SHARD_ENDS if reason in marker["reasons"]]
    return marker.get("damage") or ", ".join(reasons)  # markers of earlier versions have no details


def needs_reading(shard: Shard, marker: Mapping[str, Any]) -> bool:
    """Return whether a shard is not embedded, or is damaged and its file has changed since.

    `marker` is its commit marker, empty if it has none.
    """
    return not marker or ("damage" in marker and marker.get("file") != file_of(shard))


def file_of(shard: Shard) -> dict[str, Any]:
    """Return what a commit marker says of the file that was read."""
    return {"size": shard.size, "version": shard.version}


def marker_counts(marker: Mapping[str, Any]) -> ShardCounts:
    """Return the counts that a commit marker holds among others."""
    return ShardCounts(marker["images"], marker["pairs"], marker["bad"], marker["reasons"])


def sum_counts(markers: Iterable[Mapping[str, Any]]) -> ShardCounts:
    """Return the sum of the counts of several commit markers."""
    return sum(map(marker_counts, markers), ShardCounts())


@dataclass
class Part:
    """Consecutive rows of one shard, embedded."""

    first: int
    """Ordinal of its first row."""
    rows: int
    images: pa.Table
    captions: pa.Table
    errors: pa.Table
    total: int | None
    """Number of rows of the whole shard, if this part holds its end."""


def read_blocks(source: Source, shard: Shard) -> Iterator[pa.Table]:
    """Yield the rows of a shard in tables of bounded size; the last row says END.

    Raises SourceError if the shard cannot be read.
    """
    rows: list[dict[str, Any]] = []
    size = ordinal = captions = 0
    for item in read_shard(source, shard):
        row: dict[str, Any] = {"shard": shard.name, "ordinal": ordinal, "key": item.key}
        if isinstance(item, Fault):
            row |= _refused(item.reason, item.detail)
        else:
            row |= {"image": item.image, "captions": list(item.captions)}
            size += len(item.image) + sum(map(len, item.captions))
            captions += len(item.captions)
        rows.append(row)
        ordinal += 1
        if len(rows) >= BLOCK_SAMPLES or size >= BLOCK_BYTES or captions >= BLOCK_CAPTIONS:
            yield pa.Table.from_pylist(rows, schema=RAW_SCHEMA)
            rows, size, captions = [], 0, 0
    rows.append({"shard": shard.name, "ordinal": ordinal, "key": "", "reason": END})
    yield pa.Table.from_pylist(rows, schema=RAW_SCHEMA)


def decode_block(
    block: pa.Table,
    preprocess: Preprocess,
    config: ReadConfig,
    before: Callable[[int], None] = lambda _: None,
) -> pa.Table:
    """Decode and resize images to the encoder's size, clean captions; bad samples get a reason.

    `before` is called with the ordinal of each image before it is decoded.
    """
    rows = block.to_pylist()
    for row in rows:
        if row["reason"] is None:
            before(row["ordinal"])
            row.update(_decode(row["image"], row["captions"], preprocess, config))
    return pa.Table.from_pylist(rows, schema=RAW_SCHEMA)


def _decode(
    data: bytes, captions: list[str], preprocess: Preprocess, config: ReadConfig
) -> dict[str, Any]:
    """Return the columns of a sample that decoding changes."""
    try:
        image = decode_image(data, max_pixels=config.max_pixels, min_side=config.min_side)
    except ImageError as error:
        return _refused(error.reason, error.detail)
    pixels = preprocess(image).tobytes()
    cleaned = list(filter(None, map(CLEANERS[config.captions], captions)))
    if not cleaned:
        return _refused("missing_caption", "empty after cleaning")
    return {"image": pixels, "width": image.width, "height": image.height, "captions": cleaned}


def _refused(reason: str, detail: str) -> dict[str, Any]:
    """Return the columns of a bad sample."""
    return {"image": None, "reason": reason, "detail": detail[:DETAIL_CHARACTERS]}


def embed_block(
    block: pa.Table,
    encoder: Encoder,
    size: int,
    config: EmbedConfig,
    tell: Callable[[float], object] = lambda _: None,
) -> Part:
    """Embed the pixels [size, size, 3] and captions of a decoded block.

    Samples with an embedding that is not finite in the store's dtype become errors. `tell` is
    called after each batch with the number of images that corresponds to the rows encoded so far.
    """
    good = np.flatnonzero(pc.is_null(block.column("reason")))
    samples = block.drop_columns("image").take(good)
    owner, captions = _flattened(samples.column("captions").to_pylist())
    dtype, batch = np.dtype(config.store_dtype), config.batch_size
    share, rows_done = len(good) / max(1, len(good) + len(captions)), 0

    def step(rows: int) -> None:
        nonlocal rows_done
        rows_done += rows
        tell(share * rows_done)

    with np.errstate(over="ignore"):  # beyond float16 is infinity, an error row like any other
        images = _encode_images(pixel_view(block, size), encoder, batch, step).astype(dtype)
        texts = _encode_captions(captions, encoder, batch, step).astype(dtype)
    finite: np.ndarray = np.all(np.isfinite(images), axis=1)
    np.logical_and.at(finite, owner, np.all(np.isfinite(texts), axis=1))

    reasons, ordinals = (block.column(name).to_pylist() for name in ("reason", "ordinal"))
    ended = END in reasons
    return Part(
        first=min(ordinals),
        rows=len(reasons) - ended,
        images=_image_table(samples, images, finite),
        captions=_caption_table(samples, captions, owner, images, texts, finite),
        errors=_error_table(block, good[~finite]),
        total=ordinals[reasons.index(END)] if ended else None,
    )


def pixel_view(block: pa.Table, size: int) -> np.ndarray:
    """Return the pixels of a decoded block without a copy, read-only, uint8 [good, size, size, 3].

    They lie one after the other in the column's buffer, where bad samples take no bytes. A column
    of several chunks is copied.
    """
    views = [np.zeros((0, size, size, 3), np.uint8)]
    for chunk in block.column("image").chunks:
        _, offsets, values = chunk.buffers()
        ends = np.frombuffer(offsets, np.int64, len(chunk) + 1, chunk.offset * 8)
        if ends[-1] > ends[0]:
            data = np.frombuffer(values, np.uint8, ends[-1] - ends[0], ends[0])
            views.append(data.reshape(len(chunk) - chunk.null_count, size, size, 3))
    return views[-1] if len(views) <= 2 else np.concatenate(views)


def _flattened(captions: list[list[str]]) -> tuple[np.ndarray, list[str]]:
    """Return the captions of all samples and the sample that each belongs to, int32 [captions]."""
    owner = np.repeat(np.arange(len(captions), dtype=np.int32), [len(own) for own in captions])
    return owner, [caption for own in captions for caption in own]


def _encode_images(
    pixels: np.ndarray, encoder: Encoder, batch_size: int, step: Callable[[int], object]
) -> np.ndarray:
    """Return the embeddings of pixels, uint8 [n, S, S, 3] -> float32 [n, d]."""

    def encode(start: int, rows: int, padded: int) -> np.ndarray:
        batch = np.zeros((padded, *pixels.shape[1:]), np.uint8)
        batch[:rows] = pixels[start : start + rows]
        return encoder.encode_images(batch)

    return _in_batches(encode, len(pixels), encoder.dim, batch_size, step)


def _encode_captions(
    captions: list[str], encoder: Encoder, batch_size: int, step: Callable[[int], object]
) -> np.ndarray:
    """Return the captions' embeddings, float32 [n, d]."""

    def encode(start: int, rows: int, padded: int) -> np.ndarray:
        batch = captions[start : start + rows]
        return encoder.encode_captions(batch + [""] * (padded - rows))

    return _in_batches(encode, len(captions), encoder.dim, batch_size, step)


def _in_batches(
    encode: Callable[[int, int, int], np.ndarray],
    count: int,
    dim: int,
    batch_size: int,
    step: Callable[[int], object],
) -> np.ndarray:
    """Encode `count` rows in batches -> float32 [count, dim].

    `encode(start, rows, padded)` returns the embeddings of `rows` rows from `start` on, filled up
    to `padded` rows, a multiple of ROW_MULTIPLE. `step(rows)` is called after each batch.
    """
    found = np.empty((count, dim), np.float32)
    for start in range(0, count, batch_size):
        rows = min(batch_size, count - start)
        padded = rows + -rows % ROW_MULTIPLE
        found[start : start + rows] = encode(start, rows, padded)[:rows]
        step(rows)
    return found


def _image_table(samples: pa.Table, images: np.ndarray, finite: np.ndarray) -> pa.Table:
    kept = np.flatnonzero(finite)
    dtype = images.dtype.name
    rows = samples.take(kept)
    return pa.table(
        {
            "key": rows.column("key"),
            "index": rows.column("ordinal"),
            "embedding": embedding_array(images[kept], dtype),
            "width": rows.column("width"),
            "height": rows.column("height"),
        },
        schema=image_schema(images.shape[1], dtype),
    )


def _caption_table(
    samples: pa.Table,
    captions: list[str],
    owner: np.ndarray,
    images: np.ndarray,
    texts: np.ndarray,
    finite: np.ndarray,
) -> pa.Table:
    """Return the table of the captions of those images that are `finite`."""
    kept = np.flatnonzero(finite[owner])
    mine = owner[kept]
    new_row = np.cumsum(finite, dtype=np.int32) - 1
    first = np.searchsorted(owner, owner)  # of each caption's sample
    place = np.arange(len(owner)) - first
    dtype = texts.dtype.name
    return pa.table(
        {
            "key": samples.column("key").take(mine),
            "image_row": new_row[mine].astype(np.int32),
            "caption_index": place[kept].astype(np.int32),
            "caption": [captions[caption] for caption in kept],
            "embedding": embedding_array(texts[kept], dtype),
            # the cosine of what is stored, so that it can be recomputed from the files
            "similarity": cosine(images[mine], texts[kept]),
        },
        schema=caption_schema(texts.shape[1], dtype),
    )


def _error_table(block: pa.Table, nonfinite: np.ndarray) -> pa.Table:
    """Return the errors of a block in its order; `nonfinite` are rows whose embeddings are not."""
    rows = block.select(["key", "reason", "detail"]).to_pylist()
    for row in nonfinite:
        rows[row].update(reason="nonfinite_embedding", detail="")
    bad = [
        {**row, "detail": row["detail"] or ""} for row in rows if row["reason"] not in (None, END)
    ]
    return pa.Table.from_pylist(bad, schema=ERROR_SCHEMA)


def embed_images(
    images: Iterable[Image.Image],
    encoder: Encoder,
    preprocess: Preprocess,
    batch_size: int,
    step: Callable[[int], object] = lambda _: None,
) -> np.ndarray:
    """Return un-normalised image embeddings, float32 [n, d]; `step(rows)` follows each batch."""
    parts = [np.zeros((0, encoder.dim), np.float32)]
    coming = iter(images)
    while batch := list(islice(coming, batch_size)):
        pixels = np.stack([preprocess(image.convert("RGB")) for image in batch])
        parts.append(_encode_images(pixels, encoder, batch_size, step))
    return np.concatenate(parts)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the row-wise cosine of [n, d] and [n, d], float32 [n]; 0 where a row is all zero."""
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a64, axis=1) * np.linalg.norm(b64, axis=1)
    dots = np.einsum("nd,nd->n", a64, b64)
    return np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0).astype(np.float32)


def merge_parts(parts: Iterable[Part]) -> tuple[pa.Table, pa.Table, pa.Table]:
    """Return the image, caption and error tables of a shard from its parts, given in any order."""
    ordered = sorted(parts, key=lambda part: part.first)
    offset, captions = 0, []
    for part in ordered:
        rows = pc.add(part.captions.column("image_row"), pa.scalar(offset, pa.int32()))
        where = part.captions.schema.get_field_index("image_row")
        captions.append(part.captions.set_column(where, "image_row", rows))
        offset += part.images.num_rows
    return (
        pa.concat_tables([part.images for part in ordered]).combine_chunks(),
        pa.concat_tables(captions).combine_chunks(),
        pa.concat_tables([part.errors for part in ordered]).combine_chunks(),
    )


def part_to_tables(part: Part) -> dict[str, pa.Table]:
    """Return a part as tables for Parquet, its numbers in the metadata."""
    info = {
        b"part": json.dumps({"first": part.first, "rows": part.rows, "total": part.total}).encode()
    }
    return {
        "images": part.images.replace_schema_metadata(info),
        "captions": part.captions,
        "errors": part.errors,
    }


def part_from_tables(tables: dict[str, pa.Table]) -> Part:
    """Return the part that `part_to_tables` turned into tables."""
    info = json.loads(tables["images"].schema.metadata[b"part"])
    return Part(
        info["first"],
        info["rows"],
        tables["images"].replace_schema_metadata(None),
        tables["captions"],
        tables["errors"],
        info["total"],
    )


def embed_shard(
    source: Source,
    shard: Shard,
    encoder: Encoder,
    preprocess: Preprocess,
    read: ReadConfig,
    config: EmbedConfig,
) -> tuple[pa.Table, pa.Table, pa.Table]:
    """Run the whole stage for one shard in one process: the oracle of the distributed one."""
    blocks = (decode_block(block, preprocess, read) for block in read_blocks(source, shard))
    return merge_parts(embed_block(block, encoder, preprocess.size, config) for block in blocks)

"""Embedding: samples of a shard -> un-normalised CLIP vectors of its images and captions.

A shard flows through as Arrow tables ("blocks"): `read_blocks` -> `decode_block` -> `embed_block` -> `merge_parts`.
Each image is embedded once, each caption once (methods.md A.5). What is bad becomes an error row. Rows carry their
ordinal in the shard, so that blocks may arrive in any order and any size.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
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
from pds_ray.sources.base import Fault, Shard, Source, read_shard
from pds_ray.store.schemas import ERROR_SCHEMA, caption_schema, embedding_array, image_schema

END = "end"  # reason of the row that closes a shard; its ordinal is the number of rows before it
BLOCK_SAMPLES = 256
BLOCK_BYTES = 32 << 20
BLOCK_CAPTIONS = 8192  # and one sample's more: their embeddings are held at once

RAW_SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("ordinal", pa.int32()),
        ("key", pa.string()),
        (
            "image",
            pa.large_binary(),
        ),  # encoded picture; after decode_block raw RGB pixels; null for a fault
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("captions", pa.list_(pa.string())),
        ("reason", pa.string()),  # null for a good sample
        ("detail", pa.string()),
    ]
)


@dataclass
class Part:
    """A run of rows of one shard, embedded."""

    first: int
    """Ordinal of its first row."""
    rows: int
    images: pa.Table
    captions: pa.Table
    errors: pa.Table
    total: int | None
    """Number of rows of the whole shard, if this part holds its end."""


def read_blocks(source: Source, shard: Shard) -> Iterator[pa.Table]:
    """The rows of a shard in tables of bounded size; the last row says END.

    Raises SourceError if the shard cannot be read.
    """
    rows: list[dict[str, Any]] = []
    size = ordinal = captions = 0
    for item in read_shard(source, shard):
        row: dict[str, Any] = {"shard": shard.name, "ordinal": ordinal, "key": item.key}
        if isinstance(item, Fault):
            row |= {"reason": item.reason, "detail": item.detail[:500]}
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
    """Pictures decoded and resized to the encoder's size, captions cleaned; what fails gets a reason.

    `before` is called with the ordinal of each picture before it is decoded.
    """
    clean = CLEANERS[config.captions]
    rows = []
    for row in block.to_pylist():
        if row["reason"] is None:
            before(row["ordinal"])
            try:
                image = decode_image(
                    row["image"], max_pixels=config.max_pixels, min_side=config.min_side
                )
            except ImageError as error:
                row |= {"image": None, "reason": error.reason, "detail": error.detail[:500]}
            else:
                row |= {
                    "image": preprocess(image).tobytes(),
                    "width": image.width,
                    "height": image.height,
                }
                row["captions"] = list(filter(None, map(clean, row["captions"])))
                if not row["captions"]:
                    row |= {
                        "image": None,
                        "reason": "missing_caption",
                        "detail": "empty after cleaning",
                    }
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=RAW_SCHEMA)


def embed_block(block: pa.Table, encoder: Encoder, size: int, config: EmbedConfig) -> Part:
    """Pixels [size, size, 3] and captions of a decoded block -> one Part; non-finite embeddings become errors."""
    reasons = block.column("reason").to_pylist()
    keys = block.column("key").to_pylist()
    ordinals = block.column("ordinal").to_pylist()
    good = [i for i, reason in enumerate(reasons) if reason is None]
    pixels = block.column("image").to_pylist()
    captions = block.column("captions").to_pylist()
    flat = [caption for i in good for caption in captions[i]]
    owner = np.array([n for n, i in enumerate(good) for _ in captions[i]], dtype=np.int32)
    place = [m for i in good for m in range(len(captions[i]))]

    image_embeddings = _batched(
        [pixels[i] for i in good],
        lambda chunk: encoder.encode_images(
            np.frombuffer(b"".join(chunk), np.uint8).reshape(-1, size, size, 3).copy()
        ),
        bytes(size * size * 3),
        encoder.dim,
        config.batch_size,
    )
    caption_embeddings = _batched(flat, encoder.encode_captions, "", encoder.dim, config.batch_size)
    dtype = np.dtype(config.store_dtype)
    with np.errstate(over="ignore"):  # beyond float16 is infinity, an error row like any other
        stored_images, stored_captions = (
            image_embeddings.astype(dtype),
            caption_embeddings.astype(dtype),
        )

    finite = np.isfinite(stored_images).all(axis=1)
    np.logical_and.at(finite, owner, np.isfinite(stored_captions).all(axis=1))
    details = block.column("detail").to_pylist()
    bad = {
        i: (reason, details[i] or "")
        for i, reason in enumerate(reasons)
        if reason not in (None, END)
    }
    bad |= {good[n]: ("nonfinite_embedding", "") for n in np.flatnonzero(~finite)}
    errors = [{"key": keys[i], "reason": bad[i][0], "detail": bad[i][1]} for i in sorted(bad)]

    kept = np.flatnonzero(finite)
    new_row = np.cumsum(finite, dtype=np.int32) - 1
    pair_kept = np.flatnonzero(finite[owner]) if len(owner) else np.zeros(0, dtype=np.int64)
    images = pa.table(
        {
            "key": [keys[good[n]] for n in kept],
            "index": pa.array([ordinals[good[n]] for n in kept], pa.int32()),
            "embedding": embedding_array(stored_images[kept], config.store_dtype),
            "width": pa.array([block.column("width")[good[n]].as_py() for n in kept], pa.int32()),
            "height": pa.array([block.column("height")[good[n]].as_py() for n in kept], pa.int32()),
        },
        schema=image_schema(encoder.dim, config.store_dtype),
    )
    # the cosine of what is stored, so that it can be recomputed from the files
    similarity = cosine(stored_images[owner[pair_kept]], stored_captions[pair_kept])
    caption_table = pa.table(
        {
            "key": [keys[good[owner[m]]] for m in pair_kept],
            "image_row": new_row[owner[pair_kept]].astype(np.int32),
            "caption_index": pa.array([place[m] for m in pair_kept], pa.int32()),
            "caption": [flat[m] for m in pair_kept],
            "embedding": embedding_array(stored_captions[pair_kept], config.store_dtype),
            "similarity": similarity,
        },
        schema=caption_schema(encoder.dim, config.store_dtype),
    )
    ended = END in reasons
    return Part(
        first=min(ordinals),
        rows=len(reasons) - ended,
        images=images,
        captions=caption_table,
        errors=pa.Table.from_pylist(errors, schema=ERROR_SCHEMA),
        total=ordinals[reasons.index(END)] if ended else None,
    )


def _batched(
    items: list[Any],
    encode: Callable[[list[Any]], np.ndarray],
    filler: Any,
    dim: int,
    batch_size: int,
) -> np.ndarray:
    """Encodes in chunks of `batch_size`, the last filled up to a multiple of ROW_MULTIPLE -> float32 [items, dim]."""
    out = np.empty((len(items), dim), np.float32)
    for start in range(0, len(items), batch_size):
        chunk = items[start : start + batch_size]
        padding = -len(chunk) % ROW_MULTIPLE
        out[start : start + len(chunk)] = encode(chunk + [filler] * padding)[: len(chunk)]
    return out


def embed_pictures(
    pictures: Iterable[Image.Image], encoder: Encoder, preprocess: Preprocess, batch_size: int
) -> np.ndarray:
    """Un-normalised image embeddings, float32 [n, d]."""
    blank = np.zeros((preprocess.size, preprocess.size, 3), np.uint8)
    parts = [np.zeros((0, encoder.dim), np.float32)]

    def encode(chunk: list[np.ndarray]) -> np.ndarray:
        return encoder.encode_images(np.stack(chunk))

    coming = iter(pictures)
    while batch := list(islice(coming, batch_size)):
        pixels = [preprocess(picture.convert("RGB")) for picture in batch]
        parts.append(_batched(pixels, encode, blank, encoder.dim, batch_size))
    return np.concatenate(parts)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Row-wise cosine of [n, d] and [n, d] -> float32 [n]; 0 where a row is all zero."""
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a64, axis=1) * np.linalg.norm(b64, axis=1)
    dots = np.einsum("nd,nd->n", a64, b64)
    return np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0).astype(np.float32)


def merge_parts(parts: Iterable[Part]) -> tuple[pa.Table, pa.Table, pa.Table]:
    """Parts of a shard in any order -> its image, caption and error tables, in the order of the shard."""
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


def shard_counts(images: pa.Table, captions: pa.Table, errors: pa.Table) -> dict[str, Any]:
    """What a commit marker says of a shard."""
    return {
        "images": images.num_rows,
        "pairs": captions.num_rows,
        "bad": errors.num_rows,
        "reasons": dict(sorted(Counter(errors.column("reason").to_pylist()).items())),
    }


def no_counts() -> dict[str, Any]:
    """The counts of nothing."""
    return {"images": 0, "pairs": 0, "bad": 0, "reasons": {}}


def add_counts(totals: dict[str, Any], counts: dict[str, Any]) -> None:
    """Adds a shard's counts to running totals."""
    for name in ("images", "pairs", "bad"):
        totals[name] += counts[name]
    totals["reasons"] = dict(
        sorted((Counter(totals["reasons"]) + Counter(counts["reasons"])).items())
    )


def sum_counts(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The sum of the counts of several shards."""
    totals = no_counts()
    for counts in parts:
        add_counts(totals, counts)
    return totals


def part_to_tables(part: Part) -> dict[str, pa.Table]:
    """A part as Parquet-ready tables, its numbers in the metadata."""
    info = {
        b"part": json.dumps({"first": part.first, "rows": part.rows, "total": part.total}).encode()
    }
    return {
        "images": part.images.replace_schema_metadata(info),
        "captions": part.captions,
        "errors": part.errors,
    }


def part_from_tables(tables: dict[str, pa.Table]) -> Part:
    """The inverse of `part_to_tables`."""
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
    """The whole stage for one shard in one process: the oracle of the distributed one."""
    blocks = (decode_block(block, preprocess, read) for block in read_blocks(source, shard))
    return merge_parts(embed_block(block, encoder, preprocess.size, config) for block in blocks)

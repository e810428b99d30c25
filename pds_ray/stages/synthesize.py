"""Synthesis: prototypes -> images (docs/methods.md, "decode").

Chunks are fixed, so that nothing depends on workers or restarts: chunk c holds pairs
[c * batch_size, (c + 1) * batch_size). A chunk is decoded whole even if some of its images are
there already: an image's last bits may depend on the shape of its batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pyarrow as pa
from PIL import Image

from pds_ray.config import DecodeConfig
from pds_ray.decoders.base import DecodeBatch, Decoder
from pds_ray.modalities.image import resized
from pds_ray.store.schemas import vectors

COLUMNS = ["image_prototype", "member_norm", "caption", "nearest_shard", "nearest_key"]
"""The columns of prototypes.parquet that images are made from."""


def pair_seed(run_seed: int, pair: int, candidate: int = 0) -> int:
    """Return the seed of one image, below 2**63.

    A hash, so that neighbouring pairs and runs have nothing in common. The first candidate of a
    pair has the seed that the pair has without others.
    """
    name = f"{run_seed}/{pair}" + (f"/{candidate}" if candidate else "")
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


def chunks(pairs: int, batch_size: int) -> list[range]:
    """Return the pairs of each chunk."""
    return [range(start, min(start + batch_size, pairs)) for start in range(0, pairs, batch_size)]


def make_batch(
    rows: pa.Table,
    pairs: range,
    run_seed: int,
    config: DecodeConfig,
    tell: Callable[[float], object] = lambda _share: None,
    candidate: int = 0,
    mean: np.ndarray | None = None,
) -> DecodeBatch:
    """Make the request for one candidate per pair of a chunk, from its rows of prototypes.parquet.

    `mean`, float [d], is what the decoder is given instead of each prototype. With the condition
    `caption` it must be given some embedding: one that says nothing of the pair.
    """
    image = _image_prototypes(rows, config.rescale) if mean is None else [mean] * len(pairs)
    shards, keys = rows.column("nearest_shard").to_pylist(), rows.column("nearest_key").to_pylist()
    return DecodeBatch(
        prototypes=np.asarray(image, np.float32),
        captions=rows.column("caption").to_pylist(),
        seeds=[pair_seed(run_seed, pair, candidate) for pair in pairs],
        nearest=list(zip(shards, keys, strict=True)),
        noise_level=config.levels[candidate % len(config.levels)],
        tell=tell,
    )


def mean_prototype(parts: Iterable[pa.Table], config: DecodeConfig) -> np.ndarray:
    """Return the mean of all image prototypes as the decoder takes them, float64 [d].

    The parts have image_prototype and member_norm.
    """
    count, total = 0, np.zeros(())
    for part in parts:
        count += part.num_rows
        total = total + _image_prototypes(part, config.rescale).sum(axis=0, dtype=np.float64)
    return total / count


def _image_prototypes(rows: pa.Table, rescale: bool) -> np.ndarray:
    """Return image prototypes, float [rows, d], at the mean norm of their members if `rescale`."""
    image = vectors(rows, "image_prototype")
    if not rescale:
        return image
    norms = np.linalg.norm(image, axis=1)
    return image * (rows.column("member_norm").to_numpy() / np.where(norms > 0, norms, 1))[:, None]


def synthesize_chunk(
    decoder: Decoder, batch: DecodeBatch, config: DecodeConfig
) -> Iterator[Image.Image]:
    """Yield one image per row, `image_size` square (LANCZOS) if that is not 0.

    An image is made when it is asked for, if the decoder allows.
    """
    count = 0
    for image in decoder.decode(batch):
        count += 1
        yield resized(image, config.image_size) if config.image_size else image
    if count != len(batch.captions):
        raise RuntimeError(f"the decoder gave {count} images for {len(batch.captions)} prototypes")

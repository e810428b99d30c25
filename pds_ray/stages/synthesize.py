"""Synthesis: prototypes -> images (docs/methods.md, "decode").

Chunks are fixed, so that nothing depends on workers or restarts: chunk c holds pairs
[c * batch_size, (c + 1) * batch_size). A chunk is decoded whole even if some of its images are
there already: an image's last bits may depend on the shape of its batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
from PIL import Image

from pds_ray.config import DecodeConfig
from pds_ray.decoders.base import DecodeBatch, Decoder
from pds_ray.modalities.image import resized
from pds_ray.store.schemas import vectors


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
    prototypes: pa.Table,
    pairs: range,
    run_seed: int,
    config: DecodeConfig,
    tell: Callable[[float], object] = lambda _share: None,
    candidate: int = 0,
) -> DecodeBatch:
    """Make the request for one candidate per pair of a chunk, from all of prototypes.parquet."""
    rows = prototypes.slice(pairs.start, len(pairs))
    image = _image_prototypes(rows, config.rescale)
    if config.condition == "caption":
        # the decoder must be given some embedding: one that says nothing of the pair
        mean = _image_prototypes(prototypes, config.rescale).mean(axis=0, dtype=np.float64)
        image = np.tile(mean, (len(pairs), 1))
    shards, keys = rows.column("nearest_shard").to_pylist(), rows.column("nearest_key").to_pylist()
    return DecodeBatch(
        prototypes=image.astype(np.float32),
        captions=rows.column("caption").to_pylist(),
        seeds=[pair_seed(run_seed, pair, candidate) for pair in pairs],
        nearest=list(zip(shards, keys, strict=True)),
        noise_level=config.levels[candidate % len(config.levels)],
        tell=tell,
    )


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

"""The start of an optimisation that no method makes: a finished set, or noise."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from PIL import Image

from pds_ray.config import ConfigError, RunConfig
from pds_ray.encoders.base import EncoderInfo
from pds_ray.errors import first_line
from pds_ray.modalities.image import encode_image
from pds_ray.store.distilled_set import DistilledSet, DistilledSetError, load_distilled
from pds_ray.store.schemas import prototype_schema, vector_array
from pds_ray.training.loop import seed_of

NOISE_MEAN, NOISE_STD = 127.5, 64.0
"""Mean and deviation of a drawn pixel, near those of photographs; values end at 0 and 255."""
PNG = b"\x89PNG"


def check_set(config: RunConfig, encoder: EncoderInfo) -> DistilledSet:
    """Return the finished set that a run begins with.

    Raises ConfigError in one line if there is none, if it has not as many pairs as are asked for,
    or if its prototypes are of another embedding space.
    """
    path = config.distill.init
    try:
        distilled = load_distilled(path)
    except DistilledSetError as error:
        raise ConfigError(
            f"distill.init is {path!r}, no method and no finished run ({first_line(error)})"
        ) from error
    if len(distilled) != config.pairs:
        raise ConfigError(
            f"distill.init {path} has {len(distilled):,} pairs, and {config.pairs:,} are asked "
            f"for; give --pairs {len(distilled)}, or a start of that size"
        )
    if (space := distilled.manifest["about"].get("space")) != encoder.space:
        raise ConfigError(
            f"distill.init {path} was made in the space of {space}, and encoder {encoder.name} "
            f"has {encoder.space}; give the encoder of the start"
        )
    return distilled


def as_png(distilled: DistilledSet, pair: int) -> bytes:
    """Return the image of one pair as a PNG: its own bytes if it is one."""
    data = distilled.image_bytes(pair)
    return data if data.startswith(PNG) else encode_image(distilled.image(pair), "png")


def prototypes_of(distilled: DistilledSet) -> pa.Table:
    """Return rows of prototypes.parquet for the pairs of a set, as those of a selection."""
    image, text = distilled.image_prototypes, distilled.text_prototypes
    rows, count = distilled.records, len(distilled)

    def column(name: str, missing: object) -> list[object]:
        return [missing if row.get(name) is None else row[name] for row in rows]  # type: ignore[literal-required]

    return pa.table(
        {
            "pair": np.arange(count, dtype=np.int32),
            "image_prototype": vector_array(image),
            "text_prototype": vector_array(text),
            "cosine": column("cosine", 0.0),
            "image_cluster": np.full(count, -1, np.int32),
            "text_cluster": np.full(count, -1, np.int32),
            "shared": np.ones(count, np.int64),
            "member_norm": column("member_norm", 0.0),
            "caption": distilled.captions,
            "caption_shard": column("caption_shard", ""),
            "caption_key": column("caption_key", ""),
            "caption_cosine": column("caption_cosine", 0.0),
            "nearest_shard": column("nearest_shard", ""),
            "nearest_key": column("nearest_key", ""),
            "nearest_cosine": column("nearest_cosine", 0.0),
            "members": column("members", []),
        },
        schema=prototype_schema(image.shape[1]),
    )


def noise(seed: int, pair: int, side: int) -> Image.Image:
    """Return an RGB image of independent Gaussian pixels, `side` square.

    It is a function of the run's seed and the pair.
    """
    draw = np.random.default_rng(seed_of("noise", seed, pair))
    pixels = draw.normal(NOISE_MEAN, NOISE_STD, (side, side, 3))
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))

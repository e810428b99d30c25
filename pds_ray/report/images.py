"""Small images for a page that stands alone: data URIs of distilled and of real images."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

from PIL import Image

from pds_ray import catalog
from pds_ray.config import FilesConfig
from pds_ray.errors import UserError, first_line
from pds_ray.modalities.image import ImageError, decode_image
from pds_ray.sources.base import Sample, Shard, Source

IMAGE_SIDE, THUMB_SIDE, QUALITY = 160, 96, 80
SHARD_LIMIT = 32
"""Shards of the source that are read for real images; other shards give no thumbnails."""

Place = tuple[str, str]
"""Shard and key of an image of the source."""


def data_uri(image: Image.Image, side: int = IMAGE_SIDE) -> str:
    """Return an RGB image as a data URI: PNG if it is small, else WebP of at most `side` pixels."""
    buffer = io.BytesIO()
    if max(image.size) <= side:
        image.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        small = image.copy()
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        small.save(buffer, "WEBP", quality=QUALITY)
        kind = "webp"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def real_thumbnails(
    uri: str,
    read: FilesConfig,
    wanted: Iterable[Place],
    step: Callable[[], object] = lambda: None,
) -> tuple[dict[Place, str], list[str]]:
    """Return data URIs of images of a source, and notes on the missing ones.

    `read` are the options by which the source was read; `step` is called after each shard. A
    source that cannot be read gives one note, never an error.
    """
    needed: dict[str, set[str]] = {}
    for shard, key in wanted:
        needed.setdefault(shard, set()).add(key)
    if not needed:
        return {}, []
    chosen = sorted(needed, key=lambda shard: (-len(needed[shard]), shard))[:SHARD_LIMIT]
    notes = []
    if len(chosen) < len(needed):
        notes.append(
            f"Real images were read from {len(chosen)} of the {len(needed):,} shards that hold the "
            "nearest images; the others show no thumbnail."
        )
    found: dict[Place, str] = {}
    try:
        source = catalog.make_source(uri, read)
        shards = {shard.name: shard for shard in source.shards()}
        for name in sorted(chosen):
            if name in shards:
                for key, thumb in _thumbnails(source, shards[name], needed[name]):
                    found[name, key] = thumb
            step()
    except (UserError, OSError) as error:
        reason = first_line(error)
        notes.append(f"The source cannot be read any more, so real images are missing ({reason}).")
        return found, notes
    missing = sum(len(needed[name]) for name in chosen) - len(found)
    if missing:
        notes.append(f"{missing:,} of the nearest real images are no longer in the source.")
    return found, notes


def _thumbnails(source: Source, shard: Shard, keys: set[str]) -> Iterator[tuple[str, str]]:
    """Yield key and thumbnail of the wanted images of a shard; read no further than needed."""
    left = set(keys)
    for item in source.read(shard):
        if not isinstance(item, Sample) or item.key not in left:
            continue
        left.discard(item.key)
        # it was embedded: an image that cannot be decoded is of a source that has changed
        with suppress(ImageError):
            yield item.key, data_uri(decode_image(item.image), THUMB_SIDE)
        if not left:
            return

"""Small pictures for a page that stands alone: data URIs of distilled pictures and of real ones."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable

from PIL import Image

from pds_ray import catalog
from pds_ray.errors import UserError, first_line
from pds_ray.modalities.image import ImageError, decode_image
from pds_ray.sources.base import Sample

PICTURE_SIDE, THUMB_SIDE, QUALITY = 160, 96, 80
SHARD_LIMIT = 32
"""Shards of the source that are read again for real pictures; the rest of the thumbnails is left out."""

Place = tuple[str, str]
"""A picture of the source: shard and key."""


def data_uri(image: Image.Image, side: int = PICTURE_SIDE) -> str:
    """An RGB picture as a data URI: what is small stays as it is (PNG), the rest becomes WebP of at most `side`."""
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
    uri: str, wanted: Iterable[Place], step: Callable[[], object] = lambda: None
) -> tuple[dict[Place, str], list[str]]:
    """Data URIs of pictures of a source, and what there is to say about those that are not there.

    `step` is called once a shard. A source that cannot be read gives no pictures and one note, never an error.
    """
    needed: dict[str, set[str]] = {}
    for shard, key in wanted:
        needed.setdefault(shard, set()).add(key)
    if not needed:
        return {}, []
    notes = []
    found: dict[Place, str] = {}
    chosen = sorted(needed, key=lambda shard: (-len(needed[shard]), shard))[:SHARD_LIMIT]
    if len(chosen) < len(needed):
        notes.append(
            f"Real pictures were read from {len(chosen)} of the {len(needed):,} shards that hold the nearest images; "
            "the others show no thumbnail."
        )
    try:
        source = catalog.make_source(uri)
        shards = {shard.name: shard for shard in source.shards()}
        for name in sorted(chosen):
            keys = needed[name]
            left = set(keys)
            for item in source.read(shards[name]) if name in shards else ():
                if isinstance(item, Sample) and item.key in left:
                    left.discard(item.key)
                    try:
                        found[name, item.key] = data_uri(decode_image(item.image), THUMB_SIDE)
                    except ImageError:
                        continue  # it was embedded, so this is a source that changed; the card shows no thumbnail
                    if not left:
                        break
            step()
    except (UserError, OSError) as error:
        notes.append(
            f"The source cannot be read any more, so real pictures are missing ({first_line(error)})."
        )
        return found, notes
    missing = sum(len(needed[name]) for name in chosen) - len(found)
    if missing:
        notes.append(f"{missing:,} of the nearest real pictures are no longer in the source.")
    return found, notes

"""The real image nearest to the prototype, without a generator.

Published as an ablation of PDS (docs/methods.md), and the decoder to read first.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from PIL import Image

from pds_ray.config import ConfigError, DecodeConfig
from pds_ray.decoders.base import DecodeBatch, DecoderInfo
from pds_ray.encoders.base import EncoderInfo
from pds_ray.modalities.image import ImageError, decode_image
from pds_ray.sources.base import SHARD_ENDS, Fault, Shard, Source, SourceError, read_shard


def describe(config: DecodeConfig, encoder: EncoderInfo) -> DecoderInfo:  # noqa: ARG001
    """Describe the decoder, which fits every encoder.

    Raises ConfigError if the caption is to decide, which is not looked at here.
    """
    if config.condition == "caption":
        raise ConfigError(
            "decode.condition is 'caption', but decoder nearest goes by the prototype; use unclip"
        )
    return DecoderInfo(name="nearest", dim=None, identity="nearest")


def load(info: DecoderInfo, config: DecodeConfig, source: Source) -> NearestDecoder:  # noqa: ARG001
    return NearestDecoder(source)


class NearestDecoder:
    """A decoder that looks images up in the source, each shard read once per batch."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.shards: dict[str, Shard] = {shard.name: shard for shard in source.shards()}

    def decode(self, batch: DecodeBatch) -> Iterator[Image.Image]:
        """Return the images one by one: at their full size a batch may not fit in memory.

        Raises SourceError naming the shard if it or one of its images is not there any more.
        """
        wanted: dict[str, set[str]] = {}
        for shard, key in batch.nearest:
            wanted.setdefault(shard, set()).add(key)
        found: dict[tuple[str, str], bytes] = {}
        for number, (shard, keys) in enumerate(wanted.items()):
            batch.tell(number / len(wanted))
            found |= {(shard, key): data for key, data in self._look_up(shard, keys)}
        return (_decode(place, found[place]) for place in batch.nearest)

    def _look_up(self, shard: str, keys: set[str]) -> Iterator[tuple[str, bytes]]:
        """Yield key and image of the wanted samples; raise SourceError if one is gone."""
        if shard not in self.shards:
            raise SourceError(
                f"shard {shard} is not in {self.source.uri} any more; an image of it is wanted"
            )
        missing, faults = set(keys), dict[str, Fault]()
        for item in read_shard(self.source, self.shards[shard]):
            if isinstance(item, Fault):
                faults[item.key] = item
            elif item.key in missing:
                missing.remove(item.key)
                yield item.key, item.image
                if not missing:
                    return
        key = min(missing)
        ends = (fault for fault in faults.values() if fault.reason in SHARD_ENDS)
        fault = faults.get(key) or next(ends, None)
        why = f"{fault.reason}: {fault.detail}" if fault else "no such sample"
        raise SourceError(
            f"image {key} of shard {shard} is not there any more ({why}); "
            "it was when it was embedded"
        )


def _decode(place: tuple[str, str], data: bytes) -> Image.Image:
    try:
        # without limits: they were applied when it was embedded
        return decode_image(data, max_pixels=sys.maxsize, min_side=1)
    except ImageError as error:
        shard, key = place
        message = f"image {key} of shard {shard} is not what was embedded ({error})"
        raise SourceError(message) from error

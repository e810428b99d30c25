"""The real image nearest to the prototype: needs no generator. Published as an ablation of PDS, and the toy to read."""

from __future__ import annotations

import sys

from PIL import Image

from pds_ray.config import ConfigError, DecodeConfig
from pds_ray.decoders.base import DecodeBatch, DecoderInfo
from pds_ray.encoders.base import EncoderInfo
from pds_ray.images import decode_image
from pds_ray.sources.base import Sample, Shard, Source


def describe(config: DecodeConfig, encoder: EncoderInfo) -> DecoderInfo:  # noqa: ARG001 - fits every encoder
    """Fits every encoder. Raises ConfigError if the caption is to decide, which is not looked at here."""
    if config.condition == "caption":
        raise ConfigError("decode.condition is 'caption', but decoder nearest goes by the prototype; use unclip")
    return DecoderInfo(name="nearest", dim=None, identity="nearest")


def load(info: DecoderInfo, config: DecodeConfig, source: Source) -> NearestDecoder:  # noqa: ARG001
    return NearestDecoder(source)


class NearestDecoder:
    """Looks the pictures up in the source, each shard read once a batch."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.shards: dict[str, Shard] = {shard.name: shard for shard in source.shards()}

    def decode(self, batch: DecodeBatch) -> list[Image.Image]:
        wanted: dict[str, set[str]] = {}
        for shard, key in batch.nearest:
            wanted.setdefault(shard, set()).add(key)
        found: dict[tuple[str, str], bytes] = {}
        for shard, keys in wanted.items():
            for item in self.source.read(self.shards[shard]):
                if isinstance(item, Sample) and item.key in keys:
                    found[shard, item.key] = item.image
                    if len(keys) == sum(place[0] == shard for place in found):
                        break
        # what was embedded was judged by then: no limits here
        return [decode_image(found[place], max_pixels=sys.maxsize, min_side=1) for place in batch.nearest]

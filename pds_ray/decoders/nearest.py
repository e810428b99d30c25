"""The real image nearest to the prototype: needs no generator. Published as an ablation of PDS, and the toy to read."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from PIL import Image

from pds_ray.config import ConfigError, DecodeConfig
from pds_ray.decoders.base import DecodeBatch, DecoderInfo
from pds_ray.encoders.base import EncoderInfo
from pds_ray.modalities.image import ImageError, decode_image
from pds_ray.sources.base import SHARD_ENDS, Fault, Shard, Source, SourceError, read_shard


def describe(config: DecodeConfig, encoder: EncoderInfo) -> DecoderInfo:  # noqa: ARG001 - fits every encoder
    """Fits every encoder. Raises ConfigError if the caption is to decide, which is not looked at here."""
    if config.condition == "caption":
        raise ConfigError(
            "decode.condition is 'caption', but decoder nearest goes by the prototype; use unclip"
        )
    return DecoderInfo(name="nearest", dim=None, identity="nearest")


def load(info: DecoderInfo, config: DecodeConfig, source: Source) -> NearestDecoder:  # noqa: ARG001
    return NearestDecoder(source)


class NearestDecoder:
    """Looks the pictures up in the source, each shard read once a batch."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.shards: dict[str, Shard] = {shard.name: shard for shard in source.shards()}

    def decode(self, batch: DecodeBatch) -> Iterator[Image.Image]:
        """The pictures one by one, for at their full size a batch need not fit in memory.

        Raises SourceError naming the shard if it or one of its pictures is not there any more.
        """
        wanted: dict[str, set[str]] = {}
        for shard, key in batch.nearest:
            wanted.setdefault(shard, set()).add(key)
        found = {
            (shard, key): data
            for shard, keys in wanted.items()
            for key, data in self._look_up(shard, keys)
        }
        return (_picture(place, found[place]) for place in batch.nearest)

    def _look_up(self, shard: str, keys: set[str]) -> Iterator[tuple[str, bytes]]:
        if shard not in self.shards:
            raise SourceError(
                f"shard {shard} is not in {self.source.uri} any more; a picture of it is wanted"
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
        fault = faults.get(key) or next(
            (f for f in faults.values() if f.reason in SHARD_ENDS), None
        )
        why = f"{fault.reason}: {fault.detail}" if fault else "no such sample"
        raise SourceError(
            f"picture {key} of shard {shard} is not there any more ({why}); it was when it was embedded"
        )


def _picture(place: tuple[str, str], data: bytes) -> Image.Image:
    try:
        return decode_image(
            data, max_pixels=sys.maxsize, min_side=1
        )  # what was embedded was judged by then
    except ImageError as error:
        shard, key = place
        raise SourceError(
            f"picture {key} of shard {shard} is not what was embedded ({error})"
        ) from error

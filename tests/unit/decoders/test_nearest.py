"""The nearest real image, looked up in the source."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pds_ray import catalog
from pds_ray.config import ConfigError, DecodeConfig
from pds_ray.decoders import nearest
from pds_ray.decoders.base import DecodeBatch
from pds_ray.decoders.nearest import NearestDecoder
from pds_ray.sources import base
from pds_ray.sources.base import Fault, Sample, Shard, SourceError


def colour(shard: int, number: int) -> tuple[int, int, int]:
    return (shard * 40, number * 20, 99)


class TwoShards:
    """Ten images in two shards under the same keys; counts what is read."""

    uri = "two"

    def __init__(self):
        self.read_shards: list[str] = []
        self.seen = 0

    def shards(self):
        return [Shard("s0", "0"), Shard("s1", "1")]

    def read(self, shard):
        self.read_shards.append(shard.name)
        for number in range(5):
            self.seen += 1
            buffer = io.BytesIO()
            Image.new("RGB", (6, 6), colour(int(shard.location), number)).save(buffer, "PNG")
            yield Fault(f"k{number}", "duplicate_key", "")
            yield Sample(f"k{number}", buffer.getvalue(), ("a caption",))


def ask(*nearest: tuple[str, str]) -> DecodeBatch:
    count = len(nearest)
    return DecodeBatch(np.zeros((count, 3), np.float32), [""] * count, [0] * count, list(nearest))


@pytest.fixture
def source():
    return TwoShards()


@pytest.fixture
def decoder(source, clip_info):
    config = DecodeConfig(decoder="nearest")
    return catalog.load_decoder(catalog.describe_decoder(config, clip_info), config, source)


def test_the_right_images_in_the_order_asked(decoder):
    images = decoder.decode(ask(("s1", "k3"), ("s0", "k3"), ("s0", "k0"), ("s1", "k3")))
    assert [image.getpixel((2, 2)) for image in images] == [
        colour(1, 3),
        colour(0, 3),
        colour(0, 0),
        colour(1, 3),
    ]


def test_each_shard_is_read_once_and_no_further_than_needed(decoder, source):
    decoder.decode(ask(("s0", "k1"), ("s1", "k0"), ("s0", "k0"), ("s0", "k1")))
    assert sorted(source.read_shards) == ["s0", "s1"]
    assert source.seen == 2 + 1


def test_an_image_that_is_gone_is_an_error(decoder):
    with pytest.raises(
        SourceError, match=r"^image k9 of shard s0 is not there any more \(no such sample\)"
    ):
        decoder.decode(ask(("s0", "k9"), ("s0", "k1")))
    with pytest.raises(SourceError, match="shard s7 is not in two any more"):
        decoder.decode(ask(("s7", "k1")))


class Changed(TwoShards):
    """The source later: cut short, gone, or with a bad image; its disk fails `failures` times."""

    def __init__(self, how: str, failures: int = 0):
        super().__init__()
        self.how, self.failures = how, failures

    def read(self, shard):
        if self.how == "gone":
            yield Fault("", "missing_shard", "No such file or directory")
            return
        for item in super().read(shard):
            if isinstance(item, Fault):
                continue
            if item.key == "k2":
                if self.failures:
                    self.failures -= 1
                    raise OSError(5, "Input/output error")
                if self.how == "cut":
                    yield Fault("", "truncated_shard", "unexpected end of data")
                    return
            overwritten = item.key == "k2" and self.how == "overwritten"
            yield replace(item, image=b"no image") if overwritten else item


@pytest.mark.parametrize(
    ("how", "failures", "said"),
    [
        ("gone", 0, "shard s0 was listed but cannot be opened .*No such file"),
        (
            "cut",
            0,
            r"image k2 of shard s0 is not there any more "
            r"\(truncated_shard: unexpected end of data\)",
        ),
        ("overwritten", 0, r"image k2 of shard s0 is not what was embedded \(undecodable_image"),
        ("broken", 99, "cannot read shard s0: .*Input/output error"),
    ],
)
def test_what_became_of_the_source_is_said_in_one_line(monkeypatch, how, failures, said):
    monkeypatch.setattr(base, "READ_RETRY_WAITS_S", (0.0, 0.0))
    with pytest.raises(SourceError, match=said) as caught:
        list(
            NearestDecoder(Changed(how, failures)).decode(
                ask(("s0", "k1"), ("s0", "k2"), ("s0", "k3"))
            )
        )
    assert "\n" not in str(caught.value)


def test_a_disk_that_fails_is_read_again(monkeypatch):
    monkeypatch.setattr(base, "READ_RETRY_WAITS_S", (0.0, 0.0))
    images = list(NearestDecoder(Changed("", failures=2)).decode(ask(("s0", "k1"), ("s1", "k3"))))
    assert [image.getpixel((2, 2)) for image in images] == [colour(0, 1), colour(1, 3)]


def test_images_are_decoded_one_by_one(monkeypatch, decoder):
    """No two images of a batch need be in memory together."""
    decoded = []
    monkeypatch.setattr(
        nearest, "decode_image", lambda data, **_: decoded.append(data) or Image.new("RGB", (6, 6))
    )
    images = iter(decoder.decode(ask(("s0", "k1"), ("s0", "k2"), ("s1", "k0"))))
    assert decoded == []
    next(images)
    assert len(decoded) == 1


def test_fits_every_encoder(clip_info):
    config = DecodeConfig(decoder="nearest")
    for dim in (1, 768):
        info = catalog.describe_decoder(config, replace(clip_info, dim=dim))
        assert info.dim is None


def test_cannot_go_by_the_caption(clip_info):
    with pytest.raises(
        ConfigError, match=r"^decode.condition is 'caption', but decoder nearest .*; use unclip$"
    ):
        catalog.describe_decoder(DecodeConfig(decoder="nearest", condition="caption"), clip_info)

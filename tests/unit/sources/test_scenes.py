"""The built-in world: the same images every time, with captions that their pixels confirm."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from pds_ray.sources.base import Sample, SourceError
from pds_ray.sources.scenes import (
    CAPTIONS_PER_IMAGE,
    COLORS,
    GROUNDS,
    IMAGE_SIZE,
    SHAPES,
    ScenesSource,
)

WORD_OF_SHAPE = "|".join(SHAPES)
WORD_OF_COLOR = "|".join(COLORS)
PLACED = re.compile(
    rf"({WORD_OF_COLOR}) ({WORD_OF_SHAPE}) (?:in|at) the "
    "(top left|top right|bottom left|bottom right|center|middle)"
)


def read_all(uri: str) -> list[Sample]:
    source = ScenesSource(uri)
    samples = [sample for shard in source.shards() for sample in source.read(shard)]
    assert all(isinstance(sample, Sample) for sample in samples)
    return samples


def pixels_of(sample: Sample) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(sample.image)))


def near(pixels: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """Return a mask [H, W] of the pixels [H, W, 3] that have a colour, up to rounding."""
    return (np.abs(pixels.astype(int) - color) <= 2).all(-1)


def quarter(pixels: np.ndarray, place: str) -> np.ndarray:
    """Return the part of the image [64, 64, 3] that a place name means."""
    if place in ("center", "middle"):
        return pixels[16:48, 16:48]
    vertical, horizontal = place.split()
    half = IMAGE_SIZE // 2
    rows = pixels[:half] if vertical == "top" else pixels[half:]
    return rows[:, :half] if horizontal == "left" else rows[:, half:]


def test_shards_cover_every_sample_once():
    source = ScenesSource("scenes:2300:7")
    shards = source.shards()
    assert [shard.name for shard in shards] == ["scenes-00000", "scenes-00001", "scenes-00002"]
    assert [shard.size for shard in shards] == [1000, 1000, 300]
    last = list(source.read(shards[-1]))
    assert [sample.key for sample in last] == [f"{i:09d}" for i in range(2000, 2300)]


def test_shard_size_changes_the_shards_alone():
    """Images and captions keep their bytes; the former sources keep names, sizes and versions."""
    default, small = ScenesSource("scenes:70:7:20"), ScenesSource("scenes:70:7:20:30")
    shards = small.shards()
    assert [(shard.name, shard.location, shard.size) for shard in shards] == [
        ("scenes-00000", "0:30", 30),
        ("scenes-00001", "30:60", 30),
        ("scenes-00002", "60:70", 10),
    ]
    assert read_all("scenes:70:7:20:30") == read_all("scenes:70:7:20")
    assert small.validation == default.validation
    assert ScenesSource("scenes:70:7:20:1000").shards() == default.shards()
    (whole,) = default.shards()
    assert whole.version == "seed 7, noise 20"
    assert ScenesSource("scenes:70").shards()[0].version == "seed 0"


def test_shards_of_the_same_name_and_size_with_other_images_differ_in_version():
    other = ScenesSource("scenes:60:0:0:20").shards()[1]
    one = ScenesSource("scenes:50:0:0:30").shards()[1]
    assert (one.name, one.size) == (other.name, other.size)
    assert one.version != other.version


def test_noise_swaps_its_share_of_captions_and_nothing_else():
    clean, noisy = read_all("scenes:400:3"), read_all("scenes:400:3:20")
    assert [(sample.key, sample.image) for sample in noisy] == [
        (sample.key, sample.image) for sample in clean
    ]
    pairs = [
        pair
        for a, b in zip(clean, noisy, strict=True)
        for pair in zip(a.captions, b.captions, strict=True)
    ]
    swapped = sum(own != other for own, other in pairs)
    assert abs(swapped - 0.2 * len(pairs)) < 4 * (0.2 * 0.8 * len(pairs)) ** 0.5
    assert read_all("scenes:5:3:20") == noisy[:5]
    assert read_all("scenes:5:3:0") == clean[:5]
    everything = read_all("scenes:20:3:100")
    assert not any(
        own.captions[0] in other.captions for own, other in zip(clean[:20], everything, strict=True)
    )
    fingerprints = {
        ScenesSource(uri).shards()[0].version
        for uri in ("scenes:5:3", "scenes:5:3:20", "scenes:5:3:30")
    }
    assert len(fingerprints) == 3


def test_a_sample_depends_on_seed_and_index_alone():
    assert read_all("scenes:5:3") == read_all("scenes:20:3")[:5]
    assert read_all("scenes:5") == read_all("scenes:5:0")
    assert read_all("scenes:5:3") != read_all("scenes:5:4")


def test_images_and_captions_vary():
    samples = read_all("scenes:400")
    assert len({sample.image for sample in samples}) == 400
    for sample in samples:
        assert len(set(sample.captions)) == CAPTIONS_PER_IMAGE
        assert pixels_of(sample).shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    text = " ".join(caption for sample in samples for caption in sample.captions)
    for word in (
        *SHAPES,
        *COLORS,
        *GROUNDS,
        "large",
        "small",
        "above",
        "to the left of",
        "in the top right",
    ):
        assert word in text


def test_ground_named_by_every_caption_fills_the_edge_of_the_image():
    for sample in read_all("scenes:300:1"):
        pixels = pixels_of(sample)
        edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        grounds = [name for name in GROUNDS if near(edge, GROUNDS[name]).mean() > 0.9]
        assert len(grounds) == 1
        assert all(grounds[0] in caption for caption in sample.captions)


def test_shape_colours_are_where_captions_say():
    checked = 0
    for sample in read_all("scenes:300:2"):
        pixels = pixels_of(sample)
        for caption in sample.captions:
            for color, _shape, place in PLACED.findall(caption):
                assert near(quarter(pixels, place), COLORS[color]).sum() > 20, (sample.key, caption)
                checked += 1
    assert checked > 500


def test_relations_are_true():
    relation = re.compile(
        rf"({WORD_OF_COLOR}) (?:{WORD_OF_SHAPE}) "
        rf"(above|below|to the left of|to the right of) an? .*?({WORD_OF_COLOR})"
    )
    checked = 0
    for sample in read_all("scenes:400:5"):
        pixels = pixels_of(sample)
        for caption in sample.captions:
            match = relation.search(caption)
            if (
                match is None
                or match[1] == match[3]
                or len(re.findall(WORD_OF_SHAPE, caption)) != 2
            ):
                continue
            (y1, x1), (y2, x2) = (
                np.argwhere(near(pixels, COLORS[match[i]])).mean(0) for i in (1, 3)
            )
            truth = {
                "above": y1 < y2,
                "below": y1 > y2,
                "to the left of": x1 < x2,
                "to the right of": x1 > x2,
            }
            assert truth[match[2]], caption
            checked += 1
    assert checked > 100


def test_sizes_are_true():
    for sample in read_all("scenes:300:6"):
        caption = next(
            (
                c
                for c in sample.captions
                if len(re.findall(WORD_OF_SHAPE, c)) == 1 and re.search("large|big|small|little", c)
            ),
            None,
        )
        if caption is None:
            continue
        color = COLORS[re.search(rf"({WORD_OF_COLOR}) (?:{WORD_OF_SHAPE})", caption)[1]]
        width = np.ptp(np.argwhere(near(pixels_of(sample), color))[:, 1])
        assert (width > 18) == bool(re.search("large|big", caption)), caption


@pytest.mark.parametrize(
    "uri",
    [
        "scenes",
        "scenes:",
        "scenes:ten",
        "scenes:-1",
        "scenes:1:2:3:0",
        "scenes:1:2:3:ten",
        "scenes:1:2:3:-4",
        "scenes:1:2:3:",
        "scenes:1:2:3:4:5",
        "scenes:1:2:101",
        "scenes:0",
        "scenes:1:x",
    ],
)
def test_bad_uri_is_refused_in_one_line(uri):
    with pytest.raises(SourceError) as caught:
        ScenesSource(uri)
    assert "\n" not in str(caught.value)
    assert "such as" in str(caught.value)

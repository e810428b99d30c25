"""Embedding with an encoder whose answer can be computed by hand."""

from __future__ import annotations

import io
import itertools
import json
import random
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pds_ray.config import EmbedConfig, ReadConfig
from pds_ray.encoders.base import ROW_MULTIPLE
from pds_ray.modalities.image import Preprocess
from pds_ray.sources.base import Fault, Sample, Shard
from pds_ray.stages import embed
from pds_ray.store.schemas import embeddings

SIZE, DIM = 4, 6
PREPROCESS = Preprocess(SIZE)
CONFIG = EmbedConfig(batch_size=16)
READ = ReadConfig()
SHARD = Shard("s0", "anywhere")
ALPHABET = [chr(code) for code in range(32, 127)]


class Toy:
    """Fixed random projections of pixels and of character counts. Records its calls."""

    dim = DIM

    def __init__(self):
        rng = np.random.default_rng(0)
        self.pixels = rng.standard_normal((SIZE * SIZE * 3, DIM)) / 1000
        self.characters = rng.standard_normal((len(ALPHABET), DIM))
        self.batches: list[int] = []
        self.images: list[bytes] = []
        self.captions: list[str] = []

    def encode_images(self, pixels):
        assert pixels.dtype == np.uint8
        assert pixels.shape[1:] == (SIZE, SIZE, 3)
        self.batches.append(len(pixels))
        self.images += [picture.tobytes() for picture in pixels]
        found = (pixels.reshape(len(pixels), -1) @ self.pixels).astype(np.float32)
        found[pixels[:, 0, 0, 0] == 255] = np.nan  # an image that upsets the model
        return found

    def encode_captions(self, captions):
        self.batches.append(len(captions))
        self.captions += captions
        counts = np.array(
            [[caption.count(character) for character in ALPHABET] for caption in captions]
        )
        found = (counts @ self.characters).astype(np.float32)
        found[["#" in caption for caption in captions]] = np.inf
        return found


class ListSource:
    uri = "list"

    def __init__(self, items):
        self.items = items

    def shards(self):
        return [SHARD]

    def read(self, shard):
        assert shard == SHARD
        yield from self.items


def picture(number: int, upset: bool = False) -> tuple[np.ndarray, bytes]:
    """Return an image at model size: no resizing stands between it and the oracle."""
    pixels = np.random.default_rng(number).integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
    if upset:
        pixels[0, 0, 0] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return pixels, buffer.getvalue()


def items() -> list[Sample | Fault]:
    """Return forty rows with every kind of trouble, the images all different."""
    found: list[Sample | Fault] = []
    for number in range(40):
        key = f"k{number:02d}"
        data = picture(number, upset=number in (7, 21))[1]
        captions = tuple(
            f"caption {number} {word}" for word in ("one", "two", "three")[: 1 + number % 3]
        )
        if number % 11 == 3:
            found.append(Fault(key, "missing_image", "no member with a known extension"))
        elif number == 5:
            found.append(Sample(key, b"no picture", captions))
        elif number == 9:
            found.append(Sample(key, data, (" ", "\u200b")))  # nothing is left after cleaning
        elif number == 12:
            found.append(
                Sample(key, data, ("twice  the same", "twice the same", " twice the same ", "once"))
            )
        elif number == 17:
            found.append(Sample(key, data, ("fine", "not # fine", "fine too")))
        else:
            found.append(Sample(key, data, captions))
    return found


ITEMS = items()
GOOD = [n for n in range(40) if n % 11 != 3 and n not in (5, 7, 9, 17, 21)]
DECODED = sorted([*GOOD, 7, 17, 21])  # their embeddings, not their pixels, may be bad
ERRORS = [
    *((f"k{n:02d}", "missing_image") for n in (3, 14, 25, 36)),
    ("k05", "undecodable_image"),
    ("k07", "nonfinite_embedding"),
    ("k09", "missing_caption"),
    ("k17", "nonfinite_embedding"),
    ("k21", "nonfinite_embedding"),
]


def expected_captions(number: int) -> list[str]:
    """Return all captions, cleaned: equal ones stay pairs of their own, as in the paper."""
    return [*["twice the same"] * 3, "once"] if number == 12 else list(ITEMS[number].captions)


def run(source_items=ITEMS, config=CONFIG, encoder=None):
    return embed.embed_shard(
        ListSource(source_items), SHARD, encoder or Toy(), PREPROCESS, READ, config
    )


def test_every_good_image_is_a_row_in_the_order_of_the_shard():
    images, _, _ = run()
    assert images.column("key").to_pylist() == [f"k{n:02d}" for n in GOOD]
    assert images.column("index").to_pylist() == GOOD
    assert (
        set(images.column("width").to_pylist())
        == set(images.column("height").to_pylist())
        == {SIZE}
    )


def test_every_caption_points_to_its_image():
    images, captions, _ = run()
    expected = [(n, m, text) for n in GOOD for m, text in enumerate(expected_captions(n))]
    assert captions.column("caption").to_pylist() == [text for _, _, text in expected]
    assert captions.column("caption_index").to_pylist() == [m for _, m, _ in expected]
    assert captions.column("key").to_pylist() == [f"k{n:02d}" for n, _, _ in expected]
    rows = captions.column("image_row").to_numpy()
    assert images.column("index").to_numpy()[rows].tolist() == [n for n, _, _ in expected]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_embeddings_are_the_encoders_answers(dtype):
    images, captions, _ = run(config=EmbedConfig(batch_size=16, store_dtype=dtype))
    toy = Toy()
    pixels = np.stack([picture(n)[0] for n in GOOD])
    np.testing.assert_array_equal(embeddings(images), toy.encode_images(pixels).astype(dtype))
    texts = [text for n in GOOD for text in expected_captions(n)]
    np.testing.assert_array_equal(embeddings(captions), toy.encode_captions(texts).astype(dtype))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_similarity_is_the_cosine_of_what_is_stored(dtype):
    images, captions, _ = run(config=EmbedConfig(batch_size=16, store_dtype=dtype))
    a = embeddings(images).astype(np.float64)[captions.column("image_row").to_numpy()]
    b = embeddings(captions).astype(np.float64)
    cosine = (a * b).sum(axis=1) / np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    np.testing.assert_allclose(captions.column("similarity").to_numpy(), cosine, atol=1e-6)


def test_faults_become_rows_with_reasons():
    _, _, errors = run()
    found = list(
        zip(errors.column("key").to_pylist(), errors.column("reason").to_pylist(), strict=True)
    )
    assert sorted(found) == sorted(ERRORS)
    assert [key for key, _ in found] == sorted(key for key, _ in found)  # in the order of the shard
    details = dict(
        zip(errors.column("key").to_pylist(), errors.column("detail").to_pylist(), strict=True)
    )
    assert details["k03"] == "no member with a known extension"
    assert all(detail is not None for detail in details.values())


def test_counts_add_up():
    images, captions, errors = run()
    counts = embed.shard_counts(images, captions, errors)
    assert (counts.images, counts.bad) == (len(GOOD), len(ERRORS))
    assert counts.images + counts.bad == len(ITEMS)
    assert counts.pairs == sum(len(expected_captions(n)) for n in GOOD)
    assert counts.reasons["nonfinite_embedding"] == 3
    other = embed.ShardCounts(1, 2, 2, {"not_a_tar": 1, "missing_image": 1})
    totals = counts + other
    assert (totals.images, totals.pairs, totals.bad) == (
        counts.images + 1,
        counts.pairs + 2,
        counts.bad + 2,
    )
    assert totals.reasons == {**counts.reasons, "not_a_tar": 1, "missing_image": 5}
    assert list(totals.reasons) == sorted(totals.reasons)
    assert counts + embed.ShardCounts() == counts
    markers = [{**asdict(part), "shard": "s", "precision": "fp32"} for part in (counts, other)]
    assert embed.sum_counts(markers) == totals
    assert embed.sum_counts([]) == embed.ShardCounts()


def test_a_marker_holds_counts_as_ever():
    counts = embed.ShardCounts(3, 9, 2, {"a": 1, "b": 1})
    expected = '{"images": 3, "pairs": 9, "bad": 2, "reasons": {"a": 1, "b": 1}}'
    assert json.dumps(asdict(counts)) == expected


@pytest.mark.parametrize("pieces", [1, 3])
def test_pixels_are_seen_where_they_lie(pieces):
    """A block in one piece is not copied; bad samples in between take no place."""
    (raw,) = embed.read_blocks(ListSource(ITEMS), SHARD)
    block = embed.decode_block(raw, PREPROCESS, READ)
    expected = np.stack([picture(n, n in (7, 21))[0] for n in DECODED])
    size = block.num_rows // pieces + 1
    cut = pa.concat_tables([block.slice(start, size) for start in range(0, block.num_rows, size)])
    view = embed.pixel_view(cut, SIZE)
    np.testing.assert_array_equal(view, expected)
    buffer = block.column("image").chunks[0].buffers()[2]
    lies_in = buffer.address <= view.ctypes.data < buffer.address + buffer.size
    assert lies_in == (pieces == 1)
    part = embed.pixel_view(block.slice(10, 8), SIZE)
    inside = [number for number, n in enumerate(DECODED) if 10 <= n < 18]
    np.testing.assert_array_equal(part, expected[inside])
    assert embed.pixel_view(block.slice(40), SIZE).shape == (0, SIZE, SIZE, 3)
    assert embed.pixel_view(block.slice(0, 0), SIZE).shape == (0, SIZE, SIZE, 3)


@pytest.mark.parametrize("batch_size", [16, 48])
def test_each_image_and_each_caption_is_encoded_once(batch_size):
    toy = Toy()
    run(config=EmbedConfig(batch_size=batch_size), encoder=toy)
    assert all(size % ROW_MULTIPLE == 0 and size <= batch_size for size in toy.batches)
    padding = bytes(SIZE * SIZE * 3)
    asked = [image for image in toy.images if image != padding]
    assert (
        len(asked) == len(set(asked)) == len(GOOD) + 3
    )  # the three whose embeddings are not finite
    texts = [text for text in toy.captions if text]
    sent = [n for n in range(40) if isinstance(ITEMS[n], Sample) and n not in (5, 9)]
    assert sorted(texts) == sorted(text for n in sent for text in expected_captions(n))


def split(block: pa.Table, places: list[int]) -> list[pa.Table]:
    edges = sorted({0, block.num_rows, *(place % (block.num_rows + 1) for place in places)})
    return [block.slice(a, b - a) for a, b in itertools.pairwise(edges)]


@settings(max_examples=25)
@given(st.lists(st.integers(0, 50), max_size=6), st.randoms(use_true_random=False), st.booleans())
def test_blocks_may_be_cut_anywhere_and_arrive_in_any_order(places, shuffler, through_files):
    (block,) = embed.read_blocks(ListSource(ITEMS), SHARD)
    parts = []
    for piece in split(block, places):
        part = embed.embed_block(embed.decode_block(piece, PREPROCESS, READ), Toy(), SIZE, CONFIG)
        parts.append(embed.part_from_tables(embed.part_to_tables(part)) if through_files else part)
    assert sum(part.rows for part in parts) == len(ITEMS)
    assert [part.total for part in parts if part.total is not None] == [len(ITEMS)]
    shuffler.shuffle(parts)
    for found, expected in zip(embed.merge_parts(parts), WHOLE, strict=True):
        assert found.equals(expected, check_metadata=True)


WHOLE = run()


def test_reading_gives_blocks_of_bounded_size(monkeypatch):
    monkeypatch.setattr(embed, "BLOCK_SAMPLES", 16)
    blocks = list(embed.read_blocks(ListSource(ITEMS), SHARD))
    assert [block.num_rows for block in blocks] == [16, 16, 9]
    assert [ordinal for block in blocks for ordinal in block.column("ordinal").to_pylist()] == list(
        range(41)
    )
    assert blocks[-1].column("reason").to_pylist()[-1] == embed.END
    for found, expected in zip(run(), WHOLE, strict=True):
        assert found.equals(expected, check_metadata=True)

    monkeypatch.setattr(embed, "BLOCK_BYTES", 1)
    assert len(list(embed.read_blocks(ListSource(ITEMS), SHARD))) > 25


@pytest.mark.parametrize("source_items", [[], [ITEMS[3]], [ITEMS[5]]])
def test_a_shard_without_a_good_sample(source_items):
    images, captions, errors = run(source_items)
    assert images.num_rows == captions.num_rows == 0
    assert errors.num_rows == len(source_items)
    assert images.schema.equals(WHOLE[0].schema, check_metadata=True)
    assert captions.schema.equals(WHOLE[1].schema, check_metadata=True)


def test_an_end_that_falls_on_a_full_block(monkeypatch):
    """The row that says END comes alone: a part without rows, which closes the shard."""
    monkeypatch.setattr(embed, "BLOCK_SAMPLES", 20)
    blocks = list(embed.read_blocks(ListSource(ITEMS), SHARD))
    assert [block.num_rows for block in blocks] == [20, 20, 1]
    last = embed.embed_block(embed.decode_block(blocks[-1], PREPROCESS, READ), Toy(), SIZE, CONFIG)
    assert (last.rows, last.total, last.first) == (0, 40, 40)
    assert run()[0].equals(WHOLE[0])


@pytest.mark.filterwarnings("error")
def test_an_embedding_too_large_for_float16_is_an_error():
    class Loud(Toy):
        def encode_images(self, pixels):
            return np.full((len(pixels), DIM), 1e6, np.float32)

    sample = [ITEMS[0]]
    images, captions, errors = run(sample, encoder=Loud())
    assert (images.num_rows, captions.num_rows) == (0, 0)
    assert errors.column("reason").to_pylist() == ["nonfinite_embedding"]
    assert run(sample, EmbedConfig(batch_size=16, store_dtype="float32"), Loud())[0].num_rows == 1


@pytest.mark.filterwarnings("error")
def test_a_zero_embedding_has_similarity_zero():
    assert embed.cosine(np.array([[0, 0], [3, 4.0]]), np.array([[1, 1], [6, 8.0]])).tolist() == [
        0,
        1,
    ]


def test_limits_of_the_configuration_are_kept():
    buffer = io.BytesIO()
    Image.new("RGB", (40, 3)).save(buffer, "PNG")
    sample = [Sample("k", buffer.getvalue(), ("A Caption! " * 20,))]
    source = ListSource(sample)

    def with_limits(**options):
        return embed.embed_shard(source, SHARD, Toy(), PREPROCESS, ReadConfig(**options), CONFIG)

    assert with_limits(max_pixels=119)[2].column("reason").to_pylist() == ["image_too_large"]
    assert with_limits(min_side=4)[2].column("reason").to_pylist() == ["image_too_small"]
    images, captions, _ = with_limits(captions="paper")
    assert (images.column("width").to_pylist(), images.column("height").to_pylist()) == ([40], [3])
    assert captions.column("caption").to_pylist() == [" ".join(["a caption"] * 15)]


def test_the_batch_size_changes_no_byte(clip, clip_info):
    """A real model's sums could come out differently in batches of another shape."""
    rng = random.Random(0)
    sample = []
    for number in range(70):
        buffer = io.BytesIO()
        side = rng.randrange(20, 60)
        Image.effect_noise((side, 40), 60 + number).convert("RGB").save(buffer, "PNG")
        sample.append(
            Sample(f"k{number}", buffer.getvalue(), (f"noise of {side} pixels", f"number {number}"))
        )
    source = ListSource(sample)
    found = [
        embed.embed_shard(
            source, SHARD, clip, clip_info.preprocess, READ, EmbedConfig(batch_size=size)
        )
        for size in (16, 64)
    ]
    assert found[0][0].num_rows == 70
    for one, other in zip(*found, strict=True):
        assert one.equals(other, check_metadata=True)


def test_a_damaged_shard_is_read_again_once_its_file_has_changed() -> None:
    """A whole one never is: what is embedded of it stands."""
    errors = pa.table(
        {"key": ["a", ""], "reason": ["missing_image", "truncated_shard"], "detail": ["", "cut"]}
    )
    assert embed.damage(errors) == "truncated_shard: cut"
    assert embed.damage(errors.slice(0, 1)) == ""
    shard, whole = Shard("s", "s.tar", 7, "monday"), {"reasons": {"missing_image": 1}}
    other = [Shard("s", "s.tar", 8, "monday"), Shard("s", "s.tar", 7, "tuesday")]
    damaged = {"reasons": {}, "damage": "truncated_shard: cut", "file": embed.file_of(shard)}
    mended = {**whole, "file": embed.file_of(other[0])}
    assert embed.needs_reading(shard, {})
    assert not embed.needs_reading(shard, damaged)
    assert [embed.needs_reading(each, damaged) for each in other] == [True, True]
    assert not any(embed.needs_reading(shard, marker) for marker in (whole, mended))
    assert embed.marker_damage(damaged) == "truncated_shard: cut"
    assert embed.marker_damage({"reasons": {"not_a_tar": 1}}) == "not_a_tar", (
        "of an earlier version"
    )
    assert embed.marker_damage(mended) == ""


def test_a_block_tells_how_many_images_it_has_done():
    """Images and captions count alike, so that the end of both is all the images."""
    samples = ListSource([Sample(str(n), picture(n)[1], ("a", "b")) for n in range(20)])
    (raw,) = embed.read_blocks(samples, SHARD)
    block = embed.decode_block(raw, PREPROCESS, READ)
    told: list[float] = []
    embed.embed_block(block, Toy(), SIZE, CONFIG, told.append)
    assert told == pytest.approx([16 / 3, 20 / 3, 36 / 3, 52 / 3, 20])

"""Chunks, seeds and sizes of the pictures."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pds_ray.config import DecodeConfig
from pds_ray.stages import synthesize
from pds_ray.store.schemas import vectors
from tests.unit.stages.test_materialize import prototypes


def test_seeds_differ_and_fit():
    seeds = {synthesize.pair_seed(run, pair) for run in range(30) for pair in range(300)}
    assert len(seeds) == 9_000
    assert all(0 <= seed < 2**63 for seed in seeds)
    # neighbours have nothing in common: about half of the bits differ
    flips = [
        (synthesize.pair_seed(0, p) ^ synthesize.pair_seed(0, p + 1)).bit_count()
        for p in range(500)
    ]
    assert np.mean(flips) == pytest.approx(31.5, abs=1)


def test_seeds_are_fixed_for_ever():
    """The first 16 digits of `printf RUN/PAIR | sha256sum`: another rule would change every set."""
    assert synthesize.pair_seed(0, 0) == 0x5513E3EABBA6D754 >> 1
    assert synthesize.pair_seed(42, 7) == 0x82259E15FBE09CBA >> 1


@given(st.integers(0, 300), st.integers(1, 70))
def test_chunks_cover_every_pair_once(pairs, size):
    found = synthesize.chunks(pairs, size)
    assert [pair for chunk in found for pair in chunk] == list(range(pairs))
    assert all(len(chunk) == size for chunk in found[:-1])
    assert all(0 < len(chunk) <= size for chunk in found)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9))
def test_more_pairs_leave_the_full_chunks_as_they_are(few, many, size):
    few, many = sorted((few, many))
    full = few // size
    assert synthesize.chunks(few, size)[:full] == synthesize.chunks(many, size)[:full]


CAPTIONS = [f"caption {n}" for n in range(11)]


def test_a_batch_holds_the_rows_of_its_pairs():
    table = prototypes(CAPTIONS)
    batch = synthesize.make_batch(table[4:7], range(4, 7), 5, DecodeConfig())
    np.testing.assert_array_equal(batch.prototypes, vectors(table, "image_prototype")[4:7])
    assert batch.prototypes.dtype == np.float32
    assert batch.captions == CAPTIONS[4:7]
    assert batch.seeds == [synthesize.pair_seed(5, pair) for pair in (4, 5, 6)]
    assert batch.nearest == [("s1", "n4"), ("s1", "n5"), ("s1", "n6")]


def test_rescale_gives_the_norm_of_the_members():
    table = prototypes(CAPTIONS)
    norms = np.linspace(3, 40, len(CAPTIONS))
    table = table.set_column(table.schema.get_field_index("member_norm"), "member_norm", [norms])
    plain = synthesize.make_batch(table[2:9], range(2, 9), 0, DecodeConfig()).prototypes
    scaled = synthesize.make_batch(
        table[2:9], range(2, 9), 0, DecodeConfig(rescale=True)
    ).prototypes
    np.testing.assert_allclose(np.linalg.norm(scaled, axis=1), norms[2:9], rtol=1e-6)
    cosine = (
        (plain * scaled).sum(axis=1)
        / np.linalg.norm(plain, axis=1)
        / np.linalg.norm(scaled, axis=1)
    )
    np.testing.assert_allclose(cosine, 1, rtol=1e-6)


@pytest.mark.parametrize("rescale", [False, True])
def test_by_caption_every_pair_of_every_chunk_has_the_mean_of_the_whole_table(rescale):
    table = prototypes(CAPTIONS)
    config = DecodeConfig(condition="caption", rescale=rescale)
    whole = synthesize.make_batch(table, range(len(CAPTIONS)), 5, DecodeConfig(rescale=rescale))
    expected = whole.prototypes.astype(np.float64).mean(axis=0)
    mean = synthesize.mean_prototype([table[:3], table[3:4], table[4:]], config)
    chunked = [
        synthesize.make_batch(table[pairs.start : pairs.stop], pairs, 5, config, mean=mean)
        for pairs in synthesize.chunks(len(CAPTIONS), 4)
    ]
    seen = np.concatenate([batch.prototypes for batch in chunked])
    assert seen.shape == whole.prototypes.shape
    assert seen.dtype == np.float32
    assert (seen == seen[0]).all()
    np.testing.assert_allclose(seen[0], expected, atol=1e-7)
    assert [caption for batch in chunked for caption in batch.captions] == CAPTIONS
    assert [seed for batch in chunked for seed in batch.seeds] == whole.seeds


class Painter:
    """One flat picture a row, of a given size."""

    def __init__(self, size, lost=0):
        self.size, self.lost = size, lost

    def decode(self, batch):
        count = len(batch.captions) - self.lost
        return [Image.new("RGB", self.size, (seed % 256, 0, 0)) for seed in batch.seeds[:count]]


@pytest.mark.parametrize(
    ("made", "asked", "saved"),
    [((64, 64), 0, (64, 64)), ((64, 64), 32, (32, 32)), ((40, 30), 224, (224, 224))],
)
def test_images_have_the_size_asked_for(made, asked, saved):
    config = DecodeConfig(image_size=asked)
    batch = synthesize.make_batch(prototypes(CAPTIONS[:3]), range(3), 0, config)
    images = list(synthesize.synthesize_chunk(Painter(made), batch, config))
    assert [image.size for image in images] == [saved] * 3
    assert [image.getpixel((5, 5))[0] for image in images] == [seed % 256 for seed in batch.seeds]


def test_a_decoder_that_loses_images_is_caught():
    batch = synthesize.make_batch(prototypes(CAPTIONS[:3]), range(3), 0, DecodeConfig())
    with pytest.raises(RuntimeError, match="2 images for 3"):
        list(synthesize.synthesize_chunk(Painter((8, 8), lost=1), batch, DecodeConfig()))

"""The choice for a budget against brute force, its bytes against Pillow."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pds_ray.config import ConfigError, DecodeConfig
from pds_ray.stages.budget import (
    KEPT,
    RIVALS,
    SAMPLE,
    SAMPLE_SHARDS,
    Room,
    Saving,
    choose,
    draw,
    fitting_pairs,
    found,
    mean_bytes,
    record,
    savings,
    seen,
)
from pds_ray.training.recall import recalls

MANY = 10**9
WAYS = savings(64, DecodeConfig())


def noise(side: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    return Image.fromarray(pixels)


@st.composite
def worlds(draw_: st.DrawFn) -> tuple[dict[Saving, float], dict[Saving, float], float]:
    """Return bytes and recalls of each way of saving, and the bytes of a caption."""
    some = st.floats(1, 1e5)
    sizes = {way: draw_(some) for way in WAYS}
    r_mean = {way: draw_(st.floats(0.1, 100)) for way in WAYS}
    return sizes, r_mean, draw_(st.floats(0, 300))


@given(worlds(), st.integers(1, 10**8))
def test_the_fewest_bytes_that_keep_the_recall(world: Any, budget: int) -> None:
    sizes, r_mean, caption = world
    enough = KEPT * r_mean[Saving(64, "png")]
    good = [way for way in WAYS if min(r_mean[way], r_mean[Saving(way.side, "png")]) >= enough]
    least = min(sizes[way] for way in good)
    if budget < least + caption:
        with pytest.raises(ConfigError, match=r"; a pair needs about .* give more"):
            choose(Room(budget, 0, MANY, caption), sizes, r_mean.__getitem__)
        return
    choice = choose(Room(budget, 0, MANY, caption), sizes, r_mean.__getitem__)
    assert choice.saving in good
    assert sizes[choice.saving] == least
    each = least + caption
    assert choice.pairs * each <= budget * (1 + 1e-12)
    assert (choice.pairs + 1) * each > budget * (1 - 1e-12)
    assert all(choice.r_mean[way] == r_mean[way] for way in choice.r_mean)


@given(worlds(), st.integers(1, 10**6), st.integers(1, 500), st.booleans())
def test_pairs_that_are_given_or_all_there_are_get_the_best_that_fits(
    world: Any, budget: int, pairs: int, given_: bool
) -> None:
    """Each side takes the most bytes that fit; of these ways the highest recall wins."""
    sizes, r_mean, caption = world
    room = Room(budget, pairs if given_ else 0, MANY if given_ else pairs, caption)
    fit = [way for way in WAYS if pairs * (sizes[way] + caption) <= budget]
    try:
        choice = choose(room, sizes, r_mean.__getitem__)
    except ConfigError:
        assert not fit or not given_
        return
    assert not given_ or fit
    assert choice.pairs <= pairs
    if choice.pairs == pairs and given_:
        most = [
            max((way for way in fit if way.side == side), key=sizes.__getitem__)
            for side in {way.side for way in fit}
        ]
        assert r_mean[choice.saving] == max(r_mean[way] for way in most)
        assert choice.saving in most


def test_all_pairs_of_a_small_source_are_saved_as_well_as_fits() -> None:
    sizes = {way: 10.0 * way.side for way in WAYS}
    r_mean = dict.fromkeys(WAYS, 50.0)
    choice = choose(Room(10**6, 0, 20, 60.0), sizes, r_mean.__getitem__)
    assert (choice.pairs, choice.saving.side) == (20, 64)


def test_too_many_pairs_are_refused_in_one_line() -> None:
    sizes = {way: 10.0 * way.side for way in WAYS}
    with pytest.raises(ConfigError) as caught:
        choose(Room(1_000, 500, MANY, 40.0), sizes, lambda _: 1.0)
    assert str(caught.value) == (
        "budget is 1,000 bytes; 500 pairs need about 100,000 at the fewest bytes that the options "
        "leave open; give more"
    )


def test_a_quality_that_never_keeps_the_recall_gives_the_best_there_is() -> None:
    ways = savings(64, DecodeConfig(format="jpeg", quality=5))
    assert {(way.format, way.quality) for way in ways} == {("jpeg", 5)}
    sizes = {way: float(way.side) for way in ways}
    recall = {64: 40.0, 48: 50.0, 32: 20.0, 24: 10.0, 16: 5.0}

    def r_mean(way: Saving) -> float:
        return 99.0 if way.format == "png" else recall[way.side]

    assert choose(Room(10**4, 0, MANY, 0.0), sizes, r_mean).saving == Saving(48, "jpeg", 5)


def test_the_ways_that_the_options_leave_open() -> None:
    assert len(WAYS) == 5 * (1 + 3 + 3)
    assert [way.side for way in savings(224, DecodeConfig(format="png"))] == [224, 168, 112, 84, 56]
    assert [way.side for way in savings(2, DecodeConfig(format="png"))] == [2, 1]
    by_quality = savings(64, DecodeConfig(quality=80))
    assert {way.quality for way in by_quality} == {None, 80}


@given(st.dictionaries(st.text(min_size=1), st.integers(0, 500), max_size=40), st.integers(0, 99))
def test_the_sample_is_drawn_by_the_seed_alone(images: dict[str, int], seed: int) -> None:
    if not sum(images.values()):
        return
    drawn = draw(images, seed)
    again = draw(dict(images), seed)
    assert [(shard, *map(list, rows)) for shard, *rows in drawn] == [
        (shard, *map(list, rows)) for shard, *rows in again
    ]
    assert 1 <= len(drawn) <= SAMPLE_SHARDS
    for shard, rows, rivals in drawn:
        assert set(rows) | set(rivals) <= set(range(images[shard]))
        assert not set(rows) & set(rivals)
        for each in (rows, rivals):
            assert (np.diff(each) > 0).all()
    there, total = sorted(images.values(), reverse=True)[:SAMPLE_SHARDS], sum(images.values())
    assert sum(len(rows) for _, rows, _ in drawn) <= min(SAMPLE, sum(there))
    if len([count for count in images.values() if count]) <= SAMPLE_SHARDS:
        assert sum(len(rows) for _, rows, _ in drawn) == min(SAMPLE, total)
        rivals = sum(len(rivals) for _, _, rivals in drawn)
        assert rivals <= min(RIVALS, total - min(SAMPLE, total))


@pytest.mark.parametrize("way", [Saving(16, "png"), Saving(24, "jpeg", 75), Saving(12, "webp", 50)])
def test_bytes_and_pixels_are_those_of_pillow(way: Saving) -> None:
    images = [noise(32, seed) for seed in range(3)]
    files = []
    for image in images:
        small, file = image.resize((way.side, way.side), Image.Resampling.LANCZOS), io.BytesIO()
        options: dict[str, Any] = {
            "png": {},
            "jpeg": {"quality": way.quality, "optimize": True},
            "webp": {"quality": way.quality, "method": 6},
        }[way.format]
        small.save(file, way.format, **options)
        files.append(file)
    assert mean_bytes(images, way) == pytest.approx(np.mean([len(f.getvalue()) for f in files]))
    for image, file in zip(images, files, strict=True):
        opened = np.asarray(Image.open(file).convert("RGB"))
        np.testing.assert_array_equal(np.asarray(seen(image, way)), opened)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=50), st.integers(1, 20_000))
def test_the_longest_beginning_fits(sizes: list[int], budget: int) -> None:
    count = fitting_pairs(sizes, budget)
    assert sum(sizes[:count]) <= budget
    assert count == len(sizes) or sum(sizes[: count + 1]) > budget


def test_the_record_holds_the_choice_as_options() -> None:
    sizes = {way: 10.0 * way.side for way in WAYS}
    room = Room(10_000, 0, MANY, 40.0)
    choice = choose(room, sizes, lambda _: 1.0)
    written = record(room, 7, 7, sizes, choice)
    assert written["chosen"] == {
        "pairs": 50,
        "decode.image_size": 16,
        "decode.format": "png",
        "decode.quality": None,
    }
    assert len(written["measured"]) == len(WAYS)
    assert sum(each["r_mean"] is not None for each in written["measured"]) == len(choice.r_mean)


def ranks(query: np.ndarray, gallery: np.ndarray, own: list[int]) -> int:
    """Return the rank of the best of `own` for a query, from 0, by sorting."""
    order = sorted(range(len(gallery)), key=lambda item: -float(gallery[item] @ query))
    return min(order.index(item) for item in own)


@pytest.mark.parametrize("rivals", [0, 9])
def test_recall_among_rivals_by_sorting(rivals: int) -> None:
    rng = np.random.default_rng(rivals)

    def units(count: int) -> np.ndarray:
        rows = rng.standard_normal((count, 3)).astype(np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    owner = np.array([0, 0, 1, 2, 3, 3, 4, 5, 6, 7])
    images, captions, others, texts = units(8), units(10), units(rivals), units(rivals)
    by_image = [
        ranks(row, np.vstack([captions, texts]), list(np.flatnonzero(owner == number)))
        for number, row in enumerate(images)
    ]
    gallery = np.vstack([images, others])
    by_caption = [ranks(row, gallery, [of]) for row, of in zip(captions, owner, strict=True)]
    shares = [np.mean(np.array(each) < k) for each in (by_image, by_caption) for k in (1, 5, 10)]
    measured = found(images, captions, owner, others, texts)
    assert measured == pytest.approx(100 * np.mean(shares))
    if not rivals:
        tensors = map(torch.from_numpy, (images, captions, owner))
        assert measured == pytest.approx(recalls(*tensors)["r_mean"])

"""Recalls against ranks found by sorting."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pds_ray.training import recall as retrieval
from pds_ray.training.recall import RECALLS, recalls


def by_sorting(image: np.ndarray, text: np.ndarray, owner: np.ndarray) -> dict[str, float]:
    """The definition, query by query: stable sort by falling score, then the place of what is
    searched.
    """
    scores = image @ text.T
    scores = np.where(np.isnan(scores), -np.inf, scores)
    of_images = [
        min(np.flatnonzero(owner[np.argsort(-scores[row], kind="stable")] == row))
        for row in range(len(image))
    ]
    of_captions = [
        int(np.flatnonzero(np.argsort(-scores[:, column], kind="stable") == owner[column])[0])
        for column in range(len(text))
    ]
    found = {
        f"{name}@{k}": 100 * float(np.mean([rank < k for rank in ranks]))
        for name, ranks in (("tr", of_images), ("ir", of_captions))
        for k in (1, 5, 10)
    }
    return {**found, "r_mean": float(np.mean(list(found.values())))}


def measured(image: np.ndarray, text: np.ndarray, owner: np.ndarray) -> dict[str, float]:
    return recalls(torch.from_numpy(image), torch.from_numpy(text), torch.from_numpy(owner))


@st.composite
def galleries(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors of few small integers (exact products, many ties), some that are no numbers; captions
    in any order.

    Images have one to four of them, one image may have many more.
    """
    images = draw(st.integers(1, 25))
    counts = draw(st.lists(st.integers(1, 4), min_size=images, max_size=images))
    counts[draw(st.integers(0, images - 1))] += draw(st.sampled_from([0, 50]))
    owner = np.array(draw(st.permutations(np.repeat(np.arange(images), counts).tolist())))
    width, reach = draw(st.integers(1, 3)), draw(st.integers(0, 2))
    values = st.integers(-reach, reach).map(float)
    image = draw(arrays(np.float32, (images, width), elements=values))
    text = draw(arrays(np.float32, (len(owner), width), elements=values))
    for rows in (image, text):
        rows[draw(st.lists(st.integers(0, len(rows) - 1), max_size=3))] = np.nan
    return image, text, owner


@given(galleries(), st.sampled_from([7, 40, 1 << 25]))
def test_ranks_are_those_of_a_stable_sort(gallery, block):
    """With ties, with galleries below 10, and however few scores are held at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "BLOCK_ELEMENTS", block)
        assert measured(*gallery) == pytest.approx(by_sorting(*gallery), abs=1e-9)


def test_real_vectors_and_many_captions():
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(150), rng.integers(1, 7, 150))
    image = rng.normal(size=(150, 16))
    text = image[owner] + 1.8 * rng.normal(size=(len(owner), 16))
    found = measured(image, text, owner)
    assert found == pytest.approx(by_sorting(image, text, owner))
    assert len({round(value, 3) for value in found.values()}) == 7, (
        "a gallery on which the measures differ"
    )


def test_the_directions_are_not_swapped():
    """One image draws every caption: images find theirs, captions of the others do not."""
    image = np.eye(4, dtype=np.float32)
    text = np.eye(4, dtype=np.float32) + 2 * image[:1]
    found = measured(image, text, np.arange(4))
    assert found["ir@1"] == 25
    assert found["tr@1"] == 100


@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_a_collapsed_model_is_not_perfect(value):
    """All embeddings alike, or not numbers at all: what chance would find, never all."""
    owner = np.repeat(np.arange(100), 5)
    image, text = np.full((100, 4), value, np.float32), np.full((500, 4), value, np.float32)
    found = measured(image, text, owner)
    chance = {"tr@1": 1, "tr@5": 1, "tr@10": 2, "ir@1": 1, "ir@5": 5, "ir@10": 10}
    assert {name: found[name] for name in RECALLS} == pytest.approx(chance)


def test_one_embedding_that_is_no_number_is_found_by_none():
    owner = np.arange(30)
    image = np.eye(30, dtype=np.float32)
    text = image.copy()
    text[7] = np.nan
    found = measured(image, text, owner)
    assert found["tr@1"] == pytest.approx(100 * 29 / 30)
    assert found["ir@1"] == pytest.approx(100 * 29 / 30)


def test_a_perfect_model_is_perfect():
    owner = np.repeat(np.arange(40), 5)
    image = np.linalg.qr(np.random.default_rng(1).normal(size=(40, 40)))[0].astype(np.float32)
    assert set(measured(image, image[owner], owner).values()) == {100.0}


@pytest.mark.parametrize("owner", [[0, 0, 2], [0, 1, 1]])
def test_an_image_without_caption_is_refused(owner):
    with pytest.raises(ValueError, match="needs a caption"):
        measured(np.eye(3), np.eye(3), np.array(owner))


def test_the_gallery_of_coco_fits():
    """5,000 images with 25,010 captions: 500 MB of scores, 1 GB of their places, of which a block
    is held at once. Each score is computed once, for both directions.
    """
    rng = np.random.default_rng(2)
    owner = np.concatenate([np.repeat(np.arange(5000), 5), np.arange(10)])
    image = torch.from_numpy(rng.normal(size=(5000, 64)).astype(np.float32))
    text = image[owner] + 3 * torch.from_numpy(rng.normal(size=(25010, 64)).astype(np.float32))
    shapes = _products(image, text, torch.from_numpy(owner))
    assert max(map(math.prod, shapes)) <= retrieval.BLOCK_ELEMENTS
    assert sum(map(math.prod, shapes)) == 5000 * 25010


def test_a_gallery_of_one_block_takes_one_product():
    rng = np.random.default_rng(4)
    image = torch.from_numpy(rng.normal(size=(30, 8)).astype(np.float32))
    text = image + 2 * torch.from_numpy(rng.normal(size=(30, 8)).astype(np.float32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "BLOCK_ELEMENTS", 900)
        assert _products(image, text, torch.arange(30)) == [(30, 30)]
        patch.setattr(retrieval, "BLOCK_ELEMENTS", 899)
        assert _products(image, text, torch.arange(30)) == [(29, 29), (29, 1), (1, 29), (1, 1)]
        patch.setattr(retrieval, "BLOCK_ELEMENTS", 1)
        assert _products(image, text, torch.arange(30)) == [(1, 1)] * 900


def test_an_image_of_very_many_captions_widens_no_block_beyond_its_scores():
    """2,000 images of one caption and one of 2,000: padded alike they would take 2,001 places each,
    all at once.
    """
    rng = np.random.default_rng(3)
    owner = rng.permutation(np.concatenate([np.arange(2001), np.full(2000, 77)]))
    image = rng.normal(size=(2001, 8)).astype(np.float32)
    text = (image[owner] + rng.normal(size=(4001, 8))).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "BLOCK_ELEMENTS", 1 << 16)
        sizes = _sizes(lambda: measured(image, text, owner))
        assert max(sizes) <= 1 << 16
        assert measured(image, text, owner) == pytest.approx(by_sorting(image, text, owner))


def _sizes(call: Callable[[], object]) -> list[int]:
    """Elements of each tensor that is made on the way."""
    from torch.overrides import TorchFunctionMode

    sizes: list[int] = []

    class Made(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor):
                sizes.append(found.numel())
            return found

    with Made():
        call()
    return sizes


def _products(
    image: torch.Tensor, text: torch.Tensor, owner: torch.Tensor
) -> list[tuple[int, ...]]:
    """Return the shape of each float32 product."""
    from torch.overrides import TorchFunctionMode

    shapes: list[tuple[int, ...]] = []

    class Products(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            single = function in (torch.Tensor.matmul, torch.Tensor.__matmul__)
            if single and found.dtype == torch.float32:
                shapes.append(tuple(found.shape))
            return found

    with Products():
        assert 0 < recalls(image, text, owner)["r_mean"] < 100
    return shapes


def with_subjects(
    image: np.ndarray, text: np.ndarray, owner: np.ndarray, subject: np.ndarray
) -> dict[str, float]:
    """The definition: the first place, in a stable sort, of anything of the query's subject."""
    scores = np.where(np.isnan(image @ text.T), -np.inf, image @ text.T)
    of_caption = subject[owner]

    def ranks(scores: np.ndarray, wanted: np.ndarray, there: np.ndarray) -> list[int]:
        orders = [np.argsort(-row, kind="stable") for row in scores]
        return [
            next(place for place, item in enumerate(order) if there[item] == want)
            for order, want in zip(orders, wanted, strict=True)
        ]

    found = {
        f"{name}@{k}": 100 * float(np.mean([rank < k for rank in of_query]))
        for name, of_query in (
            ("tr", ranks(scores, subject, of_caption)),
            ("ir", ranks(scores.T, of_caption, subject)),
        )
        for k in (1, 5, 10)
    }
    return {**found, "r_mean": float(np.mean(list(found.values())))}


@given(galleries(), st.data(), st.sampled_from([7, 40, 1 << 25]))
def test_a_hit_with_any_image_of_the_subject_is_right(gallery, data, block):
    """In both directions, with ties, however few scores are held at once."""
    image, text, owner = gallery
    numbers = st.lists(st.integers(0, len(image)), min_size=len(image), max_size=len(image))
    subject = np.array(data.draw(numbers))
    tensors = [torch.from_numpy(array) for array in (image, text, owner, subject)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "BLOCK_ELEMENTS", block)
        found = recalls(*tensors)
    assert found == pytest.approx(with_subjects(image, text, owner, subject), abs=1e-9)


def test_an_image_that_stands_for_another_of_its_subject():
    """Two images of one subject with each other's captions: wrong one by one, right together."""
    image = torch.eye(4)
    text, owner = image[[1, 0, 2, 3]], torch.arange(4)
    assert recalls(image, text, owner)["ir@1"] == recalls(image, text, owner)["tr@1"] == 50
    assert recalls(image, text, owner, torch.tensor([5, 5, 0, 1]))["r_mean"] == 100


def by_counting(
    image: np.ndarray, text: np.ndarray, owner: np.ndarray, subject: np.ndarray
) -> tuple[list[int], list[int]]:
    """Ranks by float64 products, summed exactly, of images and of captions."""
    scores = np.array([[math.fsum(row) for row in one * text.astype(float)] for one in image])
    scores[np.isnan(scores)] = -np.inf
    of_caption = subject[owner]

    def ranks(scores: np.ndarray, wanted: np.ndarray, there: np.ndarray) -> list[int]:
        found = []
        for row, want in zip(scores, wanted, strict=True):
            best = max(row[there == want])
            place = min(np.flatnonzero((there == want) & (row == best)))
            found.append(int(sum(row > best) + sum(row[:place] == best)))
        return found

    return ranks(scores, subject, of_caption), ranks(scores.T, of_caption, subject)


@st.composite
def crowded_galleries(draw: st.DrawFn) -> list[np.ndarray]:
    """Unit vectors that are equal, or apart by less than a float32 product tells, or no numbers."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    images, kinds = draw(st.integers(1, 20)), draw(st.integers(1, 4))
    owner = np.concatenate([np.arange(images), rng.integers(0, images, draw(st.integers(0, 40)))])
    owner = rng.permutation(owner)
    width = draw(st.sampled_from([1, 3, 64, 700]))
    centre = rng.normal(size=(kinds, width))
    nudge = draw(st.sampled_from([0.0, 1e-8, 1e-7, 1e-6, 1e-3, 1.0]))
    found = []
    for count in (images, len(owner)):
        rows = centre[rng.integers(0, kinds, count)] + nudge * rng.normal(size=(count, width))
        rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
        rows = rows[rng.integers(0, count, count)]  # some of them several times
        rows[draw(st.lists(st.integers(0, count - 1), max_size=2))] = np.nan
        found.append(rows)
    subject = rng.integers(0, images, images) if draw(st.booleans()) else np.arange(images)
    return [*found, owner, subject]


@given(crowded_galleries(), st.sampled_from([9, 300, 1 << 25]))
def test_ranks_are_those_of_exact_products(gallery, block):
    """Rounding could tell them apart, or put them in another order, block by block."""
    image, text, owner, subject = gallery
    tensors = [torch.from_numpy(array) for array in (image, text, subject, subject[owner])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "BLOCK_ELEMENTS", block)
        of_images, of_captions = retrieval._first_ranks(*tensors)
    assert (of_images.tolist(), of_captions.tolist()) == by_counting(*gallery)


def test_rounding_of_the_product_does_not_count(monkeypatch):
    """Scores that are off by as much as float32 products may be give the same ranks."""
    rng = np.random.default_rng(5)
    owner = np.repeat(np.arange(60), 3)
    image = rng.normal(size=(60, 300)) + 3
    text = image[owner] + 2 * rng.normal(size=(180, 300))
    image, text = (
        (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
        for rows in (image, text)
    )
    subject = np.arange(60)
    exact = by_counting(image, text, owner, subject)
    numbers = retrieval._numbers

    def rounded(scores: torch.Tensor) -> torch.Tensor:
        off = torch.from_numpy(rng.uniform(-1, 1, scores.shape).astype(np.float32)).sign()
        return numbers(scores + 300 * 2.0**-24 * off if scores.dtype == torch.float32 else scores)

    monkeypatch.setattr(retrieval, "_numbers", rounded)
    tensors = [torch.from_numpy(array) for array in (image, text, subject, subject[owner])]
    found = tuple(ranks.tolist() for ranks in retrieval._first_ranks(*tensors))
    assert found == exact


def test_products_are_of_whole_float32_whatever_the_program_asked_for(monkeypatch):
    asked, seen, numbers = torch.get_float32_matmul_precision(), [], retrieval._numbers

    def watched(scores: torch.Tensor) -> torch.Tensor:
        if scores.dtype == torch.float32:
            kinds = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
            seen.append([kind.fp32_precision for kind in kinds])
        return numbers(scores)

    monkeypatch.setattr(retrieval, "_numbers", watched)
    rows = torch.eye(4)
    torch.set_float32_matmul_precision("medium")
    try:
        assert recalls(rows, rows, torch.arange(4))["r_mean"] == 100
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(asked)
    assert seen == [["ieee", "ieee"]]

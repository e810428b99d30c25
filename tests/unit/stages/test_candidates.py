"""Candidates of a pair: scores by hand, ties by order, real images where decoded ones fail."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from PIL import Image

from pds_ray.config import DecodeConfig
from pds_ray.modalities.image import Preprocess
from pds_ray.stages import candidates, synthesize
from pds_ray.stages.candidates import Choice, Judged
from pds_ray.store.schemas import vector_array, vectors
from tests.unit.stages.test_materialize import prototypes

SIZE = 4


class Colors:
    """An encoder: the mean colour of an image, and its brightness."""

    dim = 4

    def encode_images(self, pixels: np.ndarray) -> np.ndarray:
        mean = pixels.reshape(len(pixels), -1, 3).mean(axis=1)
        return np.concatenate([mean, mean.mean(axis=1, keepdims=True)], axis=1).astype(np.float32)

    def encode_captions(self, captions: list[str]) -> np.ndarray:
        raise NotImplementedError


def flat(color: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", (SIZE, SIZE), color)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize(("image_weight", "text_weight"), [(1.0, 1.0), (2.0, 0.5), (0.0, 1.0)])
def test_scores_are_weighted_cosines_to_both_prototypes(image_weight, text_weight):
    table = prototypes(["a", "b", "c", "d"])
    config = DecodeConfig(image_weight=image_weight, text_weight=text_weight)
    judge = candidates.Judge(Colors(), Preprocess(SIZE), table, config)
    images = [flat((200, 10, 40)), flat((3, 90, 240))]
    found = judge.judge(range(1, 3), images, candidates.SYNTHETIC, 5, 10)
    means, texts = vectors(table, "image_prototype"), vectors(table, "text_prototype")
    for judged, image, pair in zip(found, images, (1, 2), strict=True):
        choice, vector = judged.choice, Colors().encode_images(np.asarray(image)[None])[0]
        assert judged.image is image
        assert (choice.pair, choice.origin, choice.candidate) == (pair, "synthetic", 5)
        assert choice.noise_level == 10
        to_image, to_text = cosine(vector, means[pair]), cosine(vector, texts[pair])
        assert choice.image_cosine == pytest.approx(to_image, abs=1e-4)
        assert choice.text_cosine == pytest.approx(to_text, abs=1e-4)
        expected = image_weight * to_image + text_weight * to_text
        assert choice.score == pytest.approx(expected, abs=1e-4)
        nearest = int(np.argmax([cosine(vector, mean) for mean in means]))
        assert choice.round_trip == (nearest == pair)


def test_no_prototypes_are_copied_for_a_chunk():
    """Each candidate of each chunk is judged by all image prototypes, which may be a gigabyte."""
    pairs = 20_000
    table = prototypes(["a"] * pairs)
    judge = candidates.Judge(Colors(), Preprocess(SIZE), table, DecodeConfig())
    red = flat((200, 10, 40))
    judge.judge(range(1), [red], candidates.SYNTHETIC)  # imports, once
    tracemalloc.start()
    judge.judge(range(7, 8), [red], candidates.SYNTHETIC)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    cosines = pairs * np.dtype(np.float64).itemsize
    assert cosines < peak < 2 * cosines, "the cosines of the image alone"


def test_of_equal_prototypes_the_first_is_the_nearest():
    table = prototypes(["a", "b", "c", "d"])
    color = np.array([1.0, 0.0, 0.0, 1 / 3])
    rows = np.array([-color, color, color, -color])
    table = table.set_column(1, table.schema.field(1), vector_array(rows))
    judge = candidates.Judge(Colors(), Preprocess(SIZE), table, DecodeConfig())
    found = judge.judge(range(4), [flat((255, 0, 0))] * 4, candidates.SYNTHETIC)
    assert [each.choice.round_trip for each in found] == [False, True, False, False]


def judged(score: float, candidate: int | None = 0, round_trip: bool = True) -> Judged:
    origin = candidates.REAL if candidate is None else candidates.SYNTHETIC
    choice = Choice(0, origin, candidate, None, score, score, score, round_trip)
    return Judged(flat((0, 0, 0)), choice)


def test_the_best_is_kept_and_of_equals_the_first():
    rounds = [[judged(0.2, 0), judged(0.5, 0)], [judged(0.3, 1), judged(0.5, 1)]]
    best = candidates.better(*rounds)
    assert [each.choice.candidate for each in best] == [1, 0]


@pytest.mark.parametrize(
    ("decoded", "real", "taken"),
    [
        (judged(0.5), judged(0.6, None), 0),  # within the margin
        (judged(0.5), judged(0.61, None), None),
        (judged(0.9, round_trip=False), judged(0.1, None), None),
        (judged(0.5), judged(0.6, None, round_trip=False), 0),
    ],
)
def test_a_real_image_takes_the_place_of_one_that_fails(decoded, real, taken):
    (found,) = candidates.fallen_back([decoded], [real], margin=0.1)
    assert found.choice.candidate == taken


def test_candidates_have_seeds_of_their_own_and_the_first_that_of_the_pair():
    seeds = {synthesize.pair_seed(0, pair, number) for pair in range(50) for number in range(20)}
    assert len(seeds) == 1000
    assert synthesize.pair_seed(42, 7, 0) == synthesize.pair_seed(42, 7)


def test_noise_levels_are_taken_in_turn():
    table, config = prototypes(["a", "b"]), DecodeConfig(noise_levels="0, 20", candidates=3)
    batches = [synthesize.make_batch(table, range(2), 0, config, candidate=n) for n in range(3)]
    assert [batch.noise_level for batch in batches] == [0, 20, 0]
    assert synthesize.make_batch(table, range(2), 0, DecodeConfig(noise_level=7)).noise_level == 7

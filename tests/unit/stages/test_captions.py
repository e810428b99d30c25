"""Captions with a round trip, against whole similarity matrices."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pds_ray.errors import ConfigError
from pds_ray.stages import captions as core


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 60), max_size=4), st.integers(1, 70))
def test_lists_are_those_of_a_whole_sort_however_the_shards_are_cut(seed, places, count):
    rng = np.random.default_rng(seed)
    # rows along few axes, so that many cosines are equal, to the last bit
    rows = np.zeros((60, 3), np.float32)
    rows[np.arange(60), rng.integers(0, 3, 60)] = rng.choice([-4, -1, 1, 2], 60)
    queries = rng.standard_normal((7, 3)).astype(np.float32)
    cuts = [0, *sorted(places), 60]
    best = core.no_rows(len(queries), count)
    for number, (start, stop) in enumerate(pairwise(cuts)):
        best = core.merge_rows(best, core.top_rows(queries, rows[start:stop], number, count))
    whole = core.top_rows(queries, rows, 0, count)
    np.testing.assert_array_equal(best.cosine, whole.cosine)
    listed = min(count, len(rows))
    place = np.array(cuts)[best.shard[:, :listed]] + best.row[:, :listed]
    np.testing.assert_array_equal(place, whole.row[:, :listed])
    for query in range(len(queries)):
        order = np.argsort(-whole_cosines(queries[query], rows), kind="stable")
        np.testing.assert_array_equal(whole.row[query, :listed], order[:listed])
    assert (best.row[:, listed:] == -1).all()


@settings(max_examples=40)
@given(
    st.integers(0, 10**6),
    st.lists(st.integers(0, 60), max_size=5),
    st.lists(st.integers(0, 6), min_size=6, max_size=6),
    st.sampled_from([1, 5, 70]),
)
def test_answers_to_what_was_known_earlier_make_the_same_lists(seed, places, behind, count):
    """A task answers with what is above the ends of the lists as they were some time ago."""
    rng = np.random.default_rng(seed)
    rows = np.zeros((60, 3), np.float32)
    rows[np.arange(60), rng.integers(0, 3, 60)] = rng.choice([-4, -1, 1, 2], 60)
    queries = rng.standard_normal((7, 3)).astype(np.float32)
    lists = core.no_rows(len(queries), count)
    ends = [lists.cosine[:, -1].copy()]
    for number, (start, stop) in enumerate(pairwise([0, *sorted(places), 60])):
        at_least = ends[max(0, number - behind[number])]
        part = core.top_rows(queries, rows[start:stop], number, count, at_least)
        answer = core.entries(part, at_least)
        assert (answer.cosine > at_least[answer.query]).all()
        core.merge_entries(lists, answer)
        ends.append(lists.cosine[:, -1].copy())
    whole = core.no_rows(len(queries), count)
    for number, (start, stop) in enumerate(pairwise([0, *sorted(places), 60])):
        whole = core.merge_rows(whole, core.top_rows(queries, rows[start:stop], number, count))
    for name in ("cosine", "shard", "row"):
        np.testing.assert_array_equal(getattr(lists, name), getattr(whole, name))


def whole_cosines(query: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return np.sign(rows) @ (query / np.linalg.norm(query))


def test_a_caption_finds_the_first_of_the_nearest_images():
    images = np.array([[2, 0], [0, 1], [3, 0]], np.float32)
    captions = np.array([[5, 1], [1, 9]], np.float32)
    assert core.finds(captions, images).tolist() == [0, 1]


def finds_of(texts: list[list[str]], images: list[list[int]]) -> core.Finds:
    """Return the facts on lists of these texts, which are nearest to these images."""
    found = core.no_finds(len(texts), 8)
    for place, (own, nearest) in enumerate(zip(texts, images, strict=True)):
        found.text[place, : len(own)] = core.text_numbers(own)
        found.image[place, : len(own)] = nearest
    return found


def chosen(texts: list[list[str]], images: list[list[int]]) -> tuple[list[int], list[bool]]:
    places, accepted = core.choose(finds_of(texts, images))
    return places.tolist(), accepted.tolist()


def test_the_first_caption_that_finds_its_image_is_taken():
    texts = [["a", "b", "c"], ["a", "d"]]
    assert chosen(texts, [[1, 0, 0], [1, 1]]) == ([1, 0], [True, True])


def test_without_one_the_first_that_no_other_image_has_is_taken():
    texts = [["a", "b"], ["a", "c"], ["a"]]
    places, accepted = chosen(texts, [[1, 1], [1, 1], [1]])
    assert places == [1, 0, 0], "the third image has no other"
    assert accepted == [False, True, False]


@given(st.integers(0, 10**6))
def test_captions_are_accepted_exactly_where_a_list_holds_one_and_never_twice(seed):
    rng = np.random.default_rng(seed)
    images = int(rng.integers(1, 6))
    nearest = {f"t{n}": int(rng.integers(0, images)) for n in range(8)}  # a text, its image
    texts = [
        [str(text) for text in rng.choice(list(nearest), int(rng.integers(1, 6)))]
        for _ in range(images)
    ]
    places, accepted = chosen(texts, [[nearest[text] for text in own] for own in texts])
    for image, own in enumerate(texts):
        assert accepted[image] == any(nearest[text] == image for text in own)
        if accepted[image]:
            assert nearest[own[places[image]]] == image
    taken = [own[place] for own, place in zip(texts, places, strict=True)]
    kept = [text for text, is_in in zip(taken, accepted, strict=True) if is_in]
    assert len(set(kept)) == len(kept)
    for image in np.flatnonzero(~np.array(accepted)):
        earlier = {*kept, *(taken[i] for i in range(image) if not accepted[i])}
        free = [text for text in texts[image] if text not in earlier]
        assert taken[image] == (free or texts[image])[0]


def test_a_list_needs_a_caption():
    with pytest.raises(IndexError):
        chosen([["a"], []], [[0], []])


def test_equal_texts_have_equal_numbers():
    numbers = core.text_numbers(["a", "b", "", "a", "\U0001f600 a"])
    assert (numbers.dtype, len(set(numbers.tolist()))) == (np.int64, 4)
    assert numbers[0] == numbers[3]
    assert core.text_numbers([]).shape == (0,)


def test_images_that_no_caption_is_near_to_are_counted():
    vectors = np.ones((5, 3), np.float32)
    core.check_images(vectors)
    vectors[1, 2], vectors[4, 0], vectors[4, 1] = np.nan, np.inf, np.nan
    with pytest.raises(ConfigError, match="for 2 of the 5 finished images"):
        core.check_images(vectors)

"""Prototypes against masks over all rows and whole similarity matrices."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pds_ray.stages import products
from pds_ray.stages import prototypes as core
from pds_ray.store.schemas import MEMBER_SAMPLE


def world(seed: int, pairs: int = 200, clusters: int = 6, dim: int = 4):
    """Random vectors and labels, a fifth pruned; a random permutation with two empty matches."""
    rng = np.random.default_rng(seed)
    image_vectors, text_vectors = rng.standard_normal((2, pairs, dim)).astype(np.float32)
    if pairs:
        image_vectors = image_vectors[
            rng.integers(0, 1 + pairs // 3, pairs)
        ]  # images have several captions
    image, text = rng.integers(0, clusters, (2, pairs)).astype(np.int32)
    text_of = rng.permutation(clusters).astype(np.int32)
    pairless = np.zeros(clusters, bool)
    pairless[:2] = True
    for cluster in np.flatnonzero(pairless):  # no pair may be shared by a pairless match
        clash = (image == cluster) & (text == text_of[cluster])
        text[clash] = text_of[-1]
    pruned = rng.random(pairs) < 0.2
    image[pruned] = text[pruned] = -1
    matches = core.Matches(np.arange(clusters, dtype=np.int32), text_of, pairless)
    return image_vectors, text_vectors, image, text, matches


def shared_images(of_pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each image once, in an order of its own, and which of them each pair has."""
    images, rows = np.unique(of_pairs, axis=0, return_inverse=True)
    return images, rows.reshape(-1)


def sums_of(seed: int, places: tuple[int, ...] = (), **size: int) -> core.Sums:
    image_vectors, text_vectors, image, text, matches = world(seed, **size)
    clusters = len(matches.image_cluster)
    total = core.empty_sums(np.arange(clusters), image_vectors.shape[1])
    rows = np.split(np.arange(len(image)), sorted(place % (len(image) + 1) for place in places))
    for number, mine in enumerate(rows):
        keys = [f"k{row}" for row in mine]
        part = core.shard_sums(
            core.ShardPairs(
                f"s{number}",
                keys,
                *shared_images(image_vectors[mine]),
                text_vectors[mine],
                image[mine],
                text[mine],
            ),
            matches,
            clusters,
        )
        core.add_sums(total, part)
    return total


def brute_force(seed: int, *size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(rows of the image side, rows of the text side) of each match, by masks."""
    _, _, image, text, matches = world(seed, *size)
    found = []
    for i, j, pairless in zip(
        matches.image_cluster, matches.text_cluster, matches.whole, strict=True
    ):
        on_image, on_text = image == i, text == j
        shared = on_image & on_text
        found.append(
            (np.flatnonzero(on_image), np.flatnonzero(on_text))
            if pairless
            else (np.flatnonzero(shared),) * 2
        )
    return found


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 200), max_size=5))
def test_sums_equal_masks_however_the_shards_are_cut(seed, places):
    image_vectors, text_vectors, _, _, matches = world(seed)
    total = sums_of(seed, tuple(places))
    for match, (on_image, on_text) in enumerate(brute_force(seed)):
        assert total.image_count[match] == len(on_image)
        assert total.text_count[match] == len(on_text)
        np.testing.assert_allclose(
            total.image[match], image_vectors[on_image].astype(np.float64).sum(0), atol=1e-9
        )
        np.testing.assert_allclose(
            total.text[match], text_vectors[on_text].astype(np.float64).sum(0), atol=1e-9
        )
        norms = np.linalg.norm(image_vectors[on_image].astype(np.float64), axis=1)
        assert total.image_norm[match] == pytest.approx(norms.sum())
        if not matches.whole[match]:
            assert total.image_count[match] == total.text_count[match]


@settings(max_examples=50)
@given(st.integers(0, 10**6), st.sampled_from([0, 1, 37, 400]))
def test_rounding_is_that_of_one_addition_after_the_other(seed, pairs):
    """To the last bit, where sums of parts would differ: many pairs per match, of all lengths.

    Then it is to the nearest multiple of 2^-28.
    """
    image_vectors, text_vectors, image, text, matches = world(seed, pairs, clusters=3)
    lengths = 10.0 ** np.random.default_rng(seed).integers(-30, 30, (pairs, 1))
    image_vectors = (image_vectors * lengths).astype(np.float32)
    part = core.shard_sums(
        core.ShardPairs(
            "s", [""] * pairs, *shared_images(image_vectors), text_vectors, image, text
        ),
        matches,
        3,
    )
    for vectors, found, side in ((image_vectors, part.image, 0), (text_vectors, part.text, 1)):
        expected = np.zeros((3, vectors.shape[1]))
        for match in range(3):
            on_image, on_text = (
                image == matches.image_cluster[match],
                text == matches.text_cluster[match],
            )
            mine = (on_image, on_text)[side] if matches.whole[match] else on_image & on_text
            np.add.at(expected, np.full(mine.sum(), match), vectors[mine].astype(np.float64))
        multiples = np.array([[round(value * 2**28) for value in row] for row in expected])
        expected = (multiples / 2**28).astype(np.float64)
        assert (found == expected[part.match]).all()


@settings(max_examples=30)
@given(
    st.integers(0, 10**6),
    st.sampled_from([np.float16, np.float32]),
    st.lists(st.integers(0, 400), min_size=1, max_size=9),
    st.lists(st.integers(0, 9), max_size=3),
)
def test_sums_are_exact_hence_the_same_in_any_grouping(seed, dtype, places, cuts):
    """Sums of float16 are those of the rows; each shard of float32 is rounded once."""
    image_vectors, text_vectors, image, text, matches = world(seed, 400, 3)
    lengths = 10.0 ** np.random.default_rng(seed).uniform(-4, 2, (400, 1))
    image_vectors = (image_vectors * lengths).astype(dtype).astype(np.float32)
    text_vectors = (text_vectors * lengths).astype(dtype).astype(np.float32)
    shards = np.split(np.arange(400), sorted(places))
    parts = []
    for number, mine in enumerate(shards):
        sides = *shared_images(image_vectors[mine]), text_vectors[mine], image[mine], text[mine]
        pairs = core.ShardPairs(f"s{number}", [f"k{row}" for row in mine], *sides)
        parts.append(core.shard_sums(pairs, matches, 3))
    whole = core.added_sums(*parts)
    bounds = [0, *sorted(cut % (len(parts) + 1) for cut in cuts), len(parts)]
    groups = [core.added_sums(*parts[a:b]) for a, b in pairwise(bounds) if a < b]
    assert_same(core.added_sums(*groups), whole)
    rows = brute_force(seed, 400, 3)
    for place, match in enumerate(whole.match):
        for vectors, found, mine in zip(
            (image_vectors, text_vectors), (whole.image, whole.text), rows[match], strict=True
        ):
            exact = [math.fsum(column) for column in vectors[mine].astype(np.float64).T]
            error = 0 if dtype is np.float16 else len(parts) * 2.0**-28
            np.testing.assert_allclose(found[place], exact, rtol=0, atol=error)


def assert_same(found: core.Sums, expected: core.Sums) -> None:
    for name in ("match", "image", "text", "image_count", "text_count", "image_norm"):
        assert getattr(found, name).tobytes() == getattr(expected, name).tobytes(), name
    assert found.members == expected.members


def test_matches_without_pairs_are_left_out_of_the_answer():
    total = core.empty_sums(np.arange(4), 2)
    total.image_count[2] = total.text_count[0] = 1
    total.members[2].append("s/k")
    found = core.touched(total)
    assert (found.match.tolist(), found.members) == ([0, 2], [[], ["s/k"]])
    assert_same(core.added_sums(found), found)


@pytest.mark.parametrize("seed", range(3))
def test_means_are_those_of_the_rows_in_falling_cosine(seed):
    image_vectors, text_vectors, _, _, _ = world(seed)
    made = core.means(sums_of(seed))
    rows = brute_force(seed)
    assert sorted(made.match) == [c for c, (a, b) in enumerate(rows) if len(a) and len(b)]
    assert made.image.dtype == made.text.dtype == np.float32
    for place, match in enumerate(made.match):
        on_image, on_text = rows[match]
        image = image_vectors[on_image].astype(np.float64).mean(axis=0)
        text = text_vectors[on_text].astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(made.image[place], image, atol=1e-6)
        np.testing.assert_allclose(made.text[place], text, atol=1e-6)
        cosine = image @ text / (np.linalg.norm(image) * np.linalg.norm(text))
        assert made.cosine[place] == pytest.approx(cosine, abs=1e-9)
    assert (np.diff(made.cosine) <= 0).all()


@settings(max_examples=50)
@given(
    st.integers(0, 10**6),
    st.sampled_from([4, 12, 200]),
    st.lists(st.integers(0, 5), max_size=3),
)
def test_ranges_of_matches_that_are_summed_apart_give_the_same_bytes(seed, pairs, cuts):
    """Two shards, cut by ranges of matches as their tasks cut them; of few pairs most are empty."""
    image_vectors, text_vectors, image, text, matches = world(seed, pairs)
    clusters, dim = len(matches.image_cluster), image_vectors.shape[1]
    bounds = [0, *sorted(cut * clusters // 5 for cut in cuts), clusters]
    whole = core.empty_sums(np.arange(clusters), dim)
    answers = []
    for number, mine in enumerate(np.array_split(np.arange(pairs), 2)):
        sides = *shared_images(image_vectors[mine]), text_vectors[mine], image[mine], text[mine]
        shard = core.ShardPairs(f"s{number}", [f"k{row}" for row in mine], *sides)
        part = core.shard_sums(shard, matches, clusters)
        core.add_sums(whole, part)
        total = core.empty_sums(np.arange(clusters), dim)
        core.add_sums(total, part)
        answers.append([core.touched(own) for own in total.split(bounds)])
    apart = [core.added_sums(*own) for own in zip(*answers, strict=True)]
    found = core.merged([core.means(total) for total in apart])
    expected = core.means(whole)
    for name in ("image", "text", "cosine", "match"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    members = core.joined_members([core.members(total) for total in apart]).of(found.match)
    rows = brute_force(seed, pairs)
    assert sorted(found.match) == [c for c, (a, b) in enumerate(rows) if len(a) and len(b)]
    for match, norm, names in zip(found.match, members.norm, members.names, strict=True):
        own = rows[match][0]
        norms = np.linalg.norm(image_vectors[own].astype(np.float64), axis=1)
        assert norm == pytest.approx(norms.mean())
        first = own[:MEMBER_SAMPLE]
        assert names == [f"s{int(row >= (pairs + 1) // 2)}/k{row}" for row in first]


def test_equal_cosines_keep_the_order_of_the_matches():
    sums = core.empty_sums(np.arange(3), 2)
    sums.image[:] = sums.text[:] = [[2, 0], [0, 1], [3, 0]]
    sums.image_count[:] = sums.text_count[:] = 1
    assert core.means(sums).match.tolist() == [0, 1, 2]


def test_a_zero_mean_has_cosine_zero():
    sums = core.empty_sums(np.arange(2), 2)
    sums.image[1] = sums.text[1] = [1, 1]
    sums.image_count[:] = sums.text_count[:] = 2
    made = core.means(sums)
    assert made.match.tolist() == [1, 0]
    assert made.cosine.tolist() == pytest.approx([1, 0])


def test_matches_without_rows_are_left_out():
    sums = core.empty_sums(np.arange(3), 2)
    sums.image[1] = sums.text[1] = [1, 0]
    sums.image_count[:] = [0, 1, 4]
    sums.text_count[:] = [3, 1, 0]
    made = core.means(sums)
    assert made.match.tolist() == [1]
    assert np.isfinite(made.image).all()


@pytest.mark.parametrize("places", [(), (50,), (10, 11, 150)])
def test_members_are_the_first_pairs_in_shard_order(places):
    seed = 4
    _, _, _, _, matches = world(seed, clusters=3)
    total = sums_of(seed, places, clusters=3)
    _, _, image, text, _ = world(seed, clusters=3)
    edges = np.array(sorted(places))
    for match in range(3):
        mine = image == matches.image_cluster[match]
        if not matches.whole[match]:
            mine &= text == matches.text_cluster[match]
        first = np.flatnonzero(mine)[:MEMBER_SAMPLE]
        expected = [f"s{np.searchsorted(edges, row, side='right')}/k{row}" for row in first]
        assert total.members[match] == expected


def exact_vectors(seed: int, count: int) -> np.ndarray:
    """+-1 in 16 dimensions: norms are 4, cosines exact in float32, so that ties are true ties."""
    return np.random.default_rng(seed).choice(np.array([-1, 1], np.float32), (count, 16))


@pytest.mark.parametrize("edges", [[], [75], [0, 3, 4, 149]])
@pytest.mark.parametrize("together", [1, 2])
def test_nearest_over_shards_equals_the_whole(edges, together):
    """However rows are cut into shards, and however many shards are merged before the rest."""
    queries, rows = exact_vectors(2, 20), exact_vectors(3, 150)
    rows[75:] = rows[:75]
    expected = products.nearest_rows(queries, rows)
    shards = np.split(np.arange(len(rows)), edges)
    total = core.no_nearest(len(queries))
    for start in range(0, len(shards), together):
        group = core.no_nearest(len(queries))
        for number, mine in enumerate(shards[start : start + together], start):
            cosine, where = products.nearest_rows(queries, rows[mine])
            core.merge_nearest(
                group, core.Nearest(cosine, np.full(len(queries), number, np.int32), where)
            )
        core.merge_nearest(total, group)
    np.testing.assert_array_equal(total.cosine, expected[0])
    found = [shards[number][row] for number, row in zip(total.shard, total.row, strict=True)]
    np.testing.assert_array_equal(found, expected[1])

    looked_up = np.full(len(queries), -1)
    for number, mine, at in core.by_shard(total):
        assert len(mine) > 0
        looked_up[mine] = shards[number][at]
    np.testing.assert_array_equal(looked_up, expected[1])


def test_no_queries_have_no_winners():
    assert core.by_shard(core.no_nearest(0)) == []


def test_perfectly_paired_clusters_give_the_planted_means():
    """Clusters as one-hot corners plus noise of zero mean: the prototypes are the corners."""
    clusters, each = 5, 8
    text_of = np.array([3, 0, 4, 1, 2], np.int32)
    image = np.repeat(np.arange(clusters, dtype=np.int32), each)
    noise = np.tile(np.array([1, -1], np.float32), clusters * each // 2)[:, None] * 0.1
    image_vectors = np.eye(clusters, dtype=np.float32)[image] * 3 + noise
    text_vectors = np.eye(clusters, dtype=np.float32)[text_of[image]] * 2 + noise
    matches = core.Matches(np.arange(clusters, dtype=np.int32), text_of, np.zeros(clusters, bool))
    keys = [str(row) for row in range(len(image))]
    made = core.means(
        core.shard_sums(
            core.ShardPairs(
                "s", keys, *shared_images(image_vectors), text_vectors, image, text_of[image]
            ),
            matches,
            clusters,
        )
    )
    np.testing.assert_allclose(made.image, 3 * np.eye(clusters)[made.match], atol=1e-6)
    np.testing.assert_allclose(made.text, 2 * np.eye(clusters)[text_of[made.match]], atol=1e-6)


def test_whole_matches_take_their_two_clusters_though_they_share_pairs():
    image_vectors, text_vectors, image, text, matches = world(7, clusters=4)
    whole = core.Matches(matches.image_cluster, matches.text_cluster, np.ones(4, bool))
    keys = [f"k{row}" for row in range(len(image))]
    made = core.means(
        core.shard_sums(
            core.ShardPairs("s", keys, *shared_images(image_vectors), text_vectors, image, text),
            whole,
            4,
        )
    )
    assert sorted(made.match) == [0, 1, 2, 3]
    for place, match in enumerate(made.match):
        on_image, on_text = image == whole.image_cluster[match], text == whole.text_cluster[match]
        assert (on_image & on_text).any() != matches.whole[match]
        np.testing.assert_allclose(
            made.image[place], image_vectors[on_image].mean(axis=0), atol=1e-6
        )
        np.testing.assert_allclose(made.text[place], text_vectors[on_text].mean(axis=0), atol=1e-6)


def test_a_set_that_is_smaller_than_asked_for_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    kept = {"clusters": 10, "couples": 10}
    why = core.why_fewer({"image": {"distinct": 1}, "text": {"distinct": 2}}, kept, 9)
    data = "the data hold only 1 different images and 2 different captions"
    assert why == f"9 matches have an empty cluster: {data}"
    dropped = core.why_fewer({"image": {}, "text": {}}, {"clusters": 10, "couples": 7}, 0)
    assert dropped == "3 matches share no pair and were dropped"
    assert core.fewer(10, 10, "") == {}
    assert core.fewer(10, 1, why) == {"fewer": f"1 of the 10 pairs asked for: {why}"}
    assert capsys.readouterr().err == f"pds-ray: 1 of the 10 pairs asked for: {why}\n"


def medoids_of(seed: int, places: tuple[int, ...], together: int) -> core.Prototypes:
    image_vectors, text_vectors, image, text, matches = world(seed)
    clusters = len(matches.image_cluster)
    centers = core.means(sums_of(seed))
    total = core.no_medoids(clusters, image_vectors.shape[1])
    parts = []
    for number, mine in enumerate(np.split(np.arange(len(image)), sorted(places))):
        pairs = core.ShardPairs(
            f"s{number}",
            [""] * len(mine),
            *shared_images(image_vectors[mine]),
            text_vectors[mine],
            image[mine],
            text[mine],
        )
        parts.append(core.shard_medoids(pairs, matches, clusters, centers))
    behind = total.score
    for start in range(0, len(parts), together):
        part = core.best_medoids(parts[start : start + together], behind)
        if start % 2:
            behind = total.score.copy()  # an answer to what was known some time ago
        core.merge_medoids(total, part)
    return core.of_medoids(total, centers)


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 200), max_size=5), st.sampled_from([1, 2, 6]))
def test_medoids_are_the_pairs_nearest_to_both_means_however_the_shards_are_cut(
    seed, places, together
):
    image_vectors, text_vectors, _, _, _ = world(seed)
    rows, centers = brute_force(seed), core.means(sums_of(seed))
    found = medoids_of(seed, tuple(places), together)
    assert sorted(found.match) == sorted(centers.match)
    assert (np.diff(found.cosine) <= 0).all()
    for place, match in enumerate(found.match):
        center = list(centers.match).index(match)

        def score(pair: int, center: int = center) -> float:
            sides = ((image_vectors, centers.image), (text_vectors, centers.text))
            return sum(
                float(vectors[pair] @ means[center])
                / float(np.linalg.norm(vectors[pair]) * np.linalg.norm(means[center]))
                for vectors, means in sides
            )

        members = sorted({*rows[match][0].tolist(), *rows[match][1].tolist()})
        best = max(map(score, members))
        chosen = [
            pair
            for pair in members
            if np.array_equal(found.image[place], image_vectors[pair])
            and np.array_equal(found.text[place], text_vectors[pair])
        ]
        assert chosen, "a medoid is a real pair"
        assert score(chosen[0]) == pytest.approx(best, abs=1e-6)

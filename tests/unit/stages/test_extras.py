"""Further captions and soft targets against loops over all pairs."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pds_ray.stages import extras
from pds_ray.stages.extras import (
    clip_similarity,
    further_captions,
    image_captions,
    member_captions,
    table_similarity,
)
from pds_ray.stages.match import table_of


@pytest.mark.parametrize("block", [3, 1024])
def test_soft_targets_by_cosine_are_a_softmax(block: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(extras, "BLOCK_ROWS", block)
    image, text = np.random.default_rng(0).normal(size=(2, 7, 5)).astype(np.float32)
    found = clip_similarity(image, text, temperature=0.1, share=0.3)
    unit = [torch.nn.functional.normalize(torch.from_numpy(rows), dim=1) for rows in (image, text)]
    expected = 0.7 * torch.eye(7) + 0.3 * (unit[0] @ unit[1].T / 0.1).softmax(dim=1)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)


@given(st.integers(1, 6), st.integers(0, 40), st.integers(0, 2**31))
def test_soft_targets_by_the_table_are_counted(clusters: int, pairs: int, seed: int):
    """P(j|i): of the data's pairs of image cluster i whose text cluster is chosen, those of j."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, clusters, (pairs, 2))
    cells, counts = np.unique(labels[:, 0] * clusters + labels[:, 1], return_counts=True)
    chosen = rng.integers(1, clusters + 1)
    image, text = (rng.permutation(clusters)[:chosen] for _ in range(2))
    cut = np.searchsorted(cells, rng.integers(0, clusters) * clusters)
    parts = [(cells[:cut], counts[:cut]), (cells[cut:], counts[cut:])]
    found = table_similarity(table_of(parts, clusters), image, text, share=0.25)
    for i in range(chosen):
        row = [sum((labels == (image[i], text[j])).all(axis=1)) for j in range(chosen)]
        likely = np.array(row) / sum(row) if sum(row) else np.eye(chosen)[i]
        np.testing.assert_allclose(found[i], 0.75 * np.eye(chosen)[i] + 0.25 * likely, atol=1e-6)


def test_captions_of_real_images():
    """All captions of the image but the pair's own, those of higher cosine first."""
    table = pa.table(
        {
            "key": ["a", "b", "b", "b", "b", "c"],
            "caption": ["a0", "b0", "b1", "b2", "b1", "c0"],
            "similarity": [0.9, 0.1, 0.3, 0.2, 0.3, 0.9],
        }
    )
    found = image_captions(table, {"b": [1], "a": [0]}, None)
    assert further_captions([found], ["a0", "b0"], 5) == [[], ["b1", "b2"]]
    assert further_captions([found], ["a0", "b1"], 1) == [[], ["b2"]]
    kept = np.array([True, True, False, True, False, True])
    pruned = image_captions(table, {"b": [1]}, kept)
    assert further_captions([pruned], ["a0", "b0"], 5) == [[], ["b2"]]


@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**31))
def test_captions_of_members_are_the_nearest_to_the_prototype(pairs: int, limit: int, seed: int):
    """Over shards, with captions that come twice, and pairs that nothing is a member of."""
    rng = np.random.default_rng(seed)
    rows, dim = 40, 3
    cells = rng.permutation(8)[:pairs].astype(np.int64)
    vectors_of = rng.normal(size=(12, dim)).astype(np.float32)  # the same text, the same vector
    number, cell = rng.integers(0, 12, rows), rng.integers(-1, 8, rows)
    text = rng.normal(size=(pairs, dim)).astype(np.float32)
    own = [f"text {n}" for n in rng.integers(0, 12, pairs)]

    def shard(part: slice) -> extras.Found:
        table = pa.table({"caption": [f"text {n}" for n in number[part]]})
        return member_captions(table, vectors_of[number[part]], cell[part], cells, text, limit + 1)

    found = further_captions([shard(slice(0, 15)), shard(slice(15, rows))], own, limit)
    for pair in range(pairs):
        members = {int(n) for n in number[cell == cells[pair]]}
        cosine = {n: vectors_of[n] @ text[pair] / np.linalg.norm(vectors_of[n]) for n in members}
        best = [f"text {n}" for n in sorted(members, key=lambda n: -cosine[n])]
        assert found[pair] == [caption for caption in best if caption != own[pair]][:limit]


COSINES = st.sampled_from([-0.5, 0.0, 0.25, 0.5, 1.0])
FOUND = st.lists(st.tuples(st.integers(0, 2), COSINES, st.sampled_from("abcdef")), max_size=12)


@given(
    st.lists(FOUND, max_size=6), st.lists(st.sampled_from("abcx"), min_size=3), st.integers(1, 4)
)
def test_captions_are_the_first_different_ones_of_all(
    parts: list[extras.Found], own: list[str], limit: int
):
    """Cosines are equal at times; texts are found again, nearer or farther; some are own ones."""
    expected = []
    for pair, mine in enumerate(own):
        ranked = [each for part in parts for each in part if each[0] == pair]
        ranked.sort(key=lambda each: each[1], reverse=True)  # stable: of equals the first found
        different = dict.fromkeys(text for _, _, text in ranked)
        expected.append([text for text in different if text != mine][:limit])
    assert further_captions(iter(parts), own, limit) == expected

"""The nearest rows of a store, against all cosines; tasks run in this process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tqdm import tqdm

from pds_ray.config import RunConfig
from pds_ray.distributed import nearest
from pds_ray.stages import prototypes as core
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.schemas import embedding_array, embedding_field
from pds_ray.store.storage import Folder
from tests.support.in_this_process import without_ray
from tests.support.stage_run import stage_run
from tests.support.synthetic_store import Gathered, make_store

DIM, QUERIES = 5, 12
ROWS = [9, 1, 20, 4, 4, 13, 2]


def highest(queries: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the highest cosine to each query and the first row that has it, in float64."""
    unit = (each / np.linalg.norm(each, axis=1)[:, None] for each in (queries, rows))
    left, right = (each.astype(np.float64) for each in unit)
    cosines = (left @ right.T).round(6)
    return cosines.max(axis=1), cosines.argmax(axis=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[EmbeddingStore, Gathered]:
    return make_store(tmp_path_factory.mktemp("store"), ROWS, dim=DIM)


@pytest.fixture(scope="module")
def queries(made: tuple[EmbeddingStore, Gathered]) -> dict[nearest.Side, np.ndarray]:
    """Return random vectors, and some that rows of several shards are equally near to."""
    rng = np.random.default_rng(3)
    _, data = made
    return {
        "images": np.concatenate([rng.standard_normal((QUERIES - 3, DIM)), data.image[:3]]).astype(
            np.float32
        ),
        "captions": rng.standard_normal((QUERIES, DIM)).astype(np.float32),
    }


@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize("sides", [("images",), ("captions",), ("captions", "images")])
def test_one_pass_finds_the_nearest_of_all(
    made: tuple[EmbeddingStore, Gathered],
    queries: dict[nearest.Side, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sides: tuple[nearest.Side, ...],
    count: int,
) -> None:
    without_ray(monkeypatch)
    monkeypatch.setattr(nearest, "task_count", lambda items, _: min(items, count))
    store, data = made
    run = stage_run(store, RunFolder(Folder(str(tmp_path))), RunConfig(), DIM)
    with tqdm(disable=True) as bar:
        found = nearest.nearest(run, {side: queries[side] for side in sides}, bar)
    assert found.keys() == set(sides)
    for side, columns in found.items():
        cosine, pair = highest(queries[side], data.image if side == "images" else data.text)
        np.testing.assert_allclose(columns["cosine"], cosine, atol=2e-6)
        assert columns["key"] == [data.keys[row] for row in pair]
        if side == "captions":
            assert columns["caption"] == [data.captions[row] for row in pair]
        for shard, key in zip(columns["shard"], columns["key"], strict=True):
            assert key in store.images(shard, ["key"]).column("key").to_pylist()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=7, max_size=7), st.integers(1, 7), st.integers(0, 10**6)
)
def test_answers_to_what_was_known_earlier_end_in_the_same_rows(
    behind: list[int], count: int, seed: int
) -> None:
    """However old the best cosines are that a task is given, and however shards are grouped.

    Equal rows lie in several shards: the first one wins.
    """
    rng = np.random.default_rng(seed)
    # along few axes, so that many cosines are equal, to the last bit
    rows = np.zeros((sum(ROWS), 3), np.float32)
    rows[np.arange(len(rows)), rng.integers(0, 3, len(rows))] = rng.choice([-2, 1, 4], len(rows))
    asked = {"captions": rng.standard_normal((6, 3)).astype(np.float32)}
    shards = np.split(np.arange(len(rows)), np.cumsum(ROWS)[:-1])
    store = FewRows([rows[mine] for mine in shards])
    total = core.no_nearest(6)
    known = [total.cosine.copy()]
    groups = np.array_split(np.arange(len(ROWS)), count)
    for place, group in enumerate(groups):
        at_least = {"captions": known[max(0, place - behind[place])]}
        numbered = [(int(number), str(number)) for number in group]
        answer = nearest.search_shards(numbered, store, asked, at_least, "cpu")  # type: ignore[arg-type]
        improved = answer["captions"]
        assert (improved.cosine > at_least["captions"][improved.query]).all()
        core.merge_improved(total, improved)
        known.append(total.cosine.copy())
    cosine, row = highest(asked["captions"], rows)
    np.testing.assert_allclose(total.cosine, cosine, atol=2e-6)
    found = [shards[number][place] for number, place in zip(total.shard, total.row, strict=True)]
    np.testing.assert_array_equal(found, row)


class FewRows:
    """A store of captions that are nothing but vectors."""

    def __init__(self, vectors: list[np.ndarray]) -> None:
        self.vectors = vectors

    def captions(self, shard: str, _columns: list[str]) -> pa.Table:
        vectors = self.vectors[int(shard)]
        field = embedding_field(vectors.shape[1], "float32")
        return pa.table([embedding_array(vectors, "float32")], schema=pa.schema([field]))

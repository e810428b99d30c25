"""Lists of captions over shards, against a sort of all captions; tasks run in this process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tqdm import tqdm

from pds_ray.config import RunConfig
from pds_ray.distributed import caption, nearest_captions
from pds_ray.stages import captions as core
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.storage import Folder
from tests.support.in_this_process import without_ray
from tests.support.stage_run import stage_run
from tests.support.synthetic_store import make_store

DIM = 6


@pytest.mark.parametrize("count", [1, 2, 3])
def test_lists_are_exact_and_name_the_nearest_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    without_ray(monkeypatch)
    monkeypatch.setattr(nearest_captions, "task_count", lambda *_: count)
    monkeypatch.setattr(core, "LONGEST_LIST", 12)
    rng = np.random.default_rng(0)
    store, data = make_store(tmp_path / "store", [12, 2, 15], dim=DIM)
    run = stage_run(store, RunFolder(Folder(str(tmp_path / "run"))), RunConfig(), DIM)
    texts, vectors = data.captions, data.text
    starts = np.concatenate(
        [[0], np.cumsum([store.captions(shard, ["key"]).num_rows for shard in data.shards])]
    )
    images = rng.standard_normal((5, DIM)).astype(np.float32)
    queries = rng.standard_normal((5, DIM)).astype(np.float32)
    with tqdm(disable=True) as bar:
        lists, finds = nearest_captions.nearest_captions(run, queries, images, bar)

    def cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        norms = np.outer(np.linalg.norm(left, axis=1), np.linalg.norm(right, axis=1))
        return left @ right.T / norms

    to_queries, to_images = cosines(queries, vectors), cosines(vectors, images)
    listed = starts[lists.shard] + lists.row
    for query, own in enumerate(listed):
        order = np.argsort(-to_queries[query])[:12]
        np.testing.assert_array_equal(own, order)
        np.testing.assert_array_equal(finds.image[query], to_images[order].argmax(axis=1))
        np.testing.assert_allclose(lists.cosine[query], to_queries[query][order], atol=1e-6)
        numbers = core.text_numbers([texts[row] for row in order])
        np.testing.assert_array_equal(finds.text[query], numbers)

    columns, counts = caption._accepted(run, lists, finds)
    accepted = 0
    for image, own in enumerate(listed):
        row = texts.index(columns["caption"][image])
        assert row in own
        assert columns["key"][image] == data.keys[row]
        assert columns["shard"][image] == data.shards[np.searchsorted(starts, row, "right") - 1]
        assert columns["cosine"][image] == pytest.approx(to_queries[image, row], abs=1e-6)
        fitting = [each for each in own if to_images[each].argmax() == image]
        if fitting:
            assert row == fitting[0]
            accepted += 1
    assert counts == {"round_trip": accepted}


def test_lists_are_as_short_as_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their ends are empty."""
    without_ray(monkeypatch)
    store, data = make_store(tmp_path / "store", [1, 2], dim=DIM)
    run = stage_run(store, RunFolder(Folder(str(tmp_path / "run"))), RunConfig(), DIM)
    images = np.random.default_rng(0).standard_normal((2, DIM)).astype(np.float32)
    with tqdm(disable=True) as bar:
        lists, finds = nearest_captions.nearest_captions(run, images, images, bar)
    rows = len(data.captions)
    for found in (lists.shard, finds.image):
        assert (found[:, :rows] >= 0).all()
        assert (found[:, rows:] == -1).all()
    columns, _ = caption._accepted(run, lists, finds)
    assert set(columns["caption"]) <= set(data.captions)

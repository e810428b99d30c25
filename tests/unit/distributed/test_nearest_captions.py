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
    key_of = dict(zip(texts, data.keys, strict=True))
    images = rng.standard_normal((5, DIM)).astype(np.float32)
    queries = rng.standard_normal((5, DIM)).astype(np.float32)
    with tqdm(disable=True) as bar:
        lists = nearest_captions.nearest_captions(run, queries, images, bar)

    def cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        norms = np.outer(np.linalg.norm(left, axis=1), np.linalg.norm(right, axis=1))
        return left @ right.T / norms

    to_queries, to_images = cosines(queries, vectors), cosines(vectors, images)
    for query, own in enumerate(lists):
        order = np.argsort(-to_queries[query])[:12]
        assert [each.text for each in own] == [texts[row] for row in order]
        assert [each.finds for each in own] == to_images[order].argmax(axis=1).tolist()
        found = [each.cosine for each in own]
        np.testing.assert_allclose(found, to_queries[query][order], atol=1e-6)
        assert all(each.key == key_of[each.text] for each in own)
        for each in own:
            assert each.text in store.captions(each.shard, ["caption"]).column(0).to_pylist()

    columns, counts = caption._accepted(lists)
    for image, own in enumerate(lists):
        fitting = [each.text for each in own if each.finds == image]
        if fitting:
            assert columns["caption"][image] == fitting[0]
    finding = [any(each.finds == image for each in own) for image, own in enumerate(lists)]
    assert counts == {"round_trip": sum(finding)}

"""Further captions of a set, as the driver gathers them from shards."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pds_ray.config import ExtrasConfig, RunConfig
from pds_ray.distributed import materialize, tasks
from pds_ray.stages.extras import Found
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.storage import Folder
from tests.support.stage_run import stage_run
from tests.unit.stages.test_materialize import prototypes

PAIRS, EACH, LIMIT = 3, 10, 2


class Text(str):
    """A caption whose end can be seen."""


def test_captions_of_many_shards_are_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pair holds `limit` + 1 of them, beside those of the shard that is new."""
    rng = np.random.default_rng(0)
    alive: list[weakref.ref[Text]] = []

    def shards(*_: Any) -> Iterator[Found]:
        for shard in range(50):
            held = sum(text() is not None for text in alive)
            assert held <= PAIRS * (LIMIT + 1) + PAIRS * EACH
            texts = [Text(f"{shard} {number}") for number in range(PAIRS * EACH)]
            alive.extend(map(weakref.ref, texts))
            yield [(n % PAIRS, float(rng.random()), text) for n, text in enumerate(texts)]

    monkeypatch.setattr(tasks, "map_in_order", shards)
    folder, store = (Folder(str(tmp_path / name)) for name in ("run", "store"))
    folder.create()
    config = RunConfig(pairs=PAIRS, extras=ExtrasConfig(captions=LIMIT))
    run = stage_run(EmbeddingStore(store), RunFolder(folder), config)
    table = prototypes(["a", "b", "c"])
    run.folder.save_prototypes(table)
    run.folder.save_captions(table.select(["pair", "caption"]))
    assert [len(captions) for captions in materialize._captions(run)] == [LIMIT] * PAIRS

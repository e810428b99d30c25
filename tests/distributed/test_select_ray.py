"""Selection on Ray gives what the selector gives on the gathered embeddings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pds_ray import catalog
from pds_ray.config import ConfigError, RunConfig, SelectConfig
from pds_ray.distributed import pools, tasks
from pds_ray.distributed.select import select
from pds_ray.selectors.base import Candidates
from pds_ray.stages.select import load_candidates
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.run_folder import RunFolder
from tests.support.stage_run import stage_run
from tests.support.synthetic_store import Gathered, make_store

pytestmark = pytest.mark.ray
PAIRS = 15


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[EmbeddingStore, Gathered]:
    return make_store(tmp_path_factory.mktemp("select") / "store", [30, 1, 44, 25])


def gathered_candidates(data: Gathered) -> Candidates:
    owner = np.array([int(key[1:]) for key in data.keys])
    _, first = np.unique(owner, return_index=True)
    image = data.image / np.linalg.norm(data.image, axis=1, keepdims=True)
    text = data.text / np.linalg.norm(data.text, axis=1, keepdims=True)
    return Candidates(image[first], text, owner, data.similarity)


def test_embeddings_that_no_node_can_hold_are_refused(
    made: tuple[EmbeddingStore, Gathered], run_folder: RunFolder, monkeypatch: pytest.MonkeyPatch
):
    """They are refused before the task begins; the arrays' bytes are what it would hold."""
    store, data = made
    all_ = load_candidates(data.shards, store, 8)
    needed = sum(array.nbytes for array in (all_.image, all_.text, all_.owner, all_.similarity))
    config = RunConfig(method="random", pairs=PAIRS)
    monkeypatch.setattr(pools, "most_memory", lambda: needed)
    select(stage_run(store, run_folder, config, 8))
    monkeypatch.setattr(pools, "most_memory", lambda: needed - 1)
    with pytest.raises(ConfigError, match="method random holds all embeddings at once"):
        select(stage_run(store, run_folder, config, 8))


@pytest.mark.parametrize("method", sorted(catalog.SELECTORS))
def test_the_same_pairs_as_without_ray(
    made: tuple[EmbeddingStore, Gathered], run_folder: RunFolder, method: str
):
    store, data = made
    config = RunConfig(method=method, pairs=PAIRS, seed=5, select=SelectConfig(epochs=3))
    counts = select(stage_run(store, run_folder, config, 8))
    picks = list(
        catalog.selector(method).select(gathered_candidates(data), PAIRS, 5, config.select)
    )
    table = run_folder.prototypes()
    assert table.column("pair").to_pylist() == list(range(PAIRS))
    assert table.column("caption").to_pylist() == [data.captions[pick] for pick in picks]
    assert table.column("nearest_key").to_pylist() == [data.keys[pick] for pick in picks]
    assert counts == {
        "prototypes": PAIRS,
        "duplicate_captions": 0,
        "mean_cosine": pytest.approx(float(data.similarity[picks].astype(np.float64).mean())),
    }


def test_the_table_is_the_same_bytes_twice(made: tuple[EmbeddingStore, Gathered], tmp_path: Path):
    from pds_ray.store.storage import Folder

    store, _data = made
    config = RunConfig(method="herding", pairs=PAIRS)
    written = []
    for name in ("one", "two"):
        run = RunFolder(Folder(str(tmp_path / name)))
        select(stage_run(store, run, config, 8))
        written.append(run.folder.read_bytes("prototypes.parquet"))
    assert written[0] == written[1]


def test_a_stream_arrives_in_order_and_its_error_is_raised():
    def count(up_to: int):
        yield from range(up_to)
        raise ValueError(f"no more than {up_to}")

    found = []
    with pytest.raises(ValueError, match="no more than 5"):  # noqa: PT012
        for value in tasks.stream(count, 5):
            found.append(value)
    assert found == list(range(5))

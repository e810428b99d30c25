"""A run whose store another run changes: its counts follow, and contents are never mixed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pds_ray.config import RunConfig, replace
from pds_ray.distributed import embed, pools, session
from pds_ray.engine.plan import make_run
from pds_ray.engine.run import _run_stage, distill
from pds_ray.recipes import recipe
from pds_ray.sources import scenes
from pds_ray.stages.embed import shard_counts
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.manifest import ManifestError, RunManifest
from pds_ray.store.storage import StorageError
from tests.support import in_this_process
from tests.support.synthetic_store import make_store

ROWS = [10, 13, 8, 11]
FIRST = ("embed", "prune")


def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Call tasks one after the other; leave unread shards unread; cut scenes into shards of ten."""

    def in_vain(todo: list[Any], work: Any, outcome: Any, *_: object) -> Any:
        for file in todo:
            work.store.fail(file.shard.name, "is still away")
            outcome.failed[file.shard.name] = "is still away"
        return outcome

    monkeypatch.setattr(scenes, "SHARD_SIZE", 10)
    monkeypatch.setattr(session, "start", lambda *_: {})
    in_this_process.without_ray(monkeypatch)
    monkeypatch.setattr(pools, "pool", lambda *_: None)
    monkeypatch.setattr(pools, "precision", lambda *_: "fp32")
    monkeypatch.setattr(embed, "_embed", in_vain)


def commit_shards(config: RunConfig, made_in: Path, numbers: Iterable[int]) -> EmbeddingStore:
    """Commit shards of the given numbers to the store of a run, as another run does."""
    made, _ = make_store(made_in, ROWS)
    store = make_run(config).store
    for number in numbers:
        name = f"{number:05d}"
        tables = made.images(name), made.captions(name), made.errors(name)
        store.commit(
            f"scenes-{name}", *tables, {**asdict(shard_counts(*tables)), "precision": "fp32"}
        )
    return store


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A run of four shards, whose tasks are called one after the other."""
    without_ray(monkeypatch)
    changes = {
        "source": "scenes:40",
        "pairs": 3,
        "decode.decoder": "nearest",
        "ray.max_failed_share": 1,
    }
    return replace(
        recipe("demo"),
        {**changes, "out": str(tmp_path / "run"), "embed.store": str(tmp_path / "store")},
    )


@pytest.fixture
def fill(config: RunConfig, tmp_path: Path) -> Callable[..., EmbeddingStore]:
    """Commit shards of the given numbers to the store, as the other run does."""
    return lambda *numbers: commit_shards(config, tmp_path / "made", numbers)


def held(config: RunConfig, shards: Iterable[int]) -> int:
    """Pairs of some shards, by their files alone."""
    folder = Path(str(config.embed.store))
    return sum(
        pq.read_metadata(folder / f"scenes-{number:05d}.captions.parquet").num_rows
        for number in shards
    )


def pairs(config: RunConfig) -> tuple[int, int, int]:
    """Return the pairs counted by embedding, by pruning, and in the masks."""
    stages = json.loads((Path(config.out) / "run.json").read_text())["stages"]
    masks = sum(
        pq.read_metadata(mask).num_rows for mask in (Path(config.out) / "pruning").iterdir()
    )
    return stages["embed"]["counts"]["pairs"], stages["prune"]["counts"]["pairs"], masks


def test_shards_that_another_run_brings_back_count(
    config: RunConfig, fill: Callable[..., EmbeddingStore]
) -> None:
    fill(0, 1, 3)
    distill(config, only=FIRST)
    assert pairs(config) == (held(config, (0, 1, 3)),) * 3
    fill(2)
    distill(config, only=FIRST)
    assert pairs(config) == (held(config, range(4)),) * 3


def test_a_shard_that_another_run_lost_is_not_waited_for_for_ever(
    config: RunConfig, fill: Callable[..., EmbeddingStore]
) -> None:
    store = fill(0, 1, 2, 3)
    distill(config, only=FIRST)
    store.fail("scenes-00002", "to be tried again")
    store.folder.delete("scenes-00002.json")  # and the other run was killed
    found = distill(config, only=FIRST)["stages"]
    assert found["embed"]["counts"]["failed_shards"] == 1
    assert (
        found["embed"]["counts"]["pairs"]
        == found["prune"]["counts"]["pairs"]
        == held(config, (0, 1, 3))
    )


def test_nothing_is_done_twice_where_nothing_changed(
    config: RunConfig, fill: Callable[..., EmbeddingStore]
) -> None:
    fill(0, 1, 3)  # the third is set aside as failed
    distill(config, only=FIRST)
    mask = Path(config.out) / "pruning" / "scenes-00000.keep.parquet"
    before = mask.stat().st_mtime_ns
    distill(config, only=FIRST)
    assert mask.stat().st_mtime_ns == before


def test_masks_that_are_there_are_kept(
    config: RunConfig, fill: Callable[..., EmbeddingStore]
) -> None:
    """Killed in pruning, a run makes those that lack; with another share, it makes all anew."""

    def killed_without(mask: str, config: RunConfig, redo: bool = False) -> set[str]:
        """Return the masks that the next session writes."""
        manifest = RunManifest.open(str(config.out))
        manifest.start("prune", manifest.stages["prune"]["fingerprint"])
        before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
        (folder / mask).unlink()
        distill(config, redo, only=FIRST)
        after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
        return {name for name in after if after[name] != before[name]}

    fill(0, 1, 2, 3)
    folder, lost = Path(config.out) / "pruning", "scenes-00001.keep.parquet"
    counts = distill(config, only=FIRST)["stages"]["prune"]["counts"]
    masks = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert killed_without(lost, config) == {lost}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == masks
    stages = json.loads((Path(config.out) / "run.json").read_text())["stages"]
    assert stages["prune"]["counts"] == counts
    assert killed_without(lost, replace(config, {"prune.ratio": 0.5}), redo=True) == masks.keys()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} != masks


def test_without_its_manifest_a_run_goes_on_from_what_is_embedded(
    config: RunConfig, fill: Callable[..., EmbeddingStore]
) -> None:
    store = fill(0, 1, 2, 3)
    distill(config, only=FIRST)
    before = {path: path.stat().st_mtime_ns for path in Path(store.folder.path).glob("scenes-*")}
    manifest = Path(config.out) / "run.json"
    manifest.write_bytes(manifest.read_bytes()[:100])
    with pytest.raises(ManifestError, match="delete it"):
        distill(config, only=FIRST)
    manifest.unlink()
    counts = distill(config, only=FIRST)["stages"]["embed"]["counts"]
    assert (counts["shards_reused"], counts["timed"], counts["pairs"]) == (
        4,
        0,
        held(config, range(4)),
    )
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_set_of_two_contents_is_not_written(
    config: RunConfig, fill: Callable[..., EmbeddingStore]
) -> None:
    """A change between two stages shows before the result is written."""
    fill(0, 1, 3)
    distill(config, only=FIRST)
    run = make_run(config)
    fill(2)
    with pytest.raises(StorageError, match="changed while they were read"):
        _run_stage(run, run.method.stage("materialize"))
    assert not (Path(config.out) / "distilled").exists()

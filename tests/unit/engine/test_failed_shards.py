"""Failed shards of a run: what `retry-failed` takes, what it leaves, and that `verify` agrees."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pds_ray.config import ConfigError, RunConfig
from pds_ray.engine import run as engine
from pds_ray.engine.plan import make_run
from pds_ray.engine.run import distill
from pds_ray.engine.upkeep import retry_failed, verify
from pds_ray.sources.base import Shard
from pds_ray.sources.scenes import ScenesSource
from pds_ray.stages.embed import file_of, shard_counts
from tests.support.synthetic_store import make_store
from tests.unit.engine.test_shared_store import FIRST, ROWS, config, without_ray  # noqa: F401

DAMAGE = "truncated_shard: the file ends early"


@pytest.fixture
def run(config: RunConfig, tmp_path: Path) -> RunConfig:  # noqa: F811
    """A run up to pruning of four shards, of which the second is damaged and the third failed."""
    made, _ = make_store(tmp_path / "made", ROWS)
    checked = make_run(config)
    for number, shard in enumerate(checked.shards):
        name = f"{number:05d}"
        if number == 2:
            continue
        tables = made.images(name), made.captions(name), made.errors(name)
        info: dict[str, Any] = {**asdict(shard_counts(*tables)), "precision": "fp32"}
        if number == 1:
            info |= {"damage": DAMAGE, "file": file_of(shard)}
        checked.store.commit(shard.name, *tables, info)
    distill(config, only=FIRST)
    return config


def test_failed_shards_are_counted_once_and_named(run: RunConfig) -> None:
    counts = distill(run, only=FIRST)["stages"]["embed"]["counts"]
    assert counts["failed"] == {"scenes-00001": DAMAGE, "scenes-00002": "is still away"}
    assert (counts["failed_shards"], counts["shards_embedded"]) == (2, 3)
    assert verify(run.out, {})[1] == []


def test_verify_sees_a_damage_that_is_not_counted(run: RunConfig) -> None:
    store = make_run(run).store
    marker = store.marker("scenes-00001")
    del marker["damage"]
    store.folder.write_json("scenes-00001.json", marker)
    (problem,) = verify(run.out, {})[1]
    assert problem.what == "holds 1 failed_shards, run.json says 2"


def test_only_what_changed_is_tried_again(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = engine._run_stages
    monkeypatch.setattr(engine, "_run_stages", lambda run: whole(run, FIRST))
    retry_failed(run.out, {})
    assert "not tried again: 1 damaged shards (scenes-00001)" in capsys.readouterr().err
    store = make_run(run).store
    assert store.failed().keys() == {"scenes-00002"}
    listed = ScenesSource.shards

    def mended(source: ScenesSource) -> list[Shard]:
        first, second, *rest = listed(source)
        return [first, dataclasses.replace(second, size=second.size + 1), *rest]

    monkeypatch.setattr(ScenesSource, "shards", mended)
    retry_failed(run.out, {})
    assert store.failed().keys() == {"scenes-00001", "scenes-00002"}
    assert "scenes-00001" in store.committed(), "what was read of it is lost"


def test_nothing_is_done_where_no_file_has_changed(run: RunConfig) -> None:
    store = make_run(run).store
    store.folder.delete("scenes-00002.failed")
    with pytest.raises(ConfigError, match=r"1 damaged shards \(scenes-00001\) .* not changed"):
        retry_failed(run.out, {})
    store.folder.delete("scenes-00001.json")
    with pytest.raises(ConfigError, match=r"no shard of .* failed"):
        retry_failed(run.out, {})

"""Methods as lists of stages: every row is whole, and an added stage is like all others."""

from __future__ import annotations

import dataclasses
import inspect
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from pds_ray import catalog
from pds_ray.config import RunConfig, flatten, replace, sections, to_dict
from pds_ray.engine.run import distill
from pds_ray.engine.status import status
from pds_ray.engine.upkeep import verify
from pds_ray.methods.base import Counts, Method, Run, Stage
from pds_ray.methods.pds import DECODE, EMBED, MATCH, PDS, PRUNE
from pds_ray.recipes import recipe
from pds_ray.stages.materialize import about

ROWS = {
    f"{name}.{stage.name}": (catalog.method(name), stage)
    for name in catalog.METHODS
    for stage in catalog.method(name).stages
}


@pytest.mark.parametrize("row", ROWS)
def test_every_row_is_whole(row: str) -> None:
    method, stage = ROWS[row]
    parameters = inspect.signature(stage.function(), eval_str=False).parameters
    assert list(parameters) == ["run"], "a stage takes the run and nothing else"
    known = {*sections(), *flatten(to_dict(RunConfig()))}
    assert set(stage.options) <= known
    assert (stage.unit == "") == (stage.counted == "")
    assert method.stage(stage.name) is stage
    assert (stage.files is None) == (stage is method.stages[0]), "the first fills the store"
    if stage.plan:
        module, _, attribute = stage.plan.partition(":")
        assert hasattr(import_module(module), attribute)


def test_all_stages_of_pds_can_be_planned() -> None:
    assert all(stage.plan for stage in PDS.stages)


@pytest.mark.parametrize("name", catalog.METHODS)
def test_stages_are_named_once_and_no_option_is_read_twice(name: str) -> None:
    method = catalog.method(name)
    assert len(set(method.names)) == len(method.stages)
    read = [option for stage in method.stages for option in stage.options]
    assert len(set(read)) == len(read)


def test_neighbours_of_a_stage() -> None:
    method = Method((EMBED, PRUNE, MATCH, DECODE), PDS.card)
    assert method.before("match") is PRUNE
    assert method.after("prune") == (MATCH, DECODE)
    assert method.after("decode") == ()


def count_keys(run: Run) -> Counts:
    """A stage: write how many keys each shard has, and an option."""
    found = {shard: run.store.images(shard, ["key"]).num_rows for shard in run.shard_names}
    run.folder.folder.write_json("keys.json", {"keys": found, "solver": run.config.match.solver})
    return {"keys": sum(found.values())}


KEYS = Stage(
    "keys",
    run=f"{__name__}:count_keys",
    depends_on=lambda run: run.config.match.solver,
    files=lambda _: ["keys.json"],
    options=("match",),
    unit="keys",
    counted="keys",
    card=(("keys in all", "keys"),),
)
WITH_KEYS = Method((EMBED, KEYS, PRUNE), PDS.card)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A run of the method with the added stage; its embeddings are done, its tasks run in turn."""
    from tests.unit.engine.test_shared_store import commit_shards, without_ray

    without_ray(monkeypatch)
    monkeypatch.setitem(catalog.METHODS, "pds", f"{__name__}:WITH_KEYS")
    changes = {"source": "scenes:40", "pairs": 3, "decode.decoder": "nearest"}
    found = replace(recipe("demo"), {**changes, "out": str(tmp_path / "run")})
    commit_shards(found, tmp_path / "made", range(4))
    return found


def test_an_added_stage_is_run_recorded_hashed_and_verified(config: RunConfig) -> None:
    done = distill(config)
    assert list(done["stages"]) == ["embed", "keys", "prune"]
    assert done["stages"]["keys"]["counts"] == {"keys": 42}
    out = Path(config.out)
    assert list(json.loads((out / "hashes" / "keys.json").read_text())) == ["keys.json"]
    assert verify(config.out, {}) == (len(list(out.rglob("*.parquet"))) + 1, [])
    assert status(config.out)["stages"] == dict.fromkeys(["embed", "keys", "prune"], "done")
    (out / "keys.json").write_text("{}")
    assert [problem.name for problem in verify(config.out, {})[1]] == ["keys.json"]


def test_an_added_stage_is_redone_exactly_when_its_options_change(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(config: RunConfig, **how: Any) -> list[str]:
        began: list[str] = []
        function = Stage.function
        monkeypatch.setattr(
            Stage, "function", lambda stage: began.append(stage.name) or function(stage)
        )
        distill(config, **how)
        monkeypatch.setattr(Stage, "function", function)
        return began

    assert started(config) == ["embed", "keys", "prune"]
    assert started(config) == []
    assert started(replace(config, {"match.solver": "dense"}), redo=True) == ["keys", "prune"]
    assert json.loads((Path(config.out) / "keys.json").read_text())["solver"] == "dense"
    changed = {"match.solver": "dense", "prune.ratio": 0.5}
    assert started(replace(config, changed), redo=True) == ["prune"]
    unread = replace(config, {**changed, "cluster.iterations": 3})
    assert started(unread) == [], "no stage of the method reads that section"


def test_a_variant_is_pds_with_a_row_replaced() -> None:
    row = dataclasses.replace(MATCH, run=f"{__name__}:count_keys", depends_on=lambda _: "other")
    variant = PDS.replaced(row)
    assert variant.names == PDS.names
    assert variant.stage("match") is row
    assert [stage for stage in variant.stages if stage not in PDS.stages] == [row]


def test_the_card_counts_what_the_rows_name(config: RunConfig) -> None:
    from pds_ray.engine.plan import make_run

    distill(config)
    described = about(make_run(config))
    assert described["counts"]["keys in all"] == 42
    assert described["counts"]["pairs pruned"] > 0
    assert "match" in described["config"]
    assert "cluster" not in described["config"]

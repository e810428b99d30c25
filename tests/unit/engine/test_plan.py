"""A change of configuration or data makes stale exactly the stages from the first it touches."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pds_ray.config import (
    ConfigError,
    FilesConfig,
    ReadConfig,
    RunConfig,
    changed,
    public,
    replace,
)
from pds_ray.engine import plan, state
from pds_ray.engine.plan import make_run, relevant
from pds_ray.methods.base import Run
from pds_ray.methods.coverage import COVERAGE
from pds_ray.methods.pds import PDS, _reading
from pds_ray.methods.selection import SELECTION
from pds_ray.recipes import recipe
from pds_ray.sources.base import Sample, Shard, SourceError
from pds_ray.sources.webdataset import WebDatasetSource
from pds_ray.stages.embed import file_of
from pds_ray.stages.materialize import about
from pds_ray.store.manifest import ManifestError, RunManifest, fingerprint
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.schemas import ERROR_SCHEMA, caption_schema, image_schema
from pds_ray.store.storage import StorageError
from tests.support.poisoned import write_shard

BASE = {"source": "scenes:120", "pairs": 5, "out": "unused", "decode.decoder": "nearest"}


def fingerprints(**changes: Any) -> dict[str, str]:
    names = {name.replace("__", "."): value for name, value in changes.items()}
    return make_run(replace(recipe("demo"), {**BASE, **names})).fingerprints


@pytest.fixture(scope="module")
def reference() -> dict[str, str]:
    return fingerprints()


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"source": "scenes:121"}, "embed"),
        ({"source": "scenes:120:1"}, "embed"),
        ({"read__captions": "paper"}, "embed"),
        ({"read__min_side": 3}, "embed"),
        ({"read__image_suffixes": "jpg"}, "embed"),
        ({"read__caption_suffixes": "txt"}, "embed"),
        ({"read__caption_keys": "alt"}, "embed"),
        ({"read__caption_lines": "each"}, "embed"),
        ({"embed__store_dtype": "float32"}, "embed"),
        ({"embed__precision": "bf16"}, "embed"),
        ({"prune__ratio": 0.3}, "prune"),
        ({"pairs": 6}, "cluster"),
        ({"seed": 1}, "cluster"),
        ({"cluster__solver": "distributed"}, "cluster"),
        ({"cluster__iterations": 3}, "cluster"),
        ({"cluster__tolerance": 0.01}, "cluster"),
        ({"cluster__normalize": True}, "cluster"),
        ({"cluster__modality": "joint"}, "cluster"),
        ({"match__pairless": "drop"}, "match"),
        ({"match__solver": "sparse"}, "match"),
        ({"match__filter": False}, "match"),
        ({"decode__steps": 3}, "decode"),
        ({"decode__image_size": 32}, "decode"),
        ({"decode__format": "webp"}, "decode"),
        ({"decode__format": "jpeg", "decode__quality": 50}, "decode"),
        ({"decode__rescale": True}, "decode"),
        ({"caption__nearest_to": "prototype"}, "caption"),
        ({"extras__captions": 2}, "materialize"),
        ({"extras__similarity": "clip"}, "materialize"),
        ({"extras__similarity": "table"}, "materialize"),
        ({"caption__nearest_to": "both"}, "caption"),
        ({"caption__round_trip": True}, "caption"),
        ({"decode__candidates": 2}, "decode"),
        ({"decode__noise_levels": "0,10"}, "decode"),
        ({"decode__image_weight": 0.5}, "decode"),
        ({"decode__text_weight": 0.5}, "decode"),
        ({"decode__real_fallback": True}, "decode"),
        ({"decode__real_margin": 0.5}, "decode"),
        ({"prototypes__center": "medoid"}, "prototypes"),
    ],
)
def test_a_change_makes_stale_what_depends_on_it(
    reference: dict[str, str], changes: dict[str, Any], first: str
) -> None:
    changed = fingerprints(**changes)
    stale = [stage for stage in PDS.names if changed[stage] != reference[stage]]
    assert stale == list(PDS.names[PDS.names.index(first) :])


def test_options_that_came_later_leave_earlier_runs_as_they_are() -> None:
    """At their defaults they are in no fingerprint: stages made before them are continued."""
    run = make_run(replace(recipe("demo"), {**BASE, "decode.decoder": "unclip"}))
    _, options, _ = PDS.stage("decode").depends_on(run)
    assert options.keys() == {
        "decoder", "condition", "steps", "guidance", "noise_level", "negative_prompt", "rescale",
        "precision", "image_size",
    }  # fmt: skip
    assert PDS.stage("prototypes").depends_on(run) == []
    assert PDS.stage("caption").depends_on(run) == {"nearest_to": "picture"}


@pytest.mark.parametrize(("pairs", "continued"), [(100_000, True), (100_001, False)])
def test_clusters_of_two_levels_are_not_continued(pairs: int, continued: bool) -> None:
    """Earlier versions fitted more than 100,000 clusters in two levels, and had no solvers."""
    run = make_run(replace(recipe("demo"), BASE))
    config = replace(run.config, {"pairs": pairs})
    found = PDS.stage("cluster").depends_on(dataclasses.replace(run, config=config))
    options = dataclasses.asdict(config.cluster)
    assert options.pop("solver") == "faiss"
    before = [pairs, config.seed, options]
    assert (fingerprint(found) == fingerprint(before)) == continued


@pytest.mark.parametrize(
    "changes",
    [
        {"out": "elsewhere"},
        {"embed__batch_size": 16},
        {"embed__store": "shared"},
        {"decode__batch_size": 2},
        {"ray__num_cpus": 1},
        {"ray__embed_workers": 3},
        {"ray__embed_min_workers": 2},
        {"ray__embed_gpus": 0.5},
        {"ray__embed_resources": "H100=1"},
        {"ray__decode_min_workers": 2},
        {"ray__decode_gpus": 2.0},
        {"ray__decode_resources": "A100=1"},
        {"ray__read_resources": "reader=1"},
        {"ray__max_bad_share": 0.1},
        {"ray__max_failed_share": 0.2},
        {"ray__sample_timeout_s": 5.0},
        {"decode__format": "png"},  # as without it
        {"decode__quality": 50},  # of other formats
        {"select__epochs": 3},  # of other methods
        {"select__forgotten": "most"},
        {"whiten__ridge": 0.5},
        {"cover__candidates": 300},
        {"cover__herded": 0.0},
        {"experts__store": "shared"},
        {"experts__count": 3},
        {"experts__seed": 1},
        {"experts__epochs": 3},
        {"experts__backbone": "small_vit"},
        {"experts__text_encoder": "demo"},
        {"experts__image_size": 32},
        {"experts__train": "heads"},
        {"experts__rank": 2},
        {"experts__shared_start": True},
        {"experts__learning_rate": 0.5},
        {"experts__text_learning_rate": 0.5},
        {"experts__momentum": 0.5},
        {"experts__weight_decay": 0.5},
        {"experts__batch_size": 7},
        {"experts__augment": False},
        {"experts__schedule": "step"},
        {"experts__cpus": 2},
        {"experts__gpus": 0.5},
        {"distill__init": "k_center"},
        {"distill__iterations": 7},
        {"distill__gradient": "tesla"},
        {"distill__steps": 7},
        {"distill__expert_epochs": 7},
        {"distill__max_start": 7},
        {"distill__independent_starts": True},
        {"distill__smooth": True},
        {"distill__batch_size": 7},
        {"distill__sampling": "chunks"},
        {"distill__image_rate": 0.5},
        {"distill__text_rate": 0.5},
        {"distill__similarity_rate": 0.5},
        {"distill__step_rate": 0.5},
        {"distill__step_size": 0.5},
        {"distill__step_floor": 0.5},
        {"distill__temperature": 0.1},
        {"distill__momentum": 0.9},
        {"distill__loss": "ence"},
        {"distill__similarity": "full"},
        {"distill__rank": 7},
        {"distill__alpha": 0.5},
        {"distill__mix": False},
        {"distill__merge_branches": True},
        {"distill__dropout": "replay"},
        {"distill__augment": True},
        {"distill__anchor": 0.5},
        {"distill__evaluate_every": 7},
        {"distill__patience": 7},
    ],
)
def test_where_and_how_fast_changes_nothing(
    reference: dict[str, str], changes: dict[str, Any]
) -> None:
    assert fingerprints(**changes) == reference


def test_another_condition_makes_decoding_stale() -> None:
    unclip = {"decode__decoder": "unclip"}
    plain, by_caption = fingerprints(**unclip), fingerprints(**unclip, decode__condition="caption")
    stale = [stage for stage in PDS.names if plain[stage] != by_caption[stage]]
    assert stale == list(PDS.names[PDS.names.index("decode") :])


@pytest.fixture(scope="module")
def coverage() -> dict[str, str]:
    return fingerprints(method="coverage", decode__decoder="auto")


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"prune__ratio": 0.3}, "prune"),
        ({"whiten__ridge": 0.5}, "whiten"),
        ({"cover__candidates": 300}, "cover"),
        ({"cover__herded": 0.0}, "cover"),
        ({"pairs": 6}, "cover"),
        ({"seed": 1}, "cover"),
        ({"decode__decoder": "unclip"}, "decode"),
        ({"decode__decoder": "nearest"}, ""),
        ({"cluster__iterations": 3}, ""),
        ({"caption__nearest_to": "prototype"}, ""),
    ],
)
def test_a_change_makes_stale_what_of_coverage_depends_on_it(
    coverage: dict[str, str], changes: dict[str, Any], first: str
) -> None:
    changed = fingerprints(**{"method": "coverage", "decode__decoder": "auto", **changes})
    stale = [stage for stage in COVERAGE.names if changed[stage] != coverage[stage]]
    assert stale == list(COVERAGE.names[COVERAGE.names.index(first) :] if first else [])


def test_auto_decodes_in_pds_and_takes_real_images_in_coverage(reference: dict[str, str]) -> None:
    assert fingerprints(decode__decoder="auto") == fingerprints(decode__decoder="unclip")
    assert fingerprints(decode__decoder="auto") != reference
    assert relevant(RunConfig(method="coverage"), COVERAGE).decode.decoder == "nearest"
    assert relevant(RunConfig(), PDS).decode.decoder == "unclip"


@pytest.fixture(scope="module")
def selection() -> dict[str, str]:
    return fingerprints(method="forgetting")


def test_methods_share_the_embeddings_and_nothing_else(
    reference: dict[str, str], selection: dict[str, str]
) -> None:
    assert list(reference) == list(PDS.names)
    assert list(selection) == list(SELECTION.names)
    assert {stage for stage in selection if selection[stage] == reference.get(stage)} == {"embed"}


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"source": "scenes:121"}, "embed"),
        ({"read__captions": "paper"}, "embed"),
        ({"method": "random"}, "select"),
        ({"pairs": 6}, "select"),
        ({"seed": 1}, "select"),
        ({"select__epochs": 3}, "select"),
        ({"select__forgotten": "most"}, "select"),
        ({"decode__image_size": 32}, "decode"),
        ({"extras__captions": 2}, "materialize"),
        ({"extras__similarity": "clip"}, "materialize"),
        ({"decode__format": "webp"}, "decode"),
    ],
)
def test_a_change_makes_stale_what_of_a_selection_depends_on_it(
    selection: dict[str, str], changes: dict[str, Any], first: str
) -> None:
    changed = fingerprints(**{"method": "forgetting", **changes})
    stale = [stage for stage in SELECTION.names if changed[stage] != selection[stage]]
    assert stale == list(SELECTION.names[SELECTION.names.index(first) :])


@pytest.mark.parametrize(
    "changes",
    [
        {"prune__ratio": 0.3},
        {"cluster__iterations": 3},
        {"cluster__modality": "joint"},
        {"match__pairless": "drop"},
        {"decode__decoder": "unclip", "decode__model": "no such model"},
        {"decode__condition": "caption"},
        {"decode__rescale": True},
        {"decode__steps": 3},
        {"decode__batch_size": 2},
        {"embed__store": "shared"},
        {"ray__num_cpus": 1},
        {"extras__share": 0.3},
        {"extras__temperature": 0.5},
    ],
)
def test_what_a_selection_has_no_use_for_changes_nothing(
    selection: dict[str, str], changes: dict[str, Any]
) -> None:
    """Nor does planning fail: only the decoder that looks up images is described."""
    assert fingerprints(method="forgetting", **changes) == selection


def test_soft_targets_depend_on_what_makes_them() -> None:
    clip, table = ({"extras__similarity": name} for name in ("clip", "table"))
    assert fingerprints(**clip) != fingerprints(**clip, extras__temperature=0.5)
    assert fingerprints(**clip) != fingerprints(**clip, extras__share=0.3)
    assert fingerprints(**table) != fingerprints(**table, extras__share=0.3)
    assert fingerprints(**table) == fingerprints(**table, extras__temperature=0.5)


def test_soft_targets_that_cannot_be_made_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"table counts pairs in clusters, and method random"):
        fingerprints(method="random", extras__similarity="table")
    monkeypatch.setattr(plan, "SOFT_TARGETS_LIMIT", 4)
    with pytest.raises(ConfigError, match=r"5 pairs are more than 4; give --extras.similarity off"):
        fingerprints(extras__similarity="clip")


@pytest.mark.parametrize("method", ["pds", "random"])
def test_a_budget_adds_a_stage_and_leaves_those_before_it(method: str) -> None:
    plain = fingerprints(method=method)
    with_budget = fingerprints(method=method, pairs=0, budget="2MB")
    before = ["embed", "prune"] if method == "pds" else ["embed"]
    assert [*with_budget][: len(before) + 1] == [*before, "budget"]
    assert [name for name in with_budget if name != "budget"] == [*plain]
    assert {name for name in plain if plain[name] == with_budget[name]} == set(before)


@pytest.mark.parametrize(
    "changes",
    [
        {"budget": "2.5MB"},
        {"pairs": 7},
        {"seed": 1},
        {"decode__image_size": 32},
        {"decode__format": "png"},
        {"decode__quality": 50},
        {"extras__captions": 2},
    ],
)
def test_what_a_budget_is_chosen_from_makes_it_stale(changes: dict[str, Any]) -> None:
    base = {"method": "random", "pairs": 0, "budget": "2MB"}
    first, changed = fingerprints(**base), fingerprints(**{**base, **changes})
    assert {name for name in first if first[name] == changed[name]} == {"embed"}
    assert fingerprints(**{**base, "budget": "2000 kB"}) == first


def test_a_configuration_that_knew_no_budget_goes_on() -> None:
    """The record of an earlier version holds nothing of options that came later."""
    run = make_run(replace(recipe("demo"), BASE))
    recorded = public(run.config)
    del recorded["budget"], recorded["decode"]["format"], recorded["decode"]["quality"]
    assert state._differences(recorded, public(run.config)) == []


def test_every_option_is_judged() -> None:
    """A new option must be put on one of the lists above."""
    from pds_ray.config import flatten, to_dict

    judged = {
        "source", "out", "method", "pairs", "seed", "select.epochs", "select.forgotten",
        "read.captions", "read.min_side", "read.max_pixels", "read.image_suffixes",
        "read.caption_suffixes", "read.caption_keys", "read.caption_lines", "embed.encoder",
        "whiten.ridge", "cover.candidates", "cover.herded",
        "embed.precision", "embed.batch_size", "embed.store", "embed.store_dtype", "prune.ratio",
        "cluster.solver", "cluster.iterations",
        "cluster.tolerance", "cluster.restarts", "cluster.normalize", "cluster.memory_gib",
        "cluster.modality", "match.solver", "match.pairless", "match.filter", "decode.decoder",
        "decode.model", "decode.revision", "decode.condition", "decode.steps", "decode.guidance",
        "decode.noise_level", "decode.negative_prompt", "decode.rescale", "decode.precision",
        "decode.batch_size", "decode.image_size", "decode.format", "decode.quality", "budget",
        "caption.nearest_to", "extras.captions", "extras.similarity", "extras.temperature",
        "extras.share", "decode.candidates", "decode.noise_levels", "decode.image_weight",
        "decode.text_weight", "decode.real_fallback", "decode.real_margin", "prototypes.center",
        "caption.round_trip",
        "experts.store", "experts.count", "experts.seed", "experts.epochs", "experts.backbone",
        "experts.text_encoder", "experts.image_size", "experts.train", "experts.rank",
        "experts.shared_start", "experts.learning_rate", "experts.text_learning_rate",
        "experts.momentum", "experts.weight_decay", "experts.batch_size", "experts.augment",
        "experts.schedule", "experts.cpus", "experts.gpus",
        "distill.init", "distill.iterations", "distill.gradient", "distill.steps",
        "distill.expert_epochs", "distill.max_start", "distill.independent_starts",
        "distill.smooth", "distill.batch_size", "distill.sampling", "distill.image_rate",
        "distill.text_rate", "distill.similarity_rate", "distill.step_rate", "distill.step_size",
        "distill.step_floor", "distill.momentum", "distill.loss", "distill.temperature",
        "distill.similarity", "distill.rank", "distill.alpha", "distill.mix",
        "distill.merge_branches", "distill.dropout", "distill.anchor", "distill.evaluate_every",
        "distill.patience", "distill.augment",
    }  # fmt: skip
    assert {name for name in flatten(to_dict(RunConfig())) if not name.startswith("ray.")} == judged


def test_a_card_counts_the_shards_that_were_not_read(tmp_path: Path) -> None:
    run = make_run(replace(recipe("demo"), {**BASE, "out": str(tmp_path), "method": "random"}))
    counts = {
        "images": 90,
        "pairs": 450,
        "bad": 3,
        "failed_shards": 2,
        "failed": {"a": "gone", "b": "gone"},
    }
    run.manifest.data["stages"] = {"embed": {"counts": counts}, "decode": {"counts": {"images": 5}}}
    described = about(run)
    assert described["counts"]["shards not read"] == 2
    assert "gone" not in str(described), "why may differ from one try to the next"


def test_images_are_not_continued_in_another_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pds_ray.distributed import pools, synthesize

    options = {**BASE, "out": str(tmp_path), "decode.decoder": "unclip"}
    run = make_run(replace(recipe("demo"), options))
    run.folder.folder.create()
    told: list[str] = []
    monkeypatch.setattr(
        synthesize, "_decode", lambda _, config: told.append(config.decode.precision) or {}
    )
    monkeypatch.setattr(RunFolder, "prototypes", lambda _: pa.table({"pair": [0, 1]}))

    def decode(gpus: float, **changes: Any) -> None:
        monkeypatch.setattr(pools, "pool", lambda *_, **__: pools.Pool(1, 1, 1, 1.0, gpus, {}))
        config, manifest = replace(run.config, changes), RunManifest(run.folder)
        synthesize.synthesize(dataclasses.replace(run, config=config, manifest=manifest))

    decode(gpus=0.0)
    decode(gpus=1.0)  # no image was made
    run.folder.images.write_bytes(run.folder.image_name(0), b"picture")
    decode(gpus=0.5)
    with pytest.raises(
        ConfigError,
        match=r"were begun in fp16, batches of .* here they would go on in fp32, batches",
    ):
        decode(gpus=0.0)
    with pytest.raises(ConfigError, match="here they would go on in fp16, batches of 3;"):
        decode(gpus=1.0, **{"decode.batch_size": 3})
    assert told == ["fp32", "fp16", "fp16"], "every actor is told, none decides for itself"
    manifest = RunManifest(run.folder)
    del manifest.data["images_made"]  # as of a run begun before it was recorded
    manifest.update()
    decode(gpus=0.0)
    assert told[-1] == "fp32"


class Refusing:
    """Ten captioned samples a shard; the store refuses the shards that are named."""

    uri, validation = "refusing", None

    def __init__(self, refused: set[int]) -> None:
        self.refused = refused
        self.asked: list[str] = []

    def read(self, shard: Shard) -> Iterator[Sample]:
        self.asked.append(shard.name)
        if int(shard.name) in self.refused:
            raise StorageError("the object store fails at s3://b/0.tar (HTTP status 403)")
        for number in range(10):
            yield Sample(str(number), b"", ("a caption",))


def test_a_source_without_samples_says_why(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number}.tar").write_text("<html>404</html>")
    config = RunConfig(source=str(tmp_path / "*.tar"), pairs=10, out=str(tmp_path / "run"))
    source = WebDatasetSource(config.source)
    with pytest.raises(
        ConfigError, match=r"no sample of .* has an image and a caption \(not_a_tar: 2; an HTML .*"
    ):
        plan.check_enough(source, source.shards(), config)


class Noted:
    """One shard of captioned samples with notes of the source."""

    uri, validation = "noted", None

    def __init__(self, *notes: tuple[str, ...]) -> None:
        self.notes = notes

    def read(self, _: Shard) -> Iterator[Sample]:
        for number, notes in enumerate(self.notes):
            yield Sample(str(number), b"", ("a caption",), notes)


@pytest.mark.parametrize(
    ("notes", "option", "told"),
    [
        ([(), ()], "auto", []),
        ([("cp1252",), ("utf-16",), ()], "auto", ["first 3 images looked at", "1 as cp1252"]),
        ([("lines",), ("lines",), ()], "auto", ["2 of the first 3", "--read.caption-lines each"]),
        ([("lines",), ()], "auto", []),
        ([("lines",)], "whole", []),
    ],
)
def test_how_captions_were_read_is_said_once(
    capsys: pytest.CaptureFixture[str], notes: list[tuple[str, ...]], option: str, told: list[str]
) -> None:
    config = replace(RunConfig(source="x.tar", pairs=len(notes)), {"read.caption_lines": option})
    plan.check_enough(Noted(*notes), [Shard("0", "")], config)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == bool(told)
    assert all(part in lines[0] for part in told)


def test_options_of_reading_at_their_defaults_change_no_earlier_fingerprint() -> None:
    first = {"captions": "basic", "max_pixels": 64_000_000, "min_side": 2}
    assert _reading(ReadConfig()) == first
    assert _reading(ReadConfig(caption_keys="alt")) == {**first, "caption_keys": "alt"}
    assert changed(FilesConfig()) == {}


def check_enough(source: Refusing, shards: int, pairs: int) -> None:
    config = RunConfig(source="s3://b/*.tar", pairs=pairs)
    plan.check_enough(source, [Shard(str(n), "") for n in range(shards)], config)


def test_a_shard_that_its_store_refuses_is_passed_over() -> None:
    check_enough(Refusing({0, 2}), shards=4, pairs=20)
    with pytest.raises(ConfigError, match="has only 20 captioned images"):
        check_enough(Refusing({0, 2}), shards=4, pairs=21)


def test_a_store_that_refuses_all_is_not_asked_for_long() -> None:
    source = Refusing(set(range(40_000)))
    with pytest.raises(
        SourceError, match=r"none of the first 10 shards of s3://b/\*.tar can be read: .*403"
    ):
        check_enough(source, shards=40_000, pairs=5)
    assert len(source.asked) == 10
    with pytest.raises(SourceError, match="no shard of"):
        check_enough(Refusing({0, 1, 2}), shards=3, pairs=5)


@pytest.fixture
def begun(tmp_path: Path) -> tuple[RunConfig, Run]:
    """A run of three shards, of which the first is embedded."""
    for number in range(3):
        write_shard(tmp_path / f"{number}.tar", {}, samples=4, seed=number)
    changes = {"source": f"{tmp_path}/{{0..2}}.tar", "pairs": 2, "out": str(tmp_path / "run")}
    config = replace(recipe("demo"), {"decode.decoder": "nearest", **changes})
    first = make_run(config)
    state.open_run(first, redo=False)
    write_marker(first, "0")
    return config, first


def write_marker(run: Run, shard: str, **info: Any) -> None:
    """Commit a shard without an image to the store of a run; `info` goes into its marker."""
    counts = {"images": 0, "pairs": 0, "bad": 0, "reasons": {}, "precision": "fp32"}
    schemas = image_schema(1, "float16"), caption_schema(1, "float16"), ERROR_SCHEMA
    run.store.commit(shard, *(schema.empty_table() for schema in schemas), counts | info)


@pytest.mark.parametrize("form", ["{0..2}.tar", "*.tar"])
def test_a_run_goes_on_though_shards_are_gone_or_newer(
    begun: tuple[RunConfig, Run],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    form: str,
) -> None:
    config, first = begun
    config = replace(config, {"source": f"{tmp_path}/{form}"})
    (tmp_path / "0.tar").unlink()
    os.utime(tmp_path / "1.tar", ns=(1, 1))
    write_shard(tmp_path / "2.tar", {}, samples=8)  # mended before it was embedded
    again = make_run(config)
    assert "1 are gone (0) and 2 are newer (1, 2)" in capsys.readouterr().err
    assert again.fingerprints == first.fingerprints
    assert again.shards == first.shards
    RunManifest(again.folder).update(config=public(again.config))
    state.open_run(again, redo=False)
    now = make_run(replace(config, {"source": f"{tmp_path}/*.tar"}), redo=True)
    assert [shard.name for shard in now.shards] == ["1", "2"]
    assert now.fingerprints != first.fingerprints


def test_shards_that_never_were_there_are_no_source(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", {}, samples=4)
    changes = {"source": f"{tmp_path}/{{0..2}}.tar", "pairs": 2, "out": str(tmp_path / "run")}
    with pytest.raises(SourceError, match="2 of 3 shard patterns match nothing"):
        make_run(replace(recipe("demo"), {"decode.decoder": "nearest", **changes}))


@pytest.mark.parametrize("what", ["a new shard", "another size"])
def test_new_shards_and_other_ones_are_another_source(
    begun: tuple[RunConfig, Run], tmp_path: Path, what: str
) -> None:
    config, first = begun
    write_shard(tmp_path / ("3.tar" if what == "a new shard" else "0.tar"), {}, samples=30)
    again = make_run(replace(config, {"source": f"{tmp_path}/*.tar"}))
    assert again.fingerprints != first.fingerprints
    named = (
        "1 shards new: 3" if what == "a new shard" else r"1 shards of another size: 0: [\d,]+, now"
    )
    with pytest.raises(ManifestError, match=f"other data.*{named}"):
        state.open_run(again, redo=False)


def test_a_mended_shard_is_one_of_the_same_source(
    begun: tuple[RunConfig, Run], tmp_path: Path
) -> None:
    """Before it is read again, after that, and after another change: only the last is another."""
    config, first = begun
    damaged = {"damage": "not_a_tar: a web page", "file": file_of(first.shards[0])}
    write_marker(first, "0", **damaged)
    write_shard(tmp_path / "0.tar", {}, samples=9)  # mended
    again = make_run(config)
    assert again.fingerprints == first.fingerprints
    assert again.changed.keys() == {"0"}
    assert again.changed["0"].size == (tmp_path / "0.tar").stat().st_size
    write_marker(first, "0", file=file_of(again.changed["0"]))  # read again
    assert make_run(config).fingerprints == first.fingerprints
    write_shard(tmp_path / "0.tar", {}, samples=30)
    assert make_run(config).fingerprints != first.fingerprints


@pytest.mark.parametrize("state_of_store", ["damaged", "mended", "whole"])
def test_a_new_run_on_a_shared_store_takes_what_was_mended_for_the_same_source(
    begun: tuple[RunConfig, Run], tmp_path: Path, state_of_store: str
) -> None:
    config = replace(begun[0], {"embed.store": str(tmp_path / "store")})
    first = make_run(replace(config, {"out": str(tmp_path / "first")}))
    state.open_run(first, redo=False)
    info = {"damage": "not_a_tar: a web page", "file": file_of(first.shards[0])}
    write_shard(tmp_path / "0.tar", {}, samples=9)
    if state_of_store == "mended":
        info = {"file": file_of(WebDatasetSource(config.source).shards()[0])}
    write_marker(first, "0", **(info if state_of_store != "whole" else {}))
    second = make_run(replace(config, {"out": str(tmp_path / "second")}))
    if state_of_store != "whole":
        state.open_run(second, redo=False)
        assert second.fingerprints == first.fingerprints
        return
    with pytest.raises(ManifestError, match=r"1 shards of another size: 0"):
        state.open_run(second, redo=False)


def test_no_secret_is_kept_with_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "s3://key:hidden@bucket/0.tar"
    monkeypatch.setattr(WebDatasetSource, "shards", lambda _: [Shard("0", secret, 1)])
    monkeypatch.setattr(plan, "check_enough", lambda *_: None)
    first = make_run(
        replace(recipe("demo"), {"source": secret, "pairs": 2, "out": str(tmp_path / "run")})
    )
    state.open_run(first, redo=False)
    assert "hidden" not in str(first.folder.shards())
    assert (
        make_run(
            replace(recipe("demo"), {"source": secret, "pairs": 2, "out": str(tmp_path / "run")})
        ).shards
        == first.shards
    )


def test_a_damaged_list_of_shards_is_one_line(begun: tuple[RunConfig, Run], tmp_path: Path) -> None:
    config, first = begun
    (tmp_path / "run" / "shards.parquet").write_bytes(b"not what it was")
    with pytest.raises(
        StorageError, match=r"shards.parquet cannot be read .* verify --repair makes it anew"
    ):
        make_run(config)
    assert make_run(config, redo=True).shards == first.shards

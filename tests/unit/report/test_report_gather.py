"""Content of a report, against brute force."""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pds_ray.report import clusters, images, run
from pds_ray.report import gather as module
from pds_ray.report.evaluations import ReportError
from pds_ray.report.gather import gather
from pds_ray.store.schemas import ERROR_SCHEMA
from tests.support.synthetic_run import (
    HOSTILE,
    Made,
    add_comparison,
    add_evaluation,
    choose_instead,
    make_run,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    return make_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def report(made):
    return gather(str(made.path))


@pytest.fixture
def copy(made, tmp_path):
    """A run folder that a test may change."""
    return Path(shutil.copytree(made.path, tmp_path / "run"))


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_nearest_images_are_the_nearest(made, report):
    cosine = unit(made.image_prototypes) @ unit(made.images).T
    for pair, entry in enumerate(report["pairs"]["list"]):
        best = np.argsort(-cosine[pair], kind="stable")[:3]
        assert [item["key"] for item in entry["nearest"]] == [made.image_keys[row] for row in best]
        np.testing.assert_allclose(
            [item["cosine"] for item in entry["nearest"]], cosine[pair, best], atol=1e-4
        )


def test_thumbnails_are_the_images_of_the_source(report):
    entry = report["pairs"]["list"][0]["nearest"][0]
    uri = report["pairs"]["thumbs"][entry["thumb"]]
    image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert uri.startswith("data:image/png;base64,")
    assert image.size == (32, 32)
    assert report["notes"] == []


def test_sizes_and_contingency_are_counted_right(made, report):
    found = report["clusters"]
    for modality, labels in (("image", made.image_cluster), ("text", made.text_cluster)):
        assert found["sizes"][modality] == np.bincount(labels[made.kept], minlength=6).tolist()
    matches = found["matches"]
    wanted = [
        [
            int(((made.image_cluster == row) & (made.text_cluster == column)).sum())
            for _, column in matches
        ]
        for row, _ in matches
    ]
    assert found["table"] == wanted
    diagonal = np.diag(wanted).tolist()
    assert diagonal == sorted(found["shared"], reverse=True)
    assert sum(diagonal) == found["shared_pairs"]
    assert found["kept_pairs"] == made.kept.sum()


def test_only_the_largest_matches_are_in_the_table(made, monkeypatch):
    monkeypatch.setattr(clusters, "MATCH_LIMIT", 4)
    found = gather(str(made.path))["clusters"]
    assert len(found["table"]) == len(found["matches"]) == 4
    assert np.diag(found["table"]).tolist() == sorted(found["shared"], reverse=True)[:4]
    assert found["matches_total"] == 6


def test_the_plane_is_that_of_an_svd(made, report):
    points = unit(made.images.astype(np.float64))
    centered = points - points.mean(axis=0)
    _, values, axes = np.linalg.svd(centered, full_matrices=False)
    plane = report["space"]["image"]
    np.testing.assert_allclose(plane["explained"], values[:2] ** 2 / (values**2).sum(), atol=1e-4)
    mine, theirs = np.asarray(plane["sample"]), centered @ axes[:2].T
    theirs *= np.sign((mine * theirs).sum(axis=0))
    np.testing.assert_allclose(mine, theirs, atol=1e-3)
    assert plane["fitted_on"] == len(made.images)
    assert len(plane["prototypes"]) == 6


def test_a_report_is_json_and_the_same_again(made, report):
    assert json.loads(json.dumps(report, allow_nan=False)) == json.loads(
        json.dumps(gather(str(made.path)))
    )


def test_hostile_captions_come_through_unchanged(tmp_path):
    made = make_run(tmp_path / "run", pairs=len(HOSTILE), captions=HOSTILE)
    assert [entry["caption"] for entry in gather(str(made.path))["pairs"]["list"]] == HOSTILE


def test_more_pairs_than_fit_are_counted(made, monkeypatch):
    monkeypatch.setattr(run, "PAIR_LIMIT", 4)
    report = gather(str(made.path))
    assert (len(report["pairs"]["list"]), report["pairs_total"]) == (4, 6)


def test_a_source_that_moved_costs_only_its_images(copy):
    manifest = json.loads((copy / "run.json").read_text())
    manifest["config"]["source"] = str(copy / "nowhere" / "*.tar")
    (copy / "run.json").write_text(json.dumps(manifest))
    report = gather(str(copy))
    assert len(report["pairs"]["list"]) == 6
    assert report["pairs"]["thumbs"] == []
    assert all(
        item["thumb"] is None for entry in report["pairs"]["list"] for item in entry["nearest"]
    )
    (note,) = report["notes"]
    assert "cannot be read any more" in note
    assert "\n" not in note


def test_only_so_many_shards_are_read_again(made, monkeypatch):
    monkeypatch.setattr(images, "SHARD_LIMIT", 1)
    report = gather(str(made.path))
    (note,) = report["notes"]
    assert "1 of the 3 shards" in note
    shown = {
        item["shard"]
        for e in report["pairs"]["list"]
        for item in e["nearest"]
        if item["thumb"] is not None
    }
    assert len(shown) == 1


def test_a_store_elsewhere_is_found(copy, tmp_path):
    shutil.move(copy / "embeddings", tmp_path / "store")
    manifest = json.loads((copy / "run.json").read_text())
    manifest["config"]["embed"]["store"] = str(tmp_path / "store")
    (copy / "run.json").write_text(json.dumps(manifest))
    assert gather(str(copy))["space"] is not None


def test_without_embeddings_there_are_still_pairs(copy):
    shutil.rmtree(copy / "embeddings")
    report = gather(str(copy))
    assert report["clusters"] is None
    assert report["space"] is None
    assert [len(entry["nearest"]) for entry in report["pairs"]["list"]] == [1] * 6, (
        "the one the run knows itself"
    )
    assert "no longer there" in report["notes"][0]


def test_a_quick_report_of_a_large_run_does_not_search(made, monkeypatch):
    monkeypatch.setattr(module, "QUICK_IMAGES", 10)
    quick = gather(str(made.path), quick=True)
    assert quick["space"] is None
    assert quick["clusters"] is not None
    assert len(quick["pairs"]["list"][0]["nearest"]) == 1
    assert gather(str(made.path))["space"] is not None


@pytest.mark.parametrize("quick", [False, True])
def test_a_selection_has_neither_clusters_nor_nearest_images(made, copy, monkeypatch, quick):
    monkeypatch.setattr(module, "QUICK_IMAGES", 10)
    choose_instead(copy, "herding")
    report = gather(str(copy), quick)
    assert report["clusters"] is None
    assert report["dropped"] is None
    for entry in report["pairs"]["list"]:
        assert (entry["nearest"], entry["members"], entry["shared"]) == ([], [], None)
        assert entry["details"].keys() == {
            "member_norm",
            "caption_shard",
            "caption_key",
            "caption_cosine",
        }
    header = report["header"]
    total = len(made.kept)
    assert header["reading"] == f"6 real pairs, chosen out of {total} by the method herding."
    assert "chosen from" in [tile["label"] for tile in header["tiles"]]
    assert report["space"] is None if quick else report["space"]["made"] is False


@pytest.mark.parametrize("origin", ["synthetic", "synthetic, but for 2 real images of the source"])
def test_chosen_pairs_with_decoded_images_are_not_called_real(copy, origin):
    choose_instead(copy, "coverage")
    manifest = json.loads((copy / "distilled/manifest.json").read_text())
    manifest["about"]["picture_origin"] = origin
    (copy / "distilled/manifest.json").write_text(json.dumps(manifest))
    reading = gather(str(copy), quick=True)["header"]["reading"]
    assert reading.startswith("6 pairs, chosen")
    assert reading.endswith("their images decoded.")


def test_an_unfinished_run_says_where_it_stands(copy):
    manifest = json.loads((copy / "run.json").read_text())
    del manifest["stages"]["materialize"]
    manifest["stages"]["decode"] = {"status": "interrupted", "fingerprint": "x", "seconds": 3.0}
    (copy / "run.json").write_text(json.dumps(manifest))
    report = gather(str(copy))
    assert report["pairs"]["list"] == []
    assert report["notes"] == ["The run is not finished: stage decode is interrupted."]
    assert report["clusters"] is not None


def test_an_unfinished_selection_chooses(copy):
    choose_instead(copy, "random")
    manifest = json.loads((copy / "run.json").read_text())
    del manifest["stages"]["materialize"]
    (copy / "run.json").write_text(json.dumps(manifest))
    assert "chosen from" in [tile["label"] for tile in gather(str(copy))["header"]["tiles"]]


def test_examples_of_bad_samples_show_every_reason(copy):
    store = copy / "embeddings"
    rows = [
        {"key": f"b{n}", "reason": "undecodable_image", "detail": "<i>cut</i>"} for n in range(60)
    ]
    rows.append({"key": "rare", "reason": "missing_caption", "detail": ""})
    pa.parquet.write_table(pa.Table.from_pylist(rows, ERROR_SCHEMA), store / "00001.errors.parquet")
    marker = json.loads((store / "00001.json").read_text())
    (store / "00001.json").write_text(json.dumps({**marker, "bad": 61}))
    examples = gather(str(copy))["dropped"]["examples"]
    assert len(examples) == 20
    assert {row["key"] for row in examples} >= {"rare", "b0"}
    assert examples[0]["shard"] == "00001"


def test_a_shard_that_was_not_read_is_named(made, copy):
    manifest = json.loads((copy / "run.json").read_text())
    manifest["stages"] = {
        n: manifest["stages"][n] for n in ("embed", "decode", "materialize")
    }  # nothing else to tell
    told = {"shards": 4, "failed_shards": 1, "failed": {"00003": "<b>HTTP status 403</b>"}}
    manifest["stages"]["embed"]["counts"] |= told
    (copy / "run.json").write_text(json.dumps(manifest))
    dropped = gather(str(copy))["dropped"]
    assert [(step["what"], step["count"], step["of"]) for step in dropped["steps"]] == [
        ("shards not read", 1, 4)
    ]
    assert dropped["failed"] == [{"shard": "00003", "problem": "<b>HTTP status 403</b>"}]
    assert "shards not read" not in json.dumps(gather(str(made.path)))


def test_evaluations_and_baselines(copy, tmp_path):
    add_evaluation(copy)
    (copy / "evaluation" / "broken.json").write_text("{}")
    add_comparison(
        tmp_path, {("random", 6): "sets/random-6", ("pds", 6): "run", ("pds", 9): "sets/pds-9"}
    )
    report = gather(str(copy))
    (evaluation,) = report["evaluations"]
    assert [backbone["name"] for backbone in evaluation["backbones"]] == ["nfnet", "vit"]
    assert evaluation["mean"]["r_mean"] == 17.5
    assert report["notes"] == ["evaluation/broken.json is no evaluation that this version reads."]
    assert [(bar["method"], bar["own"]) for bar in report["baselines"]["bars"]] == [
        ("random", False),
        ("pds", True),
    ]


def test_a_comparison_shows_the_sets_below_it(copy, tmp_path):
    assert copy == tmp_path / "run"
    add_comparison(
        tmp_path, {("pds", 6): "run", ("random", 6): "../outside", ("herding", 6): "gone"}
    )
    report = gather(str(tmp_path))
    assert report["kind"] == "comparison"
    assert [(strip["method"], len(strip["first"])) for strip in report["strips"]] == [("pds", 6)]
    assert report["notes"] == ["The pairs of 2 sets cannot be shown: the sets are not there."]


@pytest.mark.parametrize("content", ["[]", "{", '{"cells": [{"method": "pds"}]}'])
def test_a_comparison_that_is_none(tmp_path, content):
    (tmp_path / "comparison.json").write_text(content)
    with pytest.raises(ReportError, match="cannot be read as a comparison"):
        gather(str(tmp_path))


def test_nothing_to_report_on(tmp_path):
    with pytest.raises(ReportError, match=r"neither a run\.json nor a comparison\.json"):
        gather(str(tmp_path))


def test_no_credentials_of_a_store_are_shown(copy):
    manifest = json.loads((copy / "run.json").read_text())
    manifest["ray"] = {"address": "ray://user:secret@host"}
    manifest["config"]["decode"]["model"] = "s3://key:secret@bucket/model?access_key=secret"
    (copy / "run.json").write_text(json.dumps(manifest))
    assert "secret" not in json.dumps(gather(str(copy)))

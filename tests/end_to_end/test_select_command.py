"""`pds-ray select`: real pairs in the format of a distilled set."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from pds_ray import load_distilled
from pds_ray.methods.selection import SELECTION
from pds_ray.modalities.image import decode_image
from pds_ray.sources.scenes import ScenesSource
from tests.support.command_line import SOURCE, Run, check_same, content, stages, times

pytestmark = pytest.mark.ray
SELECT = ["select", "--preset", "demo", "--source", SOURCE, "--pairs", "12"]
SAMPLES = {
    (shard.name, sample.key): sample
    for shard in ScenesSource(SOURCE).shards()
    for sample in ScenesSource(SOURCE).read(shard)
}


@pytest.fixture(scope="module")
def herding(tmp_path_factory: pytest.TempPathFactory, pds_ray: Run) -> Path:
    run = tmp_path_factory.mktemp("select") / "herding"
    done = pds_ray(*SELECT, "--method", "herding", "--out", str(run))
    assert done.returncode == 0, done.stderr
    assert "method        herding" in done.stdout
    assert [line.split()[0] for line in done.stdout.split("rate\n")[1].split("\n")[:4]] == list(
        SELECTION.names
    )
    return run


def check_pairs(run: Path, method: str) -> None:
    pairs = load_distilled(str(run))
    assert len(pairs) == 12
    places = [(record["caption_shard"], record["caption_key"]) for record in pairs.records]
    assert len(set(places)) == 12
    for pair, place in enumerate(places):
        image = decode_image(SAMPLES[place].image)
        assert image.size == (64, 64)
        assert np.array_equal(np.asarray(pairs.image(pair)), np.asarray(image))
        assert pairs.captions[pair] in SAMPLES[place].captions
    image, text = pairs.image_prototypes, pairs.text_prototypes
    cosine = (image * text).sum(1) / np.linalg.norm(image, axis=1) / np.linalg.norm(text, axis=1)
    recorded = [record["cosine"] for record in pairs.records]
    np.testing.assert_allclose(cosine, recorded, atol=2e-3)  # the store is float16
    assert np.linalg.norm(image, axis=1).min() > 1.5, "they should not be normalised"
    about = pairs.manifest["about"]
    assert about["method"] == method
    assert about["picture_origin"] == "real images of the source"
    assert about["config"].keys() >= {"read", "embed", "select"}
    assert not about["config"].keys() & {"prune", "cluster", "match"}
    card = (run / "distilled" / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["tags"] == ["coreset", method]
    assert "Prototype-guided" not in card
    assert "real" in card


def test_the_chosen_pairs_are_those_of_the_source(herding: Path) -> None:
    check_pairs(herding, "herding")
    assert list(stages(herding)) == list(SELECTION.names)


def test_repeating_the_command_does_nothing_and_another_method_is_refused(
    herding: Path, pds_ray: Run
) -> None:
    before = content(herding)
    written = times(herding, "run.json", "report.html")
    again = pds_ray(*SELECT, "--method", "herding", "--out", str(herding))
    assert again.returncode == 0, again.stderr
    assert times(herding, "run.json", "report.html") == written
    refused = pds_ray(*SELECT, "--method", "random", "--out", str(herding))
    assert refused.returncode == 2
    assert "method: herding -> random" in refused.stderr
    assert content(herding) == before


def test_a_second_method_shares_the_store_and_distill_does_the_same(
    herding: Path, pds_ray: Run, tmp_path: Path
) -> None:
    store = ("--embed.store", str(herding / "embeddings"))
    run = tmp_path / "clip_score"
    done = pds_ray(*SELECT, *store, "--method", "clip_score", "--out", str(run))
    assert done.returncode == 0, done.stderr
    check_pairs(run, "clip_score")
    manifest = json.loads((run / "run.json").read_text())
    assert manifest["stages"]["embed"]["counts"]["images_reused"] == 90
    other = tmp_path / "distill"
    same = ["distill", *SELECT[1:], *store, "--method", "clip_score", "--out", str(other)]
    # an option that the method does not use makes no difference
    done = pds_ray(*same, "--prune.ratio", "0.5")
    assert done.returncode == 0, done.stderr
    check_same(other, run)


@pytest.mark.long
def test_redo_replaces_one_method_by_another(herding: Path, pds_ray: Run, tmp_path: Path) -> None:
    store = ("--embed.store", str(herding / "embeddings"))
    run = tmp_path / "run"
    command = [*SELECT, *store, "--out", str(run)]
    assert pds_ray(*command, "--method", "random").returncode == 0
    assert pds_ray(*command, "--method", "k_center", "--redo").returncode == 0
    check_pairs(run, "k_center")
    pds = ["distill", *command[1:], "--decoder", "nearest", "--redo"]
    assert pds_ray(*pds).returncode == 0
    assert "select" not in stages(run)
    assert set(stages(run).values()) == {"done"}
    assert load_distilled(str(run)).manifest["about"]["method"] == "pds"

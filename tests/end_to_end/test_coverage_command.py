"""`pds-ray distill --method coverage`: chosen pairs with their real images, or decoded ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pds_ray import load_distilled
from pds_ray.methods.coverage import COVERAGE
from pds_ray.modalities.image import decode_image
from pds_ray.sources.scenes import ScenesSource
from tests.support.command_line import SOURCE, Run, content, stages

pytestmark = [pytest.mark.ray, pytest.mark.long]
COMMAND = ["distill", "--method", "coverage", "--preset", "demo", "--source", SOURCE]
SAMPLES = {
    (shard.name, sample.key): sample
    for shard in ScenesSource(SOURCE).shards()
    for sample in ScenesSource(SOURCE).read(shard)
}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, pds_ray: Run) -> Path:
    run = tmp_path_factory.mktemp("coverage") / "real"
    done = pds_ray(*COMMAND, "--pairs", "6", "--out", str(run))
    assert done.returncode == 0, done.stderr
    assert "method        coverage" in done.stdout
    return run


def test_images_and_captions_are_those_of_the_source(real: Path) -> None:
    assert list(stages(real)) == list(COVERAGE.names)
    pairs = load_distilled(str(real))
    places = [(record["caption_shard"], record["caption_key"]) for record in pairs.records]
    assert len(set(places)) == len(pairs) == 6
    for pair, place in enumerate(places):
        image = decode_image(SAMPLES[place].image)
        assert np.array_equal(np.asarray(pairs.image(pair)), np.asarray(image))
        assert pairs.captions[pair] in SAMPLES[place].captions
    about = pairs.manifest["about"]
    assert pairs.is_selection
    assert about["picture_origin"] == "real images of the source"
    assert about["selection"].startswith("whitened coverage: ")
    assert about["config"].keys() >= {"prune", "whiten", "cover", "decode"}
    assert "6 real pairs, chosen out of" in (real / "report.html").read_text()


def test_repeating_the_command_does_nothing(real: Path, pds_ray: Run) -> None:
    before = content(real)
    assert pds_ray(*COMMAND, "--pairs", "6", "--out", str(real)).returncode == 0
    assert content(real) == before


def test_the_same_pairs_decoded(real: Path, pds_ray: Run, tmp_path: Path) -> None:
    run, store = tmp_path / "decoded", ("--embed.store", str(real / "embeddings"))
    more = ("--decoder", "unclip", "--decode.steps", "2", "--pairs", "6")
    done = pds_ray(*COMMAND, *store, *more, "--out", str(run))
    assert done.returncode == 0, done.stderr
    decoded, chosen = load_distilled(str(run)), load_distilled(str(real))
    assert decoded.captions == chosen.captions
    assert (decoded.image_prototypes == chosen.image_prototypes).all()
    assert decoded.manifest["about"]["picture_origin"] == "synthetic"
    card = (run / "distilled" / "README.md").read_text()
    assert "Here the images were decoded, each from" in card
    assert "6 pairs, chosen out of" in (run / "report.html").read_text()

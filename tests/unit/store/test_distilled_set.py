"""Reading a distilled set: the fields that a set does not have."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pds_ray.store.distilled_set import PROTOTYPE_FIELDS, load_distilled
from tests.support.hand_made_set import save_set
from tests.support.synthetic_run import choose_instead, make_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run").path


def test_a_distilled_pair_knows_its_clusters(run: Path):
    distilled = load_distilled(str(run))
    assert not distilled.is_selection
    assert [record["image_cluster"] for record in distilled.records] == list(range(6))
    assert all(
        record[name] is not None for record in distilled.records for name in PROTOTYPE_FIELDS
    )


def test_a_chosen_pair_has_no_fields_of_a_prototype(run: Path):
    before = load_distilled(str(run)).records
    choose_instead(run, "herding")
    distilled = load_distilled(str(run))
    assert distilled.is_selection
    for record, other in zip(distilled.records, before, strict=True):
        assert all(record[name] is None for name in PROTOTYPE_FIELDS)
        kept = record.keys() - set(PROTOTYPE_FIELDS)
        assert {name: record[name] for name in kept} == {name: other[name] for name in kept}
        assert {"cosine", "caption_shard", "caption_key", "member_norm"} <= kept


def test_the_file_has_the_same_fields_in_every_set(run: Path):
    choose_instead(run, "herding")
    lines = (run / "distilled" / "imagefolder" / "metadata.jsonl").read_text().splitlines()
    for row in map(json.loads, lines):
        assert (row["image_cluster"], row["text_cluster"], row["shared"]) == (-1, -1, 1)


def test_fields_may_be_absent(tmp_path: Path):
    images = [Image.new("RGB", (4, 4))] * 2
    distilled = load_distilled(str(save_set(tmp_path, images, ["a", ""], np.eye(2))))
    assert not distilled.is_selection
    assert distilled.captions == ["a", ""]
    assert [record.get("image_cluster") for record in distilled.records] == [None, None]

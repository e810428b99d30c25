"""The cost of experts, against the model that is trained and against closed forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pds_ray import catalog
from pds_ray.planning.optimisation import student_of
from pds_ray.planning.phases import Demand
from pds_ray.stages.experts import STATES, describe_model, want_experts, weights_of
from pds_ray.store.storage import Folder
from tests.support.plans import demand, forecast, stage, web

IMAGES = 10_000
SMALL = {"method": "lors", "pairs": 100, "experts__backbone": "small_vit", "experts__count": 3}


def train(gpus: str = "64xH100", **changes: Any) -> Demand:
    cpus = 64 if gpus == "0" else None
    return demand(forecast(IMAGES, gpus, cpus, **SMALL | changes), "experts", "train")


@pytest.mark.parametrize("part", ["all", "backbone", "heads", "lora"])
def test_bytes_are_those_of_the_weights_that_are_trained(tmp_path: Path, part: str) -> None:
    """N experts of M epochs and P weights: N (M + 1) P 4 bytes, and a state each."""
    options = {**SMALL, "experts__train": part, "experts__rank": 2, "experts__image_size": 32}
    options |= {"experts__text_encoder": "demo"}
    config = web(**options, experts__epochs=5)
    source = catalog.make_source("scenes:4", config.read)
    wanted = want_experts(config, source, source.shards(), Folder(str(tmp_path)))
    weights = sum(weights_of(describe_model(wanted, catalog.build_backbone)).values())
    snapshots = 3 * (5 + 1 + STATES) * 4 * weights
    ready = IMAGES * (3 * 32**2 + 4 * wanted.encoder.dim)
    found = stage(forecast(IMAGES, **options, experts__epochs=5), "experts")
    assert found.disk_bytes == pytest.approx(snapshots + ready)


def test_a_text_encoder_whose_weights_are_elsewhere_has_its_width() -> None:
    of_text = {e: student_of(web(**SMALL, embed__encoder=e)) for e in ("ViT-L-14", "ViT-B-32")}
    assert [one.text_width for one in of_text.values()] == [768, 512]


def test_every_epoch_of_every_expert_visits_every_image() -> None:
    one = train(experts__count=1, experts__epochs=1).work
    assert train(experts__count=3, experts__epochs=7).work == pytest.approx(21 * one)


def test_a_frozen_backbone_sees_every_image_once() -> None:
    whole = train(experts__count=1, experts__epochs=1).work
    for epochs in (1, 9):
        frozen = train(experts__train="heads", experts__epochs=epochs).work
        assert frozen == pytest.approx(whole / 3), "forwards once, and never backwards"


def test_experts_share_no_accelerator_and_take_no_second_one() -> None:
    assert train(experts__count=3).at_most == 3
    assert train(experts__count=3, experts__gpus=0.5).at_most == 1.5
    assert train(experts__count=3, experts__gpus=2.0).at_most == 3
    assert train("0", experts__count=3, experts__cpus=4).at_most == 12

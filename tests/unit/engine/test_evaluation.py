"""What is said against an evaluation before anything starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pds_ray import catalog
from pds_ray.config import ConfigError, EvaluateConfig, ProtocolConfig
from pds_ray.engine import evaluate as evaluation
from pds_ray.stages.trial import Candidate, TextInput, Trial, check_shared
from tests.support.hand_made_set import scenes_set

CONFIG = EvaluateConfig(test="scenes:60:7", backbones="small_conv", seeds=1)


def plan(path: Path, config: EvaluateConfig) -> evaluation.Plan:
    return evaluation.plan([Candidate("set", str(path), config.protocol)], config)


def test_val_is_never_test(tmp_path: Path) -> None:
    path = scenes_set(tmp_path / "set")
    with pytest.raises(ConfigError, match="chosen on the test split"):
        plan(path, replace(CONFIG, val="scenes:60:7"))
    assert plan(path, CONFIG).splits["val"].uri != CONFIG.test
    assert "val" not in plan(path, replace(CONFIG, protocol=ProtocolConfig(select="test"))).splits


@pytest.mark.parametrize("split", ["test", "val"])
def test_pictures_of_the_source_judge_nothing(tmp_path: Path, split: str) -> None:
    made = plan(scenes_set(tmp_path / "a"), CONFIG).sets[0].distilled.manifest["about"]["source"]
    count = made.split(":")[1]
    with pytest.raises(ConfigError, match=f"--{split} .* holds pictures of {made}"):
        plan(scenes_set(tmp_path / "b"), replace(CONFIG, **{split: f"scenes:{count}"}))
    shards = catalog.make_source("scenes:10000").shards()
    with pytest.raises(ConfigError, match=f"--{split} .* holds pictures of the source"):
        evaluation.check(replace(CONFIG, **{split: "scenes:60"}), [CONFIG.protocol], shards)


def test_a_key_is_of_what_training_sees(tmp_path: Path) -> None:
    """Not of what the card or the place says; but of pictures, captions, seed, protocol, backbone and test."""
    key = plan(scenes_set(tmp_path / "a"), CONFIG).trials[0].key
    assert plan(scenes_set(tmp_path / "elsewhere"), CONFIG).trials[0].key == key
    others = [
        plan(scenes_set(tmp_path / "seed", seed=1), CONFIG),
        plan(tmp_path / "a", replace(CONFIG, test="scenes:61:7")),
        plan(tmp_path / "a", replace(CONFIG, val="scenes:60:8")),
        plan(tmp_path / "a", replace(CONFIG, backbones="small_vit")),
        plan(tmp_path / "a", replace(CONFIG, protocol=ProtocolConfig(epochs=7))),
    ]
    assert len({key, *(other.trials[0].key for other in others)}) == 6
    assert plan(tmp_path / "a", replace(CONFIG, seeds=2)).trials[0].key == key


@pytest.mark.parametrize(
    ("train", "workers", "refused"), [("all", 2, True), ("all", 1, False), ("heads", 2, False)]
)
def test_workers_do_not_share_batch_statistics(train: str, workers: int, refused: bool) -> None:
    info = catalog.describe_backbone("resnet10t:scratch")
    trial = Trial(
        "k", "set", info, 32, 0, ProtocolConfig(train=train), TextInput("captions", "", "basic"), 4
    )
    backbone = catalog.build_backbone(info, 32)
    if refused:
        with pytest.raises(ConfigError, match="--workers 1"):
            check_shared(trial, backbone, workers)
    else:
        check_shared(trial, backbone, workers)

"""Checks of an evaluation before anything starts."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from pds_ray import catalog
from pds_ray.config import ConfigError, EvaluateConfig, ProtocolConfig
from pds_ray.engine import evaluate as evaluation
from pds_ray.stages.trial import MEASURES, Candidate, TextInput, Trial, check_shared
from pds_ray.store.storage import Folder
from tests.support.hand_made_set import scenes_set
from tests.support.hostile import encoded, tar_bytes

CONFIG = EvaluateConfig(test="scenes:60:7", backbones="small_conv", seeds=1)


def plan(path: Path, config: EvaluateConfig) -> evaluation.Evaluation:
    return evaluation.make_evaluation([Candidate("set", str(path), config.protocol)], config)


def test_val_is_never_test(tmp_path: Path) -> None:
    path = scenes_set(tmp_path / "set")
    with pytest.raises(ConfigError, match="chosen on the test split"):
        plan(path, replace(CONFIG, val="scenes:60:7"))
    assert plan(path, CONFIG).splits["val"].uri != CONFIG.test
    assert "val" not in plan(path, replace(CONFIG, protocol=ProtocolConfig(select="test"))).splits


@pytest.mark.parametrize("split", ["test", "val"])
def test_images_of_the_source_are_no_test(tmp_path: Path, split: str) -> None:
    made = plan(scenes_set(tmp_path / "a"), CONFIG).sets[0].distilled.manifest["about"]["source"]
    count = made.split(":")[1]
    with pytest.raises(ConfigError, match=f"--{split} .* holds images of {made}"):
        plan(scenes_set(tmp_path / "b"), replace(CONFIG, **{split: f"scenes:{count}"}))
    shards = catalog.make_source("scenes:10000").shards()
    with pytest.raises(ConfigError, match=f"--{split} .* holds images of the source"):
        evaluation.check(replace(CONFIG, **{split: "scenes:60"}), [CONFIG.protocol], shards)


@pytest.mark.parametrize(
    ("made_from", "test", "refused"),
    [
        ("AT/train/*.tar", "AT/train/00001.tar", True),
        ("AT/train/{00000..00001}.tar", "AT/train/*.tar", True),
        ("AT/train/*.tar", "AT/moved/00001.tar", True),  # its time came along
        ("AT/train/*.tar", "AT/test/*.tar", False),  # other images under the same name and time
        ("folder:AT/train", "AT/train", True),
        ("AT/train/*.tar", "folder:AT/train", True),
        ("AT/gone/*.tar", "AT/train/*.tar", False),  # tells nothing
    ],
)
def test_shards_of_the_source_are_no_test(
    tmp_path: Path, made_from: str, test: str, refused: bool
) -> None:
    image = encoded(Image.new("RGB", (8, 8)), "PNG")
    for name, count in (
        ("train/00000", 1),
        ("train/00001", 2),
        ("moved/00001", 2),
        ("test/00000", 20),
    ):
        members = [
            (f"{i}.{kind}", data)
            for i in range(count)
            for kind, data in (("png", image), ("txt", b"a"))
        ]
        path = tmp_path / f"{name}.tar"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(tar_bytes(members))
        os.utime(path, (1e9, 1e9))
    made = scenes_set(tmp_path / "set") / "manifest.json"
    manifest = json.loads(made.read_text())
    manifest["about"]["source"] = made_from.replace("AT", str(tmp_path))
    made.write_text(json.dumps(manifest))
    config = replace(CONFIG, test=test.replace("AT", str(tmp_path)))
    if refused:
        with pytest.raises(ConfigError, match="holds images of"):
            plan(made.parent, config)
    else:
        plan(made.parent, config)


def test_a_key_is_of_what_training_sees(tmp_path: Path) -> None:
    """Images, captions, seed, protocol, backbone and test; not the card, nor the folder."""
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


def test_only_missing_trials_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A further seed runs its trial alone; what is finished is never run again."""
    ran: list[list[int]] = []

    def run(trials: list, _sets: object, splits: dict, results: Folder, _config: object) -> None:
        ran.append([trial.seed for trial in trials])
        assert set(splits) == {"test", "val"}
        counts = {"images": 1, "captions": 1, "bad": {}}
        for trial in trials:
            recalls = dict.fromkeys(MEASURES, float(trial.seed))
            found = {"seed": trial.seed, "epoch": 0, "recalls": recalls, "seconds": 1.0}
            splits = {"test": counts, "val": counts}
            results.write_json(f"{trial.key}.json", {**found, "splits": splits})

    monkeypatch.setattr("pds_ray.distributed.evaluate.run_trials", run)
    monkeypatch.setattr("pds_ray.distributed.session.start", lambda *_: None)
    path = str(scenes_set(tmp_path / "set"))
    two = evaluation.evaluate(path, replace(CONFIG, seeds=2))
    files = {file: file.stat().st_mtime_ns for file in tmp_path.glob("set/evaluation/trials/*")}
    assert two == evaluation.evaluate(path, replace(CONFIG, seeds=2))
    three = evaluation.evaluate(path, replace(CONFIG, seeds=3))
    one = evaluation.evaluate(path, replace(CONFIG, seeds=1))
    assert ran == [[0, 1], [2]]
    trials = three["backbones"][0]["trials"]
    assert [trial["seed"] for trial in trials] == [0, 1, 2]
    assert trials[:2] == two["backbones"][0]["trials"]
    assert trials[:1] == one["backbones"][0]["trials"]
    assert len({one["file"], two["file"], three["file"]}) == 3
    assert {file: file.stat().st_mtime_ns for file in files} == files


def test_sets_that_do_not_differ_share_their_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class EnoughError(Exception):
        pass

    def run(trials: list, *_: object) -> None:
        assert [trial.seed for trial in trials] == [0]
        raise EnoughError

    monkeypatch.setattr("pds_ray.distributed.evaluate.run_trials", run)
    monkeypatch.setattr("pds_ray.distributed.session.start", lambda *_: None)
    path = str(scenes_set(tmp_path / "set"))
    twice = [Candidate(label, path, CONFIG.protocol) for label in "ab"]
    with pytest.raises(EnoughError):
        evaluation.evaluate_all(twice, CONFIG, Folder(str(tmp_path / "out")))

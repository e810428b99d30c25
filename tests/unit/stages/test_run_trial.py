"""Trials: what they depend on, which epoch they choose, how they are resumed, what they train."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from pds_ray.backbones.base import BackboneInfo
from pds_ray.config import ProtocolConfig
from pds_ray.recipes import protocol
from pds_ray.stages import trial as core
from pds_ray.stages.trial import TextInput, Trial, TrialData, run_trial, train_model
from pds_ray.training.data import Gallery, TrainingPairs
from pds_ray.training.loop import read_progress
from pds_ray.training.retrieval import evaluate
from pds_ray.training.two_towers import TwoTowers
from pds_ray.training.workers import Workers
from tests.support.tiny_training import (
    FEATURES,
    PIXELS,
    SIDE,
    TEXT_WIDTH,
    TinyBackbone,
    equal,
    make_data,
    make_model,
    weights,
    with_extras,
)

BRIEF = ProtocolConfig(epochs=5, batch_size=8, evaluate_every=2, select="test")


INFO = BackboneInfo("tiny", "tiny 1", SIDE, PIXELS.mean, PIXELS.std, pretrained=True)
TEXT = TextInput("prototypes", "x", "basic")


def train(
    model: TwoTowers,
    seed: int = 0,
    config: ProtocolConfig = BRIEF,
    data: TrialData | None = None,
    **options,
) -> dict:
    """Train `model` as the trial of a seed and a protocol would."""
    if data is None:
        pairs, test = make_data()
        data = TrialData(pairs, test, test)
    one = Trial("key", "set", INFO, SIDE, seed, config, TEXT, 20)
    return train_model(one, model, data, Workers(), **options)


def trained(
    seed: int = 0, config: ProtocolConfig = BRIEF, **options
) -> tuple[dict, dict[str, torch.Tensor]]:
    model = make_model()
    found = train(model, seed, config, **options)
    return found, weights(model)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_trial_depends_on_its_seed_alone(optimizer):
    config = replace(BRIEF, optimizer=optimizer, learning_rate=0.01)
    found, end = trained(3, config)
    torch.rand(17)  # the global generator is not asked
    again, end_again = trained(3, config)
    assert again == found
    assert equal(end, end_again)
    assert not equal(end, trained(4, config)[1])


def test_training_learns():
    """A model that has seen the gallery's own pairs finds them."""
    pairs, _ = make_data(pairs=16)
    known = Gallery(pairs.images, pairs.text, torch.arange(16))
    config = ProtocolConfig(
        epochs=100, batch_size=16, learning_rate=1e-2, augment=False, select="last"
    )
    found = train(make_model(), 0, config, TrialData(pairs, None, known))
    before = evaluate(make_model(), known, PIXELS, Workers())
    assert before["r_mean"] < 60
    assert found["recalls"]["r_mean"] > 95


# --- states


@pytest.mark.parametrize("sampling", ["epoch", "independent"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_resumed_trial_ends_with_the_same_bits(optimizer: str, sampling: str):
    config = replace(BRIEF, optimizer=optimizer, sampling=sampling, learning_rate=0.02, epochs=7)
    states: dict[int, bytes] = {}

    def keep(progress, save):
        states[progress.epochs_done] = save()

    found, end = trained(5, config, report=keep)
    assert list(states) == [1, 3, 5, 7]
    for state in states.values():
        model = make_model(seed=99)  # the weights that it begins with are replaced
        assert train(model, 5, config, state=state) == found
        assert equal(weights(model), end)


def test_a_trial_with_several_captions_and_soft_targets_is_resumed_exactly():
    pairs, test = make_data()
    data = TrialData(with_extras(pairs), test, test)
    states: list[bytes] = []
    found, end = trained(5, data=data, report=lambda _, save: states.append(save()))
    for state in states:
        model = make_model(seed=99)
        assert train(model, 5, data=data, state=state) == found
        assert equal(weights(model), end)
    one = replace(data.pairs, owner=None, text=pairs.text)
    assert not equal(trained(5, data=TrialData(one, test, test))[1], end)


def test_a_backbone_that_draws_by_itself_is_resumed_exactly():
    """Stochastic depth draws from torch's global generator, whose state nobody saves."""

    def with_dropout() -> TwoTowers:
        model = make_model()
        model.backbone = nn.Sequential(model.backbone, nn.Dropout(0.5))
        return model

    states: dict[int, bytes] = {}

    def keep(progress, save):
        states[progress.epochs_done] = save()

    whole, resumed = with_dropout(), with_dropout()
    train(whole, 5, report=keep)
    torch.manual_seed(12345)
    train(resumed, 5, state=states[3])
    assert equal(weights(resumed), weights(whole))


OTHERS = [
    "another name",
    "another shape",
    "no progress",
    "more progress",
    "more optimizer",
    "half of it",
]


@pytest.mark.parametrize("other", OTHERS)
def test_a_state_of_another_model_or_layout_counts_for_nothing(other: str):
    """States of another version, for example: the trial begins again and does not fail for ever."""
    states: list[bytes] = []
    train(make_model(seed=99), 5, report=lambda _, save: states.append(save()))
    state = states[1]
    tensors, metadata = load(state), {"progress": json.dumps(read_progress(state))}
    name = next(name for name in tensors if name.startswith("model/"))
    match other:
        case "another name":
            tensors[f"{name}.renamed"] = tensors.pop(name)
        case "another shape":
            tensors[name] = tensors[name][None]
        case "no progress":
            metadata = None
        case "more progress":
            metadata = {"progress": json.dumps({**json.loads(metadata["progress"]), "hours": 1})}
        case "more optimizer":
            tensors["optimizer/step/nobody.knows"] = torch.zeros(())
    damaged = save(tensors, metadata)
    if other == "half of it":
        damaged = damaged[: len(damaged) // 2]
    fresh, resumed = make_model(), make_model()
    assert train(resumed, 5, state=damaged) == train(fresh, 5)
    assert equal(weights(resumed), weights(fresh))
    if other == "no progress":
        whole = save(tensors, {"progress": json.dumps(read_progress(state))})
        continued = make_model(seed=99)
        train(continued, 5, state=whole)
        assert not equal(weights(continued), weights(fresh)), "a whole state would have counted"


# --- the epoch that is chosen


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch):
    """Replace measuring by given r_means of val and test by epoch; record what was asked for."""

    def install(val: dict[int, float], test: dict[int, float], config: ProtocolConfig):
        pairs, gallery = make_data()
        other = replace(gallery)
        regular = range(0, config.epochs, config.evaluate_every)
        epochs = iter(sorted({*regular, config.epochs - 1}))
        asked, at = [], {"epoch": -1}

        def fake(_model, split, *_rest):
            name, epoch = "val" if split is other else "test", at["epoch"]
            asked.append((name, epoch))
            return {"r_mean": {"val": val, "test": test}[name][epoch], "of": name, "epoch": epoch}

        update_best = core.update_best

        def counted(progress, epoch, *rest):
            at["epoch"] = epoch
            assert config.select == "last" or epoch == next(epochs)
            update_best(progress, epoch, *rest)

        monkeypatch.setattr(core, "evaluate", fake)
        monkeypatch.setattr(core, "update_best", counted)
        found = train(make_model(), 0, config, TrialData(pairs, other, gallery))
        return found, asked

    return install


VAL, TEST = {0: 10.0, 2: 30.0, 4: 30.0, 5: 20.0}, {0: 50.0, 2: 1.0, 4: 70.0, 5: 60.0}


def test_val_chooses_and_test_is_only_measured_then(measured):
    found, asked = measured(VAL, TEST, replace(BRIEF, select="val", epochs=6))
    assert (found["epoch"], found["score"]) == (2, 30.0), "the earlier of equals"
    assert found["recalls"] == {"r_mean": 1.0, "of": "test", "epoch": 2}
    assert asked == [("val", 0), ("test", 0), ("val", 2), ("test", 2), ("val", 4), ("val", 5)]


def test_the_best_epoch_on_test(measured):
    found, asked = measured(VAL, TEST, replace(BRIEF, select="test", epochs=6))
    assert (found["epoch"], found["score"], found["recalls"]["r_mean"]) == (4, 70.0, 70.0)
    assert asked == [("test", 0), ("test", 2), ("test", 4), ("test", 5)]


def test_the_last_epoch(measured):
    found, asked = measured(VAL, TEST, replace(BRIEF, select="last", epochs=6))
    assert (found["epoch"], found["recalls"]["r_mean"]) == (5, 60.0)
    assert asked == [("test", 5)]


def test_the_published_evaluations(measured):
    """Epochs 0, 10, ..., 100 of 101."""
    epochs = range(0, 101, 10)
    config = replace(protocol("paper").protocol, learning_rate=0.01)
    _, asked = measured({}, dict.fromkeys(epochs, 1.0), config)
    assert asked == [("test", epoch) for epoch in epochs]


# --- what is trained


def given_back(backbone: nn.Module, *_: object) -> nn.Module:
    return backbone


def trial(part: str, pretrained: bool = True, label: str = "set", **changes) -> Trial:
    info = replace(INFO, pretrained=pretrained)
    config = replace(BRIEF, train=part, augment=False, **changes)
    return Trial("key", label, info, SIDE, 0, config, TEXT, 20)


@pytest.mark.parametrize(
    ("part", "trained_parts"),
    [
        ("text_head", {"text_head"}),
        ("heads", {"text_head", "image_head"}),
        ("backbone", {"text_head", "backbone"}),
        ("all", {"text_head", "image_head", "backbone"}),
    ],
)
def test_exactly_the_named_parts_are_trained(
    monkeypatch: pytest.MonkeyPatch, part: str, trained_parts: set[str]
):
    torch.manual_seed(1)
    backbone = TinyBackbone()
    models: list[TwoTowers] = []
    starts: list[dict[str, torch.Tensor]] = []
    make = TwoTowers

    def kept(*args, **options) -> TwoTowers:
        models.append(make(*args, **options))
        starts.append(weights(models[0]))
        return models[0]

    monkeypatch.setattr("pds_ray.stages.trial.TwoTowers", kept)
    before = weights(backbone)
    pairs, test = make_data()
    run_trial(trial(part), TrialData(pairs, None, test), lambda *_: backbone)
    end = weights(models[0])
    changed = {
        name.split(".")[0] for name, value in end.items() if not torch.equal(value, starts[0][name])
    }
    unchanged = [name for name, value in end.items() if torch.equal(value, starts[0][name])]
    assert changed == trained_parts
    assert unchanged == []
    assert equal(weights(backbone), before) == ("backbone" not in trained_parts)


@pytest.mark.parametrize("part", ["text_head", "heads"])
def test_a_frozen_backbone_sees_each_image_once(part):
    """Once in all if it is pretrained; once per trial if the trial draws its weights."""
    pairs, test = make_data()
    val = make_data(7)[1]
    for pretrained, sweeps in ((True, 1), (False, 2)):
        backbone = TinyBackbone()
        built = Mock(side_effect=partial(given_back, backbone))
        features: dict = {}
        results = []
        for _ in range(2):
            data = TrialData(pairs, val, test)
            results.append(run_trial(trial(part, pretrained), data, built, features=features))
        assert backbone.seen == sweeps * (20 + 15 + 15)
        assert built.call_count == sweeps
        assert results[0] == results[1]
        other_set = TrialData(TrainingPairs(pairs.images.flip(0), pairs.text), val, test)
        other = trial(part, pretrained, "other")
        again = run_trial(other, other_set, built, features=features)
        alone = run_trial(other, other_set, built)
        assert again == alone, "features of another set were taken"


@pytest.mark.parametrize("part", ["text_head", "heads"])
def test_kept_features_give_what_the_backbone_in_the_loop_gives(part):
    """The same training written out with the frozen backbone inside the model."""
    pairs, test = make_data()
    torch.manual_seed(1)
    backbone = TinyBackbone()
    data = TrialData(pairs, None, test)
    found = run_trial(trial(part), data, lambda *_: copy.deepcopy(backbone))
    torch.manual_seed(1 << 32)
    model = TwoTowers(
        backbone.requires_grad_(False), FEATURES, TEXT_WIDTH, image_head=part == "heads"
    )
    expected = train_model(trial(part), model, data, Workers())
    assert found["epoch"] == expected["epoch"]
    assert found["recalls"] == pytest.approx(expected["recalls"])


def test_galleries_of_different_cleaning_do_not_share_features():
    """A rule of cleaning decides which images have a caption, hence the gallery."""
    pairs, test = make_data()
    fewer = Gallery(test.images[5:], test.text[10:], test.owner[10:] - 5)
    backbone = TinyBackbone()
    features: dict = {}
    build = partial(given_back, backbone)
    run_trial(trial("text_head"), TrialData(pairs, None, test), build, features=features)
    other = replace(trial("text_head"), text=TextInput("prototypes", "x", "paper"))
    found = run_trial(other, TrialData(pairs, None, fewer), build, features=features)
    assert found == run_trial(other, TrialData(pairs, None, fewer), build)


def test_the_heads_start_alike_whatever_the_backbone_draws(monkeypatch: pytest.MonkeyPatch):
    heads = []
    make = TwoTowers

    def kept(*args, **options) -> TwoTowers:
        model = make(*args, **options)
        heads.append(weights(model.text_head))
        return model

    monkeypatch.setattr("pds_ray.stages.trial.TwoTowers", kept)
    pairs, test = make_data()
    for draws in (0, 5):

        def build(*_args, draws=draws):
            torch.rand(draws)
            return TinyBackbone()

        run_trial(trial("text_head", epochs=1), TrialData(pairs, None, test), build)
    assert equal(*heads)

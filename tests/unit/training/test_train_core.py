"""Training against formulas written out, and what its randomness may depend on."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from pds_ray.backbones.base import BackboneInfo
from pds_ray.config import ProtocolConfig
from pds_ray.recipes import protocol
from pds_ray.stages.trial import TextInput, Trial, run_trial
from pds_ray.training import train as core
from pds_ray.training.train import Gallery, ResidualHead, TrainingPairs, TwoTowers, Workers
from tests.support.tiny_training import (
    FEATURES,
    PIXELS,
    SIDE,
    TEXT_WIDTH,
    TinyBackbone,
    make_data,
    make_model,
    weights,
)

CPU = torch.device("cpu")
BRIEF = ProtocolConfig(epochs=5, batch_size=8, evaluate_every=2, select="test")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) for name, value in one.items()
    )


# --- formulas


@given(st.integers(1, 7), st.integers(1, 5), st.integers(0, 2**31))
def test_the_loss_is_the_double_loop(pairs, width, seed):
    rng = np.random.default_rng(seed)
    image, text = (rng.normal(size=(pairs, width)) for _ in range(2))
    image, text = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (image, text))
    total = 0.0
    for i in range(pairs):
        own = math.exp(image[i] @ text[i] / 0.07)
        total -= math.log(own / sum(math.exp(image[i] @ text[j] / 0.07) for j in range(pairs)))
        total -= math.log(own / sum(math.exp(image[j] @ text[i] / 0.07) for j in range(pairs)))
    found = core.info_nce(torch.from_numpy(image), torch.from_numpy(text))
    assert found.item() == pytest.approx(total / (2 * pairs), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("with_dropout", [False, True])
def test_a_head_is_its_formula(with_dropout):
    """LayerNorm(a + mask * (W2 GELU(a) + c2)) with a = W1 x + c1, in matrices."""
    torch.manual_seed(0)
    head = ResidualHead(5, 9).double()
    nn.init.normal_(head.norm.weight)
    nn.init.normal_(head.norm.bias)
    x = np.random.default_rng(0).normal(size=(4, 5))
    mask = (
        np.random.default_rng(1).integers(0, 2, (4, 9)) / 0.9 if with_dropout else np.ones((4, 9))
    )
    of = {name: value.numpy() for name, value in head.state_dict().items()}
    a = x @ of["project.weight"].T + of["project.bias"]
    gelu = a * 0.5 * (1 + np.vectorize(math.erf)(a / math.sqrt(2)))
    y = a + mask * (gelu @ of["inner.weight"].T + of["inner.bias"])
    y = (y - y.mean(1, keepdims=True)) / np.sqrt(y.var(1, keepdims=True) + 1e-5)
    expected = y * of["norm.weight"] + of["norm.bias"]
    with torch.no_grad():
        found = head(torch.from_numpy(x), torch.from_numpy(mask) if with_dropout else None)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize(("width", "published"), [(1000, 1_772_000), (2304, 7_087_104)])
def test_a_head_has_the_published_size(width, published):
    assert (
        sum(parameter.numel() for parameter in ResidualHead(768, width).parameters()) == published
    )


def test_both_sides_are_unit_vectors_of_one_width():
    pairs, _ = make_data()
    for part in ("backbone", "all"):
        image, text = make_model(part)(PIXELS(pairs.images), pairs.text)
        assert image.shape == text.shape == (20, FEATURES)
        for rows in (image, text):
            torch.testing.assert_close(rows.norm(dim=1), torch.ones(20))


def test_pixels_are_normalised_channel_by_channel():
    pictures = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5), dtype=np.uint8)
    found = PIXELS(torch.from_numpy(pictures)).numpy()
    for channel, (mean, std) in enumerate(zip(PIXELS.mean, PIXELS.std, strict=True)):
        np.testing.assert_allclose(
            found[:, channel], (pictures[:, channel] / 255 - mean) / std, atol=1e-6
        )
    features = torch.randn(4, 7)
    assert PIXELS(features) is features


def test_the_published_schedule():
    paper = protocol("paper").protocol
    rates = [core.rate(paper, epoch, share) for epoch in range(101) for share in (0.0, 0.9)]
    assert rates == pytest.approx([0.2] * 2 * 51 + [0.02] * 2 * 50)


def test_the_cosine_falls_from_the_start_to_zero():
    config = ProtocolConfig(epochs=10, learning_rate=3e-3)
    rates = [core.rate(config, epoch, share) for epoch in range(10) for share in (0, 0.5)]
    assert rates[0] == 3e-3
    assert core.rate(config, 5, 0.0) == pytest.approx(1.5e-3)
    assert core.rate(config, 9, 1.0) == pytest.approx(0, abs=1e-12)
    assert (np.diff(rates) < 0).all()


def test_optimizers_are_those_of_the_protocol():
    model = make_model()
    sgd = core.make_optimizer(model, protocol("paper").protocol)
    assert isinstance(sgd, torch.optim.SGD)
    group = sgd.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]) == (
        0.2,
        0.9,
        5e-4,
        False,
    )
    adamw = core.make_optimizer(model, ProtocolConfig(learning_rate=0.3, weight_decay=0.2))
    assert isinstance(adamw, torch.optim.AdamW)
    assert (adamw.param_groups[0]["lr"], adamw.param_groups[0]["weight_decay"]) == (0.3, 0.2)


# --- batches


@given(st.integers(2, 400), st.integers(2, 130), st.integers(0, 99), st.integers(0, 99))
def test_an_epoch_has_every_pair_once(pairs, size, seed, epoch):
    steps = core.batches(pairs, size, "epoch", seed, epoch)
    assert len(steps) == math.ceil(pairs / size)
    assert sorted(torch.cat(steps).tolist()) == list(range(pairs))
    lengths = [len(step) for step in steps]
    assert max(lengths) <= size
    assert max(lengths) - min(lengths) <= 1


@given(st.integers(2, 400), st.integers(2, 130), st.integers(0, 99), st.integers(0, 99))
def test_independent_draws_are_fresh_permutations_cut(pairs, size, seed, epoch):
    steps = core.batches(pairs, size, "independent", seed, epoch)
    assert len(steps) == math.ceil(pairs / size)
    for step in steps:
        assert len(step) == min(pairs, size)
        assert len(set(step.tolist())) == len(step)
        assert 0 <= step.min() <= step.max() < pairs


@pytest.mark.parametrize(
    ("pairs", "published"), [(100, 100), (200, 87), (300, 81), (500, 69), (1000, 67)]
)
def test_share_of_the_pairs_that_independent_draws_see(pairs, published):
    shares = [
        len(torch.cat(core.batches(pairs, 128, "independent", 0, epoch)).unique()) / pairs
        for epoch in range(200)
    ]
    assert 100 * np.mean(shares) == pytest.approx(published, abs=1)


@pytest.mark.parametrize("sampling", ["epoch", "independent"])
def test_batches_differ_between_epochs_and_seeds_and_in_an_epoch(sampling):
    drawn = [
        tuple(torch.cat(core.batches(50, 20, sampling, seed, epoch)).tolist())
        for seed in range(3)
        for epoch in (0, 1)
    ]
    assert len(set(drawn)) == 6
    first, second, *_ = core.batches(50, 20, sampling, 0, 0)
    assert first.tolist() != second[: len(first)].tolist()
    assert (
        core.batches(50, 20, sampling, 1, 1)[2].tolist()
        == core.batches(50, 20, sampling, 1, 1)[2].tolist()
    )


def test_dropout_drops_a_tenth_and_keeps_the_mean():
    masks = core.dropout_masks(200, 300, core.generator("x"))
    assert masks.shape == (200, 2, 300)
    assert masks.unique().tolist() == pytest.approx([0.0, 1 / 0.9])
    assert (masks == 0).float().mean().item() == pytest.approx(0.1, abs=0.005)
    assert not torch.equal(masks[:, 0], masks[:, 1]), "the heads drop apart"


# --- augmentation


def test_the_middle_draw_changes_nothing():
    pictures = torch.rand(3, 3, 32, 32)
    torch.testing.assert_close(
        core.augment(pictures, torch.full((3, 3), 0.5)), pictures, atol=1e-5, rtol=0
    )


def test_augmentation_moves_but_never_mirrors_turns_or_recolours():
    """Dark left, light right, a gradient down, a constant channel: each stays so under any draw."""
    across = torch.where(torch.arange(64) < 32, 0.0, 1.0).expand(64, 64)
    down = torch.linspace(0, 1, 64)[:, None].expand(64, 64)
    picture = torch.stack([across, down, torch.full((64, 64), 0.3)]).expand(200, 3, 64, 64)
    moved = core.augment(picture, torch.rand(200, 3, generator=torch.Generator().manual_seed(0)))
    assert (moved[:, 0, :, :16] < 0.01).all()
    assert (moved[:, 0, :, -16:] > 0.99).all()
    assert (moved[:, 1].diff(dim=1) >= -1e-5).all()
    assert (moved[:, 1, :, 0] - moved[:, 1, :, -1]).abs().max() < 1e-5
    torch.testing.assert_close(moved[:, 2], picture[:, 2])
    changed = (moved[:, 0] - picture[:, 0]).abs().amax((1, 2))
    assert (changed > 0.05).float().mean() > 0.9, "pictures are moved"


@pytest.mark.parametrize(
    ("draws", "left", "right"), [([1.0, 0.5, 0.5], 16, 48), ([0.0, 0.5, 0.5], 16, 48)]
)
def test_a_picture_moves_by_at_most_a_twelfth(draws, left, right):
    """An edge in the middle of a picture of 64 moves by 0.08 of it, 5.12 pixels."""
    picture = torch.where(torch.arange(64) < 32, 0.0, 1.0).expand(1, 3, 64, 64)
    moved = core.augment(picture, torch.tensor([draws]))[0, 0, 32]
    assert (moved[:left] == 0).all()
    assert (moved[right:] == 1).all()
    shift = 32 - (64 - moved.sum().item())
    assert abs(shift) == pytest.approx(0.08 * 64, abs=0.05)


# --- trials


def trained(
    seed: int = 0, config: ProtocolConfig = BRIEF, **options
) -> tuple[dict, dict[str, torch.Tensor]]:
    pairs, test = make_data()
    model = make_model()
    found = core.train(model, pairs, test, test, PIXELS, config, seed, CPU, **options)
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
    found = core.train(make_model(), pairs, None, known, PIXELS, config, 0, CPU)
    before = core.judge(make_model(), known, PIXELS, CPU, Workers())
    assert before["r_mean"] < 60
    assert found["recalls"]["r_mean"] > 95


@pytest.mark.parametrize("sampling", ["epoch", "independent"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_resumed_trial_ends_with_the_same_bits(tmp_path: Path, optimizer: str, sampling: str):
    config = replace(BRIEF, optimizer=optimizer, sampling=sampling, learning_rate=0.02, epochs=7)
    states: list[Path] = []

    def keep(progress, save):
        folder = tmp_path / str(progress.epochs_done)
        folder.mkdir()
        save(folder)
        states.append(folder)

    found, end = trained(5, config, report=keep)
    assert [int(folder.name) for folder in states] == [1, 3, 5, 7]
    pairs, test = make_data()
    for folder in states:
        model = make_model(seed=99)  # what it begins with is replaced
        resumed = core.train(model, pairs, test, test, PIXELS, config, 5, CPU, resume=folder)
        assert resumed == found
        assert equal(weights(model), end)


def test_a_backbone_that_draws_by_itself_is_resumed_exactly(tmp_path: Path):
    """Stochastic depth draws from torch's global generator, whose state nobody saves."""
    pairs, test = make_data()

    def with_dropout() -> core.TwoTowers:
        model = make_model()
        model.backbone = nn.Sequential(model.backbone, nn.Dropout(0.5))
        return model

    def keep(progress, save):
        if progress.epochs_done == 3:
            save(tmp_path)

    whole = with_dropout()
    core.train(whole, pairs, test, test, PIXELS, BRIEF, 5, CPU, report=keep)
    resumed = with_dropout()
    torch.manual_seed(12345)
    core.train(resumed, pairs, test, test, PIXELS, BRIEF, 5, CPU, resume=tmp_path)
    assert equal(weights(resumed), weights(whole))


@pytest.mark.parametrize(
    "other", ["another name", "another shape", "no progress", "more progress", "more optimiser"]
)
def test_a_state_of_another_model_or_layout_counts_for_nothing(tmp_path: Path, other: str):
    """Such as another version's: the trial begins anew, and does not fail for ever."""
    pairs, test = make_data()

    def keep(_, save):
        save(tmp_path)

    core.train(make_model(seed=99), pairs, test, test, PIXELS, BRIEF, 5, CPU, report=keep)
    with safe_open(tmp_path / core.STATE, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
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
        case "more optimiser":
            tensors["optimizer/step/nobody.knows"] = torch.zeros(())
    save_file(tensors, tmp_path / core.STATE, metadata)
    fresh, resumed = make_model(), make_model()
    found = core.train(fresh, pairs, test, test, PIXELS, BRIEF, 5, CPU)
    assert core.train(resumed, pairs, test, test, PIXELS, BRIEF, 5, CPU, resume=tmp_path) == found
    assert equal(weights(resumed), weights(fresh))


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch):
    """Judges that say what they are told: r_mean of val and test by epoch; records whom they were asked about."""

    def install(val: dict[int, float], test: dict[int, float], config: ProtocolConfig):
        pairs, gallery = make_data()
        other = replace(gallery)
        asked, epochs = (
            [],
            iter(sorted({*range(0, config.epochs, config.evaluate_every), config.epochs - 1})),
        )
        at = {"epoch": -1}

        def fake(_model, split, *_rest):
            name = "val" if split is other else "test"
            asked.append((name, at["epoch"]))
            return {
                "r_mean": {"val": val, "test": test}[name][at["epoch"]],
                "of": name,
                "epoch": at["epoch"],
            }

        consider = core.consider

        def counted(progress, epoch, *rest):
            at["epoch"] = epoch
            assert config.select == "last" or epoch == next(epochs)
            consider(progress, epoch, *rest)

        monkeypatch.setattr(core, "judge", fake)
        monkeypatch.setattr(core, "consider", counted)
        found = core.train(make_model(), pairs, other, gallery, PIXELS, config, 0, CPU)
        return found, asked

    return install


VAL, TEST = {0: 10.0, 2: 30.0, 4: 30.0, 5: 20.0}, {0: 50.0, 2: 1.0, 4: 70.0, 5: 60.0}


def test_val_chooses_and_test_is_only_told(judged):
    found, asked = judged(VAL, TEST, replace(BRIEF, select="val", epochs=6))
    assert (found["epoch"], found["score"]) == (2, 30.0), "the earlier of equals"
    assert found["recalls"] == {"r_mean": 1.0, "of": "test", "epoch": 2}
    assert asked == [("val", 0), ("test", 0), ("val", 2), ("test", 2), ("val", 4), ("val", 5)]


def test_the_best_epoch_on_test(judged):
    found, asked = judged(VAL, TEST, replace(BRIEF, select="test", epochs=6))
    assert (found["epoch"], found["score"], found["recalls"]["r_mean"]) == (4, 70.0, 70.0)
    assert asked == [("test", 0), ("test", 2), ("test", 4), ("test", 5)]


def test_the_last_epoch(judged):
    found, asked = judged(VAL, TEST, replace(BRIEF, select="last", epochs=6))
    assert (found["epoch"], found["recalls"]["r_mean"]) == (5, 60.0)
    assert asked == [("test", 5)]


def test_the_published_evaluations(judged):
    """Epochs 0, 10, ..., 100 of 101."""
    epochs = range(0, 101, 10)
    config = replace(protocol("paper").protocol, learning_rate=0.01)
    _, asked = judged({}, dict.fromkeys(epochs, 1.0), config)
    assert asked == [("test", epoch) for epoch in epochs]


def test_judging_leaves_the_model_as_it_was():
    _, test = make_data()
    model = make_model().train()
    before = weights(model)
    core.judge(model, test, PIXELS, CPU, Workers())
    assert model.training
    assert equal(weights(model), before)


# --- what is trained


def given_back(backbone: nn.Module, *_: object) -> nn.Module:
    return backbone


def trial(part: str, pretrained: bool = True, label: str = "set", **changes) -> Trial:
    info = BackboneInfo("tiny", "tiny 1", SIDE, (0.5, 0.4, 0.3), (0.5, 0.6, 0.7), pretrained)
    config = replace(BRIEF, train=part, augment=False, **changes)
    return Trial("key", label, info, SIDE, 0, config, TextInput("prototypes", "x", "basic"), 20)


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
    run_trial(trial(part), lambda *_: backbone, pairs, None, test, CPU)
    end = weights(models[0])
    changed = {
        name.split(".")[0] for name, value in end.items() if not torch.equal(value, starts[0][name])
    }
    unchanged = [name for name, value in end.items() if torch.equal(value, starts[0][name])]
    assert changed == trained_parts
    assert unchanged == []
    assert equal(weights(backbone), before) == ("backbone" not in trained_parts)


@pytest.mark.parametrize("part", ["text_head", "heads"])
def test_a_frozen_backbone_sees_each_picture_once(part):
    """Once in all where it is pretrained, once a trial where its weights are the trial's own; so often it is built."""
    pairs, test = make_data()
    val = make_data(7)[1]
    for pretrained, sweeps in ((True, 1), (False, 2)):
        backbone = TinyBackbone()
        built = Mock(side_effect=partial(given_back, backbone))
        features: dict = {}
        results = []
        for _ in range(2):
            results.append(
                run_trial(trial(part, pretrained), built, pairs, val, test, CPU, features=features)
            )
        assert backbone.seen == sweeps * (20 + 15 + 15)
        assert built.call_count == sweeps
        assert results[0] == results[1]
        other_set = TrainingPairs(pairs.images.flip(0), pairs.text)
        again = run_trial(
            trial(part, pretrained, "other"), built, other_set, val, test, CPU, features=features
        )
        alone = run_trial(trial(part, pretrained, "other"), built, other_set, val, test, CPU)
        assert again == alone, "features of another set were taken"


@pytest.mark.parametrize("part", ["text_head", "heads"])
def test_kept_features_give_what_the_backbone_in_the_loop_gives(part):
    """The same training written out with the frozen backbone inside the model."""
    pairs, test = make_data()
    torch.manual_seed(1)
    backbone = TinyBackbone()
    found = run_trial(trial(part), lambda *_: copy.deepcopy(backbone), pairs, None, test, CPU)
    torch.manual_seed(1 << 32)
    model = TwoTowers(
        backbone.requires_grad_(False), FEATURES, TEXT_WIDTH, image_head=part == "heads"
    )
    expected = core.train(model, pairs, None, test, PIXELS, trial(part).protocol, 0, CPU)
    assert found["epoch"] == expected["epoch"]
    assert found["recalls"] == pytest.approx(expected["recalls"])


def test_galleries_of_different_cleaning_do_not_share_features():
    """A rule of cleaning decides which pictures have a caption, hence which make the gallery."""
    pairs, test = make_data()
    fewer = Gallery(test.images[5:], test.text[10:], test.owner[10:] - 5)
    backbone = TinyBackbone()
    features: dict = {}
    run_trial(trial("text_head"), lambda *_: backbone, pairs, None, test, CPU, features=features)
    other = replace(trial("text_head"), text=TextInput("prototypes", "x", "paper"))
    found = run_trial(other, lambda *_: backbone, pairs, None, fewer, CPU, features=features)
    assert found == run_trial(other, lambda *_: backbone, pairs, None, fewer, CPU)


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

        run_trial(trial("text_head", epochs=1), build, pairs, None, test, CPU)
    assert equal(*heads)

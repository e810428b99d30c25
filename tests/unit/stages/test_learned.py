"""Learned parts in trials: which of them fit, what training does with them; captions for people."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from pds_ray.backbones.base import BackboneInfo
from pds_ray.config import EvaluateConfig, ProtocolConfig
from pds_ray.engine import evaluate as evaluation
from pds_ray.recipes import protocol
from pds_ray.stages.learned import Use, nearest_captions, obstacles, use
from pds_ray.stages.trial import Candidate, TextInput, Trial, TrialData, train_model
from pds_ray.store.learned import Learned, unpack
from pds_ray.training.data import Pixels
from pds_ray.training.losses import SOFT_LOSSES
from pds_ray.training.workers import Workers
from tests.support.hand_made_set import (
    backbone,
    demo_encoder,
    learned_file,
    learned_tensors,
    scenes_set,
)
from tests.support.tiny_training import (
    PIXELS,
    SIDE,
    equal,
    make_data,
    make_model,
    weights,
)

SGD = ProtocolConfig(optimizer="sgd", weight_decay=5e-4)
ENCODER = "the demo CLIP"


def parts_of(**changes: object) -> Learned:
    about = {"text_encoder_identity": ENCODER, **changes}
    return unpack(learned_file(learned_tensors(3), **about))[0]


def other_backbone(**changes: object) -> BackboneInfo:
    return replace(backbone(), name="other", identity="other 1", **changes)


def used(learned: Learned, config: ProtocolConfig, model: BackboneInfo, encoder: str) -> set[str]:
    return {*use(learned, config, model, encoder).parts}


ALL = {"images", "text", "similarity", "steps"}


@pytest.mark.parametrize(
    ("missing", "about", "config", "model", "encoder"),
    [
        (set(), {}, {}, backbone(), ENCODER),
        ({"steps"}, {}, {}, other_backbone(), ENCODER),
        ({"steps", "images"}, {}, {}, other_backbone(image_size=32), ENCODER),
        ({"steps"}, {}, {"image_size": 64}, other_backbone(image_size=32), ENCODER),
        ({"images"}, {}, {"image_size": 32}, backbone(), ENCODER),
        ({"text"}, {}, {}, backbone(), "another"),
        (set(), {}, {"text": "prototypes"}, backbone(), ENCODER),
        ({"text"}, {}, {"captions_per_image": "all"}, backbone(), ENCODER),
        ({"similarity"}, {}, {"targets": "soft"}, backbone(), ENCODER),
        ({"similarity"}, {"loss": "info_nce"}, {}, backbone(), ENCODER),
        ({"steps"}, {}, {"optimizer": "adamw"}, backbone(), ENCODER),
        ({"steps"}, {}, {"train": "heads"}, backbone(), ENCODER),
        ({"steps"}, {"train": "heads"}, {}, backbone(), ENCODER),
        ({"steps"}, {"train": "heads"}, {"train": "text_head"}, backbone(), ENCODER),
        (set(), {}, {"train": "backbone"}, backbone(), ENCODER),
        (set(), {"train": "heads"}, {"train": "heads"}, backbone(), ENCODER),
        ({"steps"}, {"train": "lora"}, {}, backbone(), ENCODER),
        (ALL, {}, {"learned": "off"}, backbone(), ENCODER),
    ],
)
def test_a_trial_uses_what_fits(
    missing: set[str], about: dict, config: dict, model: BackboneInfo, encoder: str
) -> None:
    learned, wanted = parts_of(**about), replace(SGD, **config)
    assert used(learned, wanted, model, encoder) == ALL - missing
    if wanted.learned == "auto":
        against = obstacles(learned, wanted, model, encoder)
        assert {part for part, reason in against.items() if reason} == missing


def test_a_use_has_the_loss_the_rates_and_the_pixels_of_the_set() -> None:
    learned = parts_of()
    found = use(learned, SGD, backbone(), ENCODER)
    assert learned.step_sizes is not None
    assert (found.loss, found.rates) == ("wbce", tuple(map(float, learned.step_sizes)))
    assert found.pixels == Pixels(backbone().mean, backbone().std)
    assert use(learned, replace(SGD, learned="off"), backbone(), ENCODER) == Use()
    assert use(None, SGD, backbone(), ENCODER) == Use()
    without = Learned(learned.about, learned.text)
    assert used(without, SGD, backbone(), ENCODER) == {"images", "text"}


# --- training


def trained(data: TrialData, how: Use, config: ProtocolConfig) -> tuple[dict, dict]:
    info = BackboneInfo("tiny", "tiny 1", SIDE, PIXELS.mean, PIXELS.std, pretrained=True)
    trial = Trial("key", "set", info, SIDE, 0, config, TextInput("captions", "x", "basic"), 20, how)
    model = make_model()
    found = train_model(trial, model, data, Workers())
    return found, weights(model)


BRIEF = ProtocolConfig(epochs=3, batch_size=8, select="last", optimizer="sgd", learning_rate=0.05)


def test_similarity_of_ones_on_the_diagonal_is_training_on_hard_pairs() -> None:
    pairs, test = make_data()
    hard, end = trained(TrialData(pairs, None, test), Use(), BRIEF)
    learned = replace(pairs, similarity=torch.eye(len(pairs.images)))
    found, same = trained(TrialData(learned, None, test), Use(("similarity",), "ence"), BRIEF)
    assert found["recalls"] == hard["recalls"]
    for name, value in end.items():
        torch.testing.assert_close(same[name], value, atol=1e-6, rtol=0)


def test_a_step_has_the_targets_of_its_own_pairs() -> None:
    """One step of plain SGD on a batch of 8 of 20: the weights move by the hand-written wBCE."""
    pairs, test = make_data()
    draw = torch.Generator().manual_seed(1)
    targets = 1.4 * torch.rand(20, 20, generator=draw) - 0.2  # some below 0, some above 1
    assert targets.min() < 0
    assert targets.max() > 1
    config = replace(BRIEF, epochs=1, augment=False, momentum=0.0, weight_decay=0.0)
    seen: list[torch.Tensor] = []
    how = Use(("similarity",), "wbce")

    def by_hand(logits: torch.Tensor, similarity: torch.Tensor) -> torch.Tensor:
        seen.append(similarity)
        likely = torch.sigmoid(logits)
        losses = {True: [], False: []}
        for i in range(len(logits)):
            for j in range(len(logits)):
                s, p = similarity[i, j], likely[i, j]
                entropy = -s * torch.log(p + 1e-6) - (1 - s) * torch.log(1 - p + 1e-6)
                losses[bool(s > 0.5)].append(entropy)
        return sum(torch.stack(part).sum() / (len(part) + 1e-6) for part in losses.values()) / 2

    data = TrialData(replace(pairs, similarity=targets), None, test)
    _, end = trained(data, how, config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SOFT_LOSSES, "wbce", by_hand)
        _, expected = trained(data, how, config)
    assert [len(block) for block in seen] == [7, 7, 6]
    values = {round(v, 6) for v in targets.flatten().tolist()}
    assert {round(v, 6) for block in seen for v in block.flatten().tolist()} <= values
    diagonals = torch.cat([block.diagonal() for block in seen]).sort().values
    torch.testing.assert_close(diagonals, targets.diagonal().sort().values)
    for name, value in expected.items():
        torch.testing.assert_close(end[name], value, atol=1e-5, rtol=1e-4)


def test_learned_steps_are_the_rates_of_the_branches() -> None:
    """Equal steps are the protocol's rate; a tiny one of images leaves that branch in its place."""
    pairs, test = make_data()
    data = TrialData(pairs, None, test)
    _, end = trained(data, Use(), BRIEF)
    _, same = trained(data, Use(("steps",), rates=(0.05, 0.05)), BRIEF)
    assert equal(end, same)
    before = weights(make_model())
    _, half = trained(data, Use(("steps",), rates=(1e-12, 0.05)), BRIEF)
    for name, value in half.items():
        stays = torch.allclose(value, before[name], atol=1e-8)
        assert stays == (not name.startswith("text_head")), name


def test_float_images_are_trained_on_as_they_are() -> None:
    """Normalised images as float give the weights that the same pixels as bytes do."""
    pairs, test = make_data()
    learned = replace(pairs, images=PIXELS(pairs.images))
    _, end = trained(TrialData(pairs, None, test), Use(), BRIEF)
    _, same = trained(TrialData(learned, None, test), Use(("images",), pixels=PIXELS), BRIEF)
    assert equal(end, same)


def test_images_of_another_normalisation() -> None:
    pairs, _ = make_data()
    other = Pixels((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    found = PIXELS.of(other(pairs.images), other)
    torch.testing.assert_close(found, PIXELS(pairs.images), atol=1e-5, rtol=1e-5)
    same = other(pairs.images)
    assert PIXELS.of(same, PIXELS) is same


# --- keys and notes


CONFIG = EvaluateConfig(test="scenes:20:7", seeds=1, backbones="small_conv,small_vit")


def keys(path: Path, **changes: object) -> dict[str, str]:
    wanted = replace(protocol("standard").protocol, **changes)
    plan = evaluation.make_evaluation([Candidate("set", str(path), wanted)], CONFIG)
    return {trial.backbone.name: trial.key for trial in plan.trials}


def test_keys_know_what_is_used_and_nothing_else(tmp_path: Path) -> None:
    tensors = learned_tensors(12)
    plain = scenes_set(tmp_path / "plain")
    learned = scenes_set(tmp_path / "learned", learned=learned_file(tensors))
    changed = {**tensors, "text": tensors["text"] + 1}
    other = scenes_set(tmp_path / "other", learned=learned_file(changed))
    hard = keys(plain)
    assert keys(plain, learned="off") == hard
    assert keys(learned, learned="off") == hard, "without them it is any other set of such pairs"
    for one, another in ((hard, keys(learned)), (hard, keys(other)), (keys(learned), keys(other))):
        assert not {*one.values()} & {*another.values()}
    assert keys(learned, image_size=32) != keys(learned)


def test_notes_say_what_is_not_used_and_why(tmp_path: Path) -> None:
    path = scenes_set(tmp_path, learned=learned_file(learned_tensors(12, 32)))
    wanted = protocol("standard").protocol
    for settings, lines in (
        (
            {},
            [
                "learned images not used with small_conv: it takes 64 pixels, they have 32",
                "learned steps not used with small_vit: they are those of small_conv",
            ],
        ),
        ({"learned": "off"}, ["learned parts are not used: images, text, similarity, steps"]),
    ):
        candidate = Candidate("set", str(path), replace(wanted, **settings))
        plan = evaluation.make_evaluation([candidate], CONFIG)
        notes = evaluation._unused(plan.sets[0], plan.trials)
        assert all(any(note.startswith(line) for note in notes) for line in lines), notes
    assert demo_encoder().identity in {checked.text.encoder for checked in plan.sets}


# --- captions


@pytest.mark.parametrize("at_once", [1, 2**24])
def test_nearest_captions_are_those_of_a_loop_over_all(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pds_ray.stages.learned.COSINES_AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(40, 5)).astype(np.float32)
    captions = [f"caption {number % 30}" for number in range(40)]  # ten are there twice
    vectors[30:] = vectors[:10]
    queries = rng.normal(size=(7, 5)).astype(np.float32)
    cuts = [0, 3, 3, 25, 38, 40]
    shards = [(captions[a:b], vectors[a:b]) for a, b in pairwise(cuts)]
    table = nearest_captions(queries, shards, 4)
    for row, query in zip(table.to_pylist(), queries, strict=True):
        cosines = {
            caption: float(vector @ query / np.linalg.norm(vector) / np.linalg.norm(query))
            for caption, vector in zip(captions, vectors, strict=True)
        }
        expected = sorted(cosines, key=lambda caption: -cosines[caption])[:4]
        assert row["learned_captions"] == expected
        assert row["learned_cosines"] == pytest.approx([cosines[c] for c in expected], abs=1e-6)


def test_fewer_captions_than_asked_for() -> None:
    queries = np.eye(2, dtype=np.float32)
    table = nearest_captions(queries, [(["a", "b", "a"], np.eye(2, dtype=np.float32)[[0, 1, 0]])])
    assert table.column("learned_captions").to_pylist() == [["a", "b"], ["b", "a"]]

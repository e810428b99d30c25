"""Splits, images and averages of an evaluation, against Pillow, numpy and counting."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pds_ray import catalog, load_distilled
from pds_ray.backbones.base import BackboneInfo
from pds_ray.config import ConfigError, EvaluateConfig, ProtocolConfig
from pds_ray.engine import evaluate as evaluation
from pds_ray.engine import trial_keys
from pds_ray.modalities.image import Preprocess
from pds_ray.recipes import protocol
from pds_ray.sources.base import SourceError
from pds_ray.sources.scenes import ScenesSource
from pds_ray.stages import trial as core
from pds_ray.stages.trial import (
    Candidate,
    Split,
    TextInput,
    Trial,
    average,
    over_sets,
    pixels_of,
    read_split,
    subjects,
    summarize,
)
from tests.support.hand_made_set import save_set, scenes_set

RECALLS = ("tr@1", "tr@5", "tr@10", "ir@1", "ir@5", "ir@10", "r_mean")


def png(width: int, height: int, seed: int) -> tuple[Image.Image, bytes]:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return Image.fromarray(pixels), stream.getvalue()


def squashed(size: int) -> Preprocess:
    return Preprocess(size, resize_mode="squash")


def test_a_split_of_scenes():
    source = ScenesSource("scenes:9:3")
    (shard,) = source.shards()
    images, captions, bad = read_split(source, shard, list(map(squashed, (32, 64))), "none")
    samples = list(source.read(shard))
    assert captions == [list(sample.captions) for sample in samples]
    assert bad == {}
    assert {size: rows.shape for size, rows in images.items()} == {
        squashed(32): (9, 3, 32, 32),
        squashed(64): (9, 3, 64, 64),
    }
    for row, sample in enumerate(samples):
        image = Image.open(io.BytesIO(sample.image)).convert("RGB")
        for size in (32, 64):
            expected = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)).transpose(
                2, 0, 1
            )
            assert np.array_equal(images[squashed(size)][row], expected)


def test_bad_samples_are_counted_and_left_out(tmp_path: Path):
    wide, wide_bytes = png(90, 30, 1)
    tall, tall_bytes = png(20, 80, 2)
    _, thin_bytes = png(40, 1, 3)
    members = [
        ("a.png", wide_bytes), ("a.txt", b"A wide one!"),
        ("b.png", b"no image"), ("b.txt", b"broken"),
        ("c.png", wide_bytes),  # no caption
        ("d.txt", b"no image"),
        ("e.png", thin_bytes), ("e.txt", b"too thin"),
        ("f.png", wide_bytes), ("f.txt", b" !!! "),  # blank once cleaned by the paper's rule
        ("g.png", tall_bytes), ("g.json", json.dumps({"captions": ["one.", "  ", "TWO"]}).encode()),
    ]  # fmt: skip
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    source = catalog.make_source(str(tmp_path / "0.tar"))
    images, captions, bad = read_split(source, source.shards()[0], [squashed(48)], "paper")
    assert captions == [["a wide one"], ["one", "two"]]
    assert bad == {
        "undecodable_image": 1,
        "missing_caption": 2,
        "missing_image": 1,
        "image_too_small": 1,
    }
    for row, image in enumerate((wide, tall)):
        expected = np.asarray(image.resize((48, 48), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        assert np.array_equal(images[squashed(48)][row], expected), "squashed, not cropped"
    images, captions, bad = read_split(source, source.shards()[0], [squashed(48)], "none")
    assert len(captions) == len(images[squashed(48)]) == 3


@pytest.mark.parametrize(("keep", "said"), [(0.6, "truncated_shard"), (None, "cannot be opened")])
def test_a_shard_that_is_not_whole_ends_the_evaluation(
    tmp_path: Path, keep: float | None, said: str
):
    """Recalls of fewer images than the split has would look better than they are."""
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(4):
            for name, data in ((f"{number}.png", png(9, 9, number)[1]), (f"{number}.txt", b"one")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    source = catalog.make_source(str(path))
    (shard,) = source.shards()
    if keep is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: int(keep * 4 * 2048)])
    with pytest.raises(SourceError, match=said):
        read_split(source, shard, [squashed(8)], "none")


def test_each_image_has_a_limit_of_its_own():
    entered = []

    @contextmanager
    def limit():
        entered.append("begun")
        yield
        entered.append("ended")

    source = ScenesSource("scenes:3:3")
    read_split(source, source.shards()[0], [squashed(32)], "none", limit)
    assert entered == ["begun", "ended"] * 3


def test_images_of_a_set_are_squashed_the_same_way(tmp_path: Path):
    images = [png(50, 20, seed)[0] for seed in range(3)]
    distilled = load_distilled(str(save_set(tmp_path, images, ["a", "b", "c"], np.eye(3))))
    found = core.set_images(distilled, squashed(40))
    expected = [
        np.asarray(image.resize((40, 40), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        for image in images
    ]
    assert np.array_equal(found, np.stack(expected))


def test_all_captions_leave_no_image_without(tmp_path: Path):
    """A caption of which cleaning leaves nothing is none, unless it is the last of its image."""
    path = save_set(tmp_path, [png(9, 9, seed)[0] for seed in range(3)], ["a", "-", "b"], np.eye(3))
    distilled = load_distilled(str(path))
    distilled.records[0]["captions"] = ["a", "-", "c"]
    captions, owner = core.all_captions(distilled, lambda text: text.replace("-", ""))
    assert list(zip(captions, owner.tolist(), strict=True)) == [
        ("a", 0),
        ("c", 0),
        ("", 1),
        ("b", 2),
    ]


@given(st.integers(2, 60))
def test_val_and_test_of_one_source_share_no_image(images):
    whole, val, test = (
        Split("x", ScenesSource("scenes:1"), [], part).chosen(images)
        for part in ("", "val", "test")
    )
    assert whole.all()
    assert len(whole) == len(val) == len(test) == images
    assert (val ^ test).all(), "each image in exactly one"
    assert val.sum() == -(-images // 5)


def test_one_image_cannot_choose_the_epoch_and_be_the_test():
    source = ScenesSource("scenes:1")
    assert Split("x", source, []).chosen(1).all()
    with pytest.raises(ConfigError, match=r"^1 image of x can be used: .* give --val SOURCE, or"):
        Split("x", source, [], "test").chosen(1)


def test_pixels_are_normalised_as_the_protocol_says():
    info = BackboneInfo("x", "x", 8, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), pretrained=False)
    trial = Trial(
        "k", "set", info, 8, 0, protocol("paper").protocol, TextInput("prototypes", "e", "paper"), 3
    )
    published = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    paper = pixels_of(trial)
    assert (paper.mean, paper.std) == published
    own = pixels_of(replace(trial, protocol=ProtocolConfig()))
    assert (own.mean, own.std) == (info.mean, info.std)


# --- averages


def random_trials(rng: np.random.Generator, seeds: int) -> list[dict]:
    return [
        {"recalls": {name: float(rng.uniform(0, 100)) for name in RECALLS}} for _ in range(seeds)
    ]


@given(st.integers(0, 2**31), st.integers(1, 6))
def test_mean_and_population_deviation_over_seeds(seed, seeds):
    trials = random_trials(np.random.default_rng(seed), seeds)
    found = summarize(trials)
    for name in RECALLS:
        values = [trial["recalls"][name] for trial in trials]
        mean = sum(values) / seeds
        assert found["mean"][name] == pytest.approx(mean)
        assert found["std"][name] == pytest.approx(
            (sum((value - mean) ** 2 for value in values) / seeds) ** 0.5
        )


@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 4))
def test_the_average_backbone_is_averaged_seed_by_seed(seed, seeds, backbones):
    rng = np.random.default_rng(seed)
    trials = [random_trials(rng, seeds) for _ in range(backbones)]
    found = average(trials)
    for name in RECALLS:
        table = np.array([[trial["recalls"][name] for trial in of_one] for of_one in trials])
        assert found["mean"][name] == pytest.approx(table.mean())
        assert found["std"][name] == pytest.approx(table.mean(axis=0).std(ddof=0), abs=1e-9)


def test_backbones_of_different_seeds_cannot_be_averaged():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="shorter"):
        average([random_trials(rng, 3), random_trials(rng, 2)])


# --- keys of trials


CONFIG = EvaluateConfig(test="scenes:20:7", backbones="small_vit,small_mixer", seeds=2)


def planned(
    path: Path, config: EvaluateConfig = CONFIG, label: str = "a", **changes
) -> evaluation.Evaluation:
    candidate = Candidate(label, str(path), replace(config.protocol, **changes))
    return evaluation.make_evaluation([candidate], replace(config, protocol=candidate.protocol))


def keys(plan: evaluation.Evaluation) -> list[str]:
    return [trial.key for trial in plan.trials]


def test_one_trial_per_backbone_and_seed(tmp_path: Path):
    plan = planned(scenes_set(tmp_path))
    described = [(trial.backbone.name, trial.seed, trial.image_size) for trial in plan.trials]
    assert described == [
        (name, seed, 64) for name in ("small_vit", "small_mixer") for seed in (0, 1)
    ]
    assert len(set(keys(plan))) == 4


def test_what_a_trial_depends_on_is_in_its_key(tmp_path: Path):
    first, moved, other = (
        scenes_set(tmp_path / name, seed=seed) for name, seed in (("1", 0), ("2", 0), ("3", 5))
    )
    known = set(keys(planned(first)))
    same = [
        planned(moved, label="another name"),
        planned(first, replace(CONFIG, workers=2, trials=3, max_failures=0, save_every_s=0)),
        planned(first, text_encoder="demo"),
    ]
    for plan in same:
        assert set(keys(plan)) == known
    more = keys(planned(first, replace(CONFIG, seeds=3)))
    assert known < set(more)
    assert len(more) == 6
    different = [
        planned(other),
        planned(first, replace(CONFIG, test="scenes:20:8")),
        planned(first, replace(CONFIG, test="scenes:21:7")),
        planned(first, replace(CONFIG, val="scenes:20:9")),
        *[
            planned(first, **change)
            for change in (
                {"epochs": 3}, {"train": "heads"}, {"captions": "paper"}, {"image_size": 32},
                {"learning_rate": 1e-4}, {"select": "test"}, {"text": "prototypes"},
                {"augment": False}, {"batch_size": 4}, {"fit": "crop"}, {"subjects": "caption"},
            )
        ],
    ]  # fmt: skip
    found = [frozenset(keys(plan)) for plan in different]
    assert len(set(found)) == len(different)
    assert not any(known & one for one in found)


def test_the_validation_split_of_a_source_is_used(tmp_path: Path):
    splits = planned(scenes_set(tmp_path)).splits
    assert (splits["test"].uri, splits["test"].part) == ("scenes:20:7", "")
    assert splits["val"].uri == ScenesSource("scenes:20:7").validation
    assert splits["val"].part == ""
    assert set(planned(tmp_path, select="test").splits) == {"test"}


def test_a_source_without_validation_is_divided(tmp_path: Path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number in range(7):
            for name, data in (
                (f"{number}.png", png(8, 8, number)[1]),
                (f"{number}.txt", b"a caption"),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    splits = planned(
        scenes_set(tmp_path / "set"), replace(CONFIG, test=str(tmp_path / "0.tar"))
    ).splits
    assert {name: (split.uri, split.part) for name, split in splits.items()} == {
        "test": (str(tmp_path / "0.tar"), "test"),
        "val": (str(tmp_path / "0.tar"), "val"),
    }


def test_each_set_may_choose_its_epoch_its_own_way(tmp_path: Path):
    """One of them by val is enough for a val split; the trials of the others stay as they are."""
    folder = str(scenes_set(tmp_path))
    on_test = EvaluateConfig(test="scenes:20:7", seeds=1, protocol=ProtocolConfig(select="test"))
    by_val = replace(on_test.protocol, select="val")
    plan = evaluation.make_evaluation(
        [Candidate("a", folder, on_test.protocol), Candidate("b", folder, by_val)], on_test
    )
    assert set(plan.splits) == {"val", "test"}
    alone = keys(evaluation.make_evaluation([Candidate("a", folder, on_test.protocol)], on_test))
    assert [trial.key for trial in plan.trials if trial.label == "a"] == alone
    assert not set(alone) & {trial.key for trial in plan.trials if trial.label == "b"}


def test_deviations_within_sets_and_between_them():
    rng = np.random.default_rng(0)
    values = rng.normal(40, 3, (3, 5))  # three sets, five seeds of each
    sets = [
        summarize([{"recalls": dict.fromkeys(RECALLS, v)} for v in of_set]) for of_set in values
    ]
    found = over_sets(sets)
    assert found["mean"]["r_mean"] == pytest.approx(values.mean())
    assert found["std"]["ir@5"] == pytest.approx(np.mean([np.std(row) for row in values]))
    assert found["set_std"]["tr@1"] == pytest.approx(np.std(values.mean(axis=1)))
    assert over_sets(sets[:1]) == sets[0], "one set: the figures of that set, bit for bit"


def test_images_with_the_same_first_caption_show_one_subject():
    owner = np.array([1, 0, 1, 2, 2, 3])
    captions = ["a ball", "a cube", "red", "a ball", "blue", "A ball"]
    first = ["a cube", "a ball", "a ball", "A ball"]
    found = subjects(captions, owner, 4)
    for one in range(4):
        for other in range(4):
            assert (found[one] == found[other]) == (first[one] == first[other])


def test_a_cropped_split_keeps_the_aspect(tmp_path: Path):
    """The middle square of the image, scaled."""
    wide, wide_bytes = png(90, 30, 1)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, data in (("a.png", wide_bytes), ("a.txt", b"one")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    source = catalog.make_source(str(tmp_path / "0.tar"))
    square = planned(scenes_set(tmp_path / "set"), fit="crop", image_size=30).trials[0].square
    images, _, _ = read_split(source, source.shards()[0], [square], "none")
    expected = np.asarray(wide)[:, 30:60].transpose(2, 0, 1)
    assert np.array_equal(images[square][0], expected)


def test_keys_are_those_of_before_an_option_came(tmp_path: Path):
    """An option of a protocol that came later, at its default, is no part of a trial's key."""
    (trial, *_) = planned(scenes_set(tmp_path)).trials
    known = trial_keys._of_key(trial.protocol)
    later = {*trial_keys.LATER, trial_keys.OF_USE}
    assert later == {*dataclasses.asdict(trial.protocol)} - {*known}
    assert [*trial_keys._of_key(ProtocolConfig(fit="crop"))] == [*known, "fit"]


@pytest.mark.parametrize(
    ("protocol", "line"),
    [
        ({"targets": "soft"}, "has no soft targets; make it with --extras.similarity"),
        ({"captions_per_image": "all"}, "has one caption per image; make it with --extras.capt"),
        ({"captions_per_image": "all", "text": "prototypes"}, "a pair has one text prototype"),
    ],
)
def test_what_a_set_does_not_hold_is_not_trained_on(tmp_path: Path, protocol: dict, line: str):
    with pytest.raises(ConfigError, match=line):
        planned(scenes_set(tmp_path), **protocol)

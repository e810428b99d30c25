"""The inputs of an optimisation against the images and captions that they are made from."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pds_ray import catalog
from pds_ray.config import ConfigError, DistillConfig, RunConfig
from pds_ray.distillers.base import settled
from pds_ray.sources.base import Sample, Shard
from pds_ray.stages import optimise_inputs as inputs
from pds_ray.stages.experts import WantedExperts
from pds_ray.stages.learned import nearest_captions
from pds_ray.stages.optimise import optimise
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.storage import Folder
from pds_ray.training.loop import generator
from tests.support.tiny_experts import MadeUpEncoder, begin, build, train, wanted
from tests.support.tiny_training import PIXELS, SIDE, TEXT_WIDTH

PAIRS = 6
CPU = torch.device("cpu")
FEW = {"iterations": 2, "steps": 2, "batch_size": 4, "max_start": 1, "step_rate": 1e-5}


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> WantedExperts:
    made = wanted(tmp_path_factory.mktemp("experts"), epochs=1)
    begin(made)
    for number in range(made.config.count):
        train(made, number)
    return made


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run folder with PAIRS images of random pixels."""
    run = RunFolder(Folder(str(tmp_path)))
    for pair in range(PAIRS):
        pixels = np.random.default_rng(pair).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        run.images.write_bytes(run.image_name(pair), file.getvalue())
    return run


def captions(experts: WantedExperts) -> list[str]:
    return experts.store.captions(experts.shards[0].name)[:PAIRS]


def config_of(method: str, **changes: object) -> RunConfig:
    defaults = catalog.distiller(method).DEFAULTS
    return RunConfig(method=method, distill=settled(DistillConfig(**{**FEW, **changes}), defaults))


def prepared(method: str, experts: WantedExperts, folder: RunFolder) -> inputs.Prepared:
    given = (config_of(method), experts, folder, captions(experts))
    return inputs.prepare(*given, MadeUpEncoder(), build, CPU)


def test_the_start_has_the_pixels_and_the_vectors_of_the_pairs(
    experts: WantedExperts, folder: RunFolder
) -> None:
    start = prepared("bi_trajectory", experts, folder).start
    for pair in range(PAIRS):
        image = Image.open(folder.folder.full(f"images/{folder.image_name(pair)}"))
        expected = (np.asarray(image) / 255 - np.array(PIXELS.mean)) / np.array(PIXELS.std)
        found = start.images[pair].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert start.text.tolist() == MadeUpEncoder().encode_captions(captions(experts)).tolist()


def test_an_image_of_learned_pixels_is_the_one_they_began_as(
    experts: WantedExperts, folder: RunFolder
) -> None:
    made = prepared("mdm", experts, folder)
    for pair, pixels in enumerate(made.start.images.numpy()):
        image = Image.open(folder.folder.full(f"images/{folder.image_name(pair)}"))
        assert (np.asarray(inputs.as_image(pixels, made.about)) == np.asarray(image)).all()
    outside = np.full((3, SIDE, SIDE), 9.0, np.float32)
    outside[0] = -9
    assert inputs.as_image(outside, made.about).getpixel((0, 0)) == (0, 255, 255)


def test_a_real_batch_has_images_of_the_source_with_captions_of_their_own(
    experts: WantedExperts,
) -> None:
    draw = inputs.real_batches(experts, 5, CPU)
    images, text = draw(generator("batch", 0))
    every = inputs.load_pairs(experts, pixels=True)
    assert every.owner is not None
    whole = experts.pixels(every.images)
    for image, vector in zip(images, text, strict=True):
        (row,) = torch.nonzero((whole == image).flatten(1).all(1)).flatten().tolist()
        own = every.text[every.owner == row]
        assert (own == vector).all(1).any()
    again, _ = draw(generator("batch", 0))
    assert torch.equal(again, images)


def test_the_captions_of_the_store_are_those_of_its_vectors(experts: WantedExperts) -> None:
    shards = [(experts.store.captions(s.name), s.name) for s in experts.shards]
    for texts, name in shards:
        vectors = experts.store.read(experts.store.data, name)["text"].numpy()
        assert vectors.tolist() == MadeUpEncoder().encode_captions(texts).tolist()
    wished = [texts[0] for texts, _ in shards]
    parts = ((texts, MadeUpEncoder().encode_captions(texts)) for texts, _ in shards)
    found = nearest_captions(MadeUpEncoder().encode_captions(wished), parts, 1)
    assert [names[0] for names in found.column("learned_captions").to_pylist()] == wished


@pytest.mark.parametrize("method", ["bi_trajectory", "lors", "mdm"])
def test_a_set_is_improved_from_experts_of_a_store(
    method: str, experts: WantedExperts, folder: RunFolder
) -> None:
    made = prepared(method, experts, folder)
    found = optimise(made.problem, catalog.distiller(method), made.start)
    learned, images = inputs.learned(made.about, found.tensors)
    assert images.shape == (PAIRS, 3, SIDE, SIDE)
    assert learned.text.shape == (PAIRS, TEXT_WIDTH)
    assert (learned.similarity is not None) == (method == "lors")
    assert (learned.step_sizes is None) == (method == "mdm")
    assert not np.array_equal(images, made.start.images.numpy())
    assert learned.about.loss == ("wbce" if method == "lors" else "info_nce")


def test_a_learned_start_is_gone_on_with_by_models_of_its_kind(
    experts: WantedExperts, folder: RunFolder
) -> None:
    made = prepared("lors", experts, folder)
    images, text = made.start.images + 2, made.start.text * 3
    tensors = {"images": images, "text": text, "similarity": torch.eye(PAIRS) / 2}
    begun = inputs.learned(made.about, tensors)
    begun[1].flags.writeable = False  # as it comes through Ray; torch warns of it
    given = (config_of("lors"), experts, folder, captions(experts), MadeUpEncoder(), build, CPU)
    start = inputs.prepare(*given, begun).start
    assert start.similarity is not None
    assert torch.equal(start.images, images)
    assert torch.equal(start.text, text)
    assert torch.equal(start.similarity, torch.eye(PAIRS) / 2)
    other = replace(begun[0], about=replace(made.about, text_encoder_identity="another"))
    assert torch.equal(inputs.prepare(*given, (other, begun[1])).start.text, made.start.text)


def test_experts_of_other_tensors_are_refused(experts: WantedExperts, folder: RunFolder) -> None:
    of_heads = wanted(Path(experts.store.folder.path), train="backbone", epochs=1)
    with pytest.raises(ConfigError, match="trained with other tensors than the student"):
        prepared("lors", of_heads, folder)


def test_a_validation_scores_what_was_learned(experts: WantedExperts, folder: RunFolder) -> None:
    made, config = prepared("lors", experts, folder), config_of("lors")
    gallery = inputs.held_out(config, experts, experts.source, MadeUpEncoder())
    assert len(gallery.images) == 20
    score = inputs.validation(config, experts, gallery, made.about, build)
    tensors = {"images": made.start.images, "text": made.start.text}
    first = score(tensors)
    assert 0 < first < 100
    assert score(tensors) == first, "the same set has the same score"
    shuffled = {**tensors, "text": made.start.text.roll(1, 0)}
    assert score(shuffled) != first


def test_a_validation_split_without_images_is_refused(experts: WantedExperts) -> None:
    class Empty:
        uri = "empty"

        def shards(self) -> list[Shard]:
            return [Shard("0", "")]

        def read(self, _shard: Shard) -> Iterator[Sample]:
            yield Sample("a", b"no image", ("two",))

    with pytest.raises(ConfigError, match="no image of empty, the validation split, can be used"):
        inputs.held_out(config_of("lors"), experts, Empty(), MadeUpEncoder())


@pytest.mark.parametrize(
    ("train", "sizes", "optimizer", "rates"),
    [
        ("all", [0.25, 0.5], "sgd", (0.25, 0.5)),
        ("all", None, "adamw", None),
        ("lora", [0.25, 0.5], "adamw", None),  # rates of adapters train no whole backbone
    ],
)
def test_a_validation_trains_at_learned_step_sizes_where_they_are_its_own(
    experts: WantedExperts,
    folder: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
    train: str,
    sizes: list[float] | None,
    optimizer: str,
    rates: tuple[float, float] | None,
) -> None:
    made, config = prepared("lors", experts, folder), config_of("lors")
    judged = replace(experts, config=replace(experts.config, train=train))
    seen: list[inputs.Trial] = []

    def run(trial: inputs.Trial, *_: object) -> dict[str, dict[str, float]]:
        seen.append(trial)
        return {"recalls": {"tr@1": 3.0, "ir@1": 5.0}}

    monkeypatch.setattr(inputs, "run_trial", run)
    about = replace(made.about, train=train)
    gallery = inputs.held_out(config, experts, experts.source, MadeUpEncoder())
    tensors = {"images": made.start.images, "text": made.start.text}
    if sizes:
        tensors["step_sizes"] = torch.tensor(sizes)
    assert inputs.validation(config, judged, gallery, about, build)(tensors) == 4
    (trial,) = seen
    assert (trial.protocol.optimizer, trial.use.rates) == (optimizer, rates)
    assert trial.protocol.weight_decay == (5e-4 if optimizer == "sgd" else 0.05)

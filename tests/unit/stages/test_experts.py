"""Experts: what a snapshot is, that a training goes on to the bit, and what is refused."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name everybody knows

from pds_ray import catalog
from pds_ray.backbones.base import BackboneInfo
from pds_ray.config import ConfigError
from pds_ray.sources.base import Fault, Sample, Shard
from pds_ray.stages import expert_data
from pds_ray.stages import experts as core
from pds_ray.stages.experts import WantedExperts
from pds_ray.store.expert_store import ExpertStoreError, open_experts
from pds_ray.store.flat import Layout
from pds_ray.training.lora import Adapted
from pds_ray.training.two_towers import TwoTowers
from pds_ray.training.workers import Workers
from tests.support.tiny_experts import MadeUpEncoder, begin, build, files, train, wanted
from tests.support.tiny_training import FEATURES, SIDE, TEXT_WIDTH, TinyBackbone


@pytest.fixture
def experts(tmp_path: Path) -> WantedExperts:
    made = wanted(tmp_path / "store")
    begin(made)
    return made


# ---- images and captions


def test_pairs_are_the_images_and_captions_of_the_source(experts: WantedExperts):
    pairs = expert_data.load_pairs(experts)
    samples = [s for shard in experts.shards for s in experts.source.read(shard)]
    images = [
        np.asarray(Image.open(io.BytesIO(s.image)).convert("RGB").resize((SIDE, SIDE), 3))
        for s in samples
    ]
    captions = [" ".join(caption.split()) for s in samples for caption in s.captions]
    assert pairs.images.shape == (20, 3, SIDE, SIDE)
    difference = pairs.images.int() - torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2)).int()
    assert difference.abs().max() <= 1
    assert pairs.text.tolist() == MadeUpEncoder().encode_captions(captions).tolist()
    assert pairs.owner is not None
    assert pairs.owner.tolist() == [n for n, s in enumerate(samples) for _ in s.captions]


class Hostile:
    """A shard of good samples between bad ones, cut off at its end."""

    uri, validation = "hostile", None

    def shards(self) -> list[Shard]:
        return [Shard("0", "")]

    def read(self, _shard: Shard) -> Iterator[Sample | Fault]:
        image = io.BytesIO()
        Image.new("RGB", (9, 9), "red").save(image, "PNG")
        good = image.getvalue()
        yield Sample("a", good, ("one",))
        yield Sample("b", b"no image", ("two",))
        yield Sample("c", good, ("three", "poison"))
        yield Fault("d", "missing_image", "")
        yield Sample("e", good, ("  ", "four"))
        yield Fault("", "truncated_shard", "cut")


class NotFinite(MadeUpEncoder):
    def encode_captions(self, captions: list[str]) -> np.ndarray:
        found = super().encode_captions(captions)
        found[[caption == "poison" for caption in captions], 2] = np.nan
        return found


def test_bad_samples_are_counted_and_kept_out(tmp_path: Path):
    source = Hostile()
    experts = replace(wanted(tmp_path), source=source, shards=source.shards())
    counts = expert_data.prepare_shard(experts, source.shards()[0], NotFinite)
    bad = {"undecodable_image": 1, "missing_image": 1, "truncated_shard": 1}
    assert counts == {"images": 2, "captions": 2, "bad": {**bad, "nonfinite_embedding": 1}}
    pairs = expert_data.load_pairs(experts)
    assert pairs.owner is not None
    assert pairs.owner.tolist() == [0, 1]
    assert pairs.text.tolist() == MadeUpEncoder().encode_captions(["one", "four"]).tolist()


def test_too_few_images_are_refused(tmp_path: Path):
    experts = wanted(tmp_path, "scenes:1")
    expert_data.prepare_shard(experts, experts.shards[0], MadeUpEncoder)
    with pytest.raises(ConfigError, match="1 images of scenes:1 can be used; experts need at lea"):
        expert_data.load_pairs(experts)


@pytest.mark.parametrize("images", [20, 8, 3])
def test_images_are_estimated_by_the_first_shard(tmp_path: Path, images: int):
    experts = wanted(tmp_path, f"scenes:{images}:0:0:8")
    assert expert_data.estimate_images(experts.source, experts.shards) == images
    unknown = [replace(shard, size=0) for shard in experts.shards]
    assert expert_data.estimate_images(experts.source, unknown) == min(8, images) * len(unknown)


# ---- snapshots


def test_snapshots_are_the_weights_at_each_moment(experts: WantedExperts):
    """The first are the initial ones, and none is a view of weights that are trained on."""
    initial = core.build_model(experts, 0, core.build_backbone(experts, 0, build), FEATURES)
    layout = Layout.of(initial)
    before = core.take_snapshot(layout, initial)
    kept = before.theta.clone(), before.phi.clone()
    train(experts, 0)
    found = open_experts(experts.store, 1, 3)
    assert found.names == ["000"]
    assert found.layout == layout
    snapshots = [found.snapshot("000", epoch) for epoch in range(4)]
    assert torch.equal(snapshots[0].theta, kept[0])
    assert torch.equal(snapshots[0].phi, kept[1])
    for one, other in itertools.combinations(snapshots, 2):
        assert not torch.equal(one.theta, other.theta)
        assert not torch.equal(one.phi, other.phi)
    with torch.no_grad():
        for parameter in initial.parameters():
            parameter.add_(1)
    assert torch.equal(before.theta, kept[0])
    assert torch.equal(before.phi, kept[1])


def test_a_snapshot_has_the_tensors_of_both_branches_by_name(experts: WantedExperts):
    train(experts, 0)
    file = load_file(Path(experts.store.expert("000").path) / "001.safetensors")
    snapshot = open_experts(experts.store, 1, 3).snapshot("000", 1)
    model = core.build_model(experts, 0, TinyBackbone(), FEATURES)
    names = [name for name, _ in model.named_parameters()]
    text = [name for name in names if name.startswith("text_head.")]
    image = [name for name in names if name not in text]
    assert sorted(file) == sorted([f"image/{n}" for n in image] + [f"text/{n}" for n in text])
    assert torch.equal(
        snapshot.theta, torch.cat([file[f"image/{name}"].flatten() for name in image])
    )
    assert torch.equal(snapshot.phi, torch.cat([file[f"text/{name}"].flatten() for name in text]))


def test_a_step_is_plain_gradient_descent_with_a_rate_per_branch(tmp_path: Path):
    """One batch of all images, without augmentation; dropout as the masks of the step say."""
    from pds_ray.training.loop import generator, seed_of
    from pds_ray.training.losses import info_nce
    from pds_ray.training.two_towers import dropout_masks

    experts = wanted(
        tmp_path, "scenes:5", epochs=1, momentum=0.0, augment=False, text_learning_rate=0.3
    )
    begin(experts)
    train(experts, 1)
    found = open_experts(replace(experts, config=experts.config).store, 0, 1)
    model = core.build_model(experts, 1, core.build_backbone(experts, 1, build), FEATURES)
    pairs, seed = expert_data.load_pairs(experts), seed_of(3, "expert", 1)
    order = torch.randperm(5, generator=generator(seed, "batches", 0))
    assert pairs.owner is not None
    counts, first = pairs.owner.bincount(), torch.searchsorted(pairs.owner, torch.arange(5))
    drawn = (
        torch.rand(5, generator=generator(seed, "captions", 0, 0)).double() * counts[order]
    ).long()
    masks = dropout_masks(5, FEATURES, generator(seed, "dropout", 0, 0))
    shape = (1, 3, 1, 1)
    mean, std = (torch.tensor(v).view(shape) for v in (experts.pixels.mean, experts.pixels.std))
    images = (pairs.images[order] / 255 - mean) / std
    image = F.normalize(model.image_head(model.backbone(images), masks[:, 0]), dim=1)
    text = F.normalize(model.text_head(pairs.text[first[order] + drawn], masks[:, 1]), dim=1)
    info_nce(image, text).backward()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            rate = 0.3 if name.startswith("text_head.") else 0.1
            weight.sub_(rate * weight.grad)
    expected = core.take_snapshot(Layout.of(model), model)
    after = found.snapshot("001", 1)
    torch.testing.assert_close(after.theta, expected.theta, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(after.phi, expected.phi, rtol=1e-5, atol=1e-6)


def test_experts_differ_unless_they_start_alike(tmp_path: Path):
    own, same = wanted(tmp_path / "own"), wanted(tmp_path / "same", shared_start=True, epochs=1)
    for experts, alike in ((own, False), (same, True)):
        begin(experts)
        for number in range(2):
            train(experts, number)
        found = open_experts(experts.store, 2, 1)
        first, second = (found.snapshot(name, 0) for name in found.names)
        assert torch.equal(first.theta, second.theta) == alike
        assert torch.equal(first.phi, second.phi) == alike
        first, second = (found.snapshot(name, 1) for name in found.names)
        assert not torch.equal(first.theta, second.theta), "they see the images in other orders"


@pytest.mark.parametrize(
    ("part", "image"),
    [("all", ["backbone", "image_head"]), ("backbone", ["backbone"]), ("heads", ["image_head"])],
)
def test_the_parts_that_are_trained(tmp_path: Path, part: str, image: list[str]):
    experts = wanted(tmp_path, train=part)
    begin(experts)
    train(experts, 0)
    layout = open_experts(experts.store, 1, 3).layout
    assert list(dict.fromkeys(e.name.partition(".")[0] for e in layout.image)) == image
    assert {entry.name.partition(".")[0] for entry in layout.text} == {"text_head"}
    # a student with pixels has the tensors of the experts, whether these saw features or pixels
    student = core.build_model(experts, 0, core.build_backbone(experts, 0, build), FEATURES)
    assert Layout.of(student) == layout


def build_real(info: BackboneInfo, image_size: int) -> nn.Module:
    return catalog.build_backbone(info, image_size)


def test_adapters_are_trained_on_one_frozen_base(tmp_path: Path):
    """A base that is drawn, as here, is one for all experts and the student, as a pretrained is."""
    info = catalog.describe_backbone("small_vit")
    experts = replace(
        wanted(tmp_path, train="lora", rank=2, epochs=1, image_size=16), backbone=info
    )
    about = core.describe_model(experts, build_real)
    experts.store.begin(experts.made_from(), about)
    for shard in experts.shards:
        expert_data.prepare_shard(experts, shard, MadeUpEncoder)
    pairs = expert_data.load_pairs(experts)

    def model(number: int) -> TwoTowers:
        backbone = core.build_backbone(experts, number, build_real)
        return core.build_model(experts, number, backbone, about["width"])

    trained = [model(number) for number in range(2)]
    for number, one in enumerate(trained):
        core.train_expert(experts, number, one, pairs, Workers())
    found = open_experts(experts.store, 2, 1)
    factors = {f"backbone.{n}" for n in adapted_factors(trained[0].backbone)}
    assert {entry.name for entry in found.layout.image} == factors
    assert {e.name for e in found.layout.text} == {
        f"text_head.{name}" for name, _ in trained[0].text_head.named_parameters()
    }
    torch.manual_seed(0)
    student = model(0)
    found.layout.check(Layout.of(student), "the student")
    learned = factors | {entry.name for entry in found.layout.text}
    base = {n: t for n, t in student.state_dict().items() if n not in learned}
    for one in trained:  # after their training
        state = one.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in base.items())
    first, second = (found.snapshot(name, 0) for name in found.names)
    assert torch.equal(first.theta, second.theta)
    assert not torch.equal(first.phi, second.phi)
    first, second = (found.snapshot(name, 1) for name in found.names)
    assert not torch.equal(first.theta, second.theta)
    # what an expert computes is what base and snapshot compute
    found.layout.load(student, second)
    images = experts.pixels(pairs.images[:3])
    with torch.no_grad():
        assert torch.equal(student.embed_images(images), trained[1].embed_images(images))


def adapted_factors(backbone: nn.Module | None) -> list[str]:
    assert backbone is not None
    layers = (name for name, part in backbone.named_modules() if isinstance(part, Adapted))
    return [f"{name}.{factor}" for name in layers for factor in ("down", "up")]


def test_adapters_of_a_backbone_without_blocks_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="adapters need a vision transformer"):
        core.describe_model(wanted(tmp_path, train="lora"), build)


def test_a_frozen_backbone_gives_its_features_once(tmp_path: Path):
    experts = wanted(tmp_path, train="heads")
    begin(experts)
    pairs = expert_data.load_pairs(experts)
    shards = [experts.store.read(experts.store.data, shard.name) for shard in experts.shards]
    pixels = experts.pixels(torch.cat([shard["images"] for shard in shards]))
    for number in range(2):  # one backbone for all experts, though its weights are random
        expected = core.build_backbone(experts, number, build)(pixels)
        torch.testing.assert_close(pairs.images, expected.detach(), rtol=1e-5, atol=1e-6)


# ---- going on


class Killed(Exception):  # noqa: N818 - no error of the package
    pass


def dying(function: Callable[..., Any], at: int) -> Callable[..., Any]:
    """Return the function, whose call of a number raises instead."""
    calls = itertools.count()

    def call(*args: object) -> Any:
        if next(calls) == at:
            raise Killed
        return function(*args)

    return call


@pytest.mark.parametrize("moment", ["snapshot", "state", "manifest", "step"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_killed_training_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, momentum: float
):
    """Killed in the middle of an epoch, or between any two files of its end, then once more."""
    whole, killed = (wanted(tmp_path / name, momentum=momentum) for name in ("whole", "killed"))
    begin(whole)
    train(whole, 1)
    begin(killed)
    method = {"snapshot": "save_snapshot", "state": "save_state", "manifest": "save_snapshots"}
    for at in (2, 1):  # the call that does not return, in each life
        with monkeypatch.context() as patch:
            tell = lambda _epochs: None  # noqa: E731
            if moment == "step":
                tell = dying(tell, at)
            else:
                kind = type(killed.store)
                patch.setattr(kind, method[moment], dying(getattr(kind, method[moment]), at))
            with pytest.raises(Killed):
                train(killed, 1, tell)
    train(killed, 1)
    assert files(killed, "001") == files(whole, "001")
    before = files(killed, "001")
    train(killed, 1)
    assert files(killed, "001") == before


def test_a_training_without_its_state_begins_afresh(experts: WantedExperts):
    train(experts, 0)
    before = files(experts, "000")
    (Path(experts.store.expert("000").path) / "state.safetensors").write_bytes(b"half of a state")
    train(experts, 0)
    assert files(experts, "000") == before


def test_more_epochs_extend_an_expert(experts: WantedExperts):
    """They are those that a longer training would have had, where the rates stay."""
    short = replace(experts, config=replace(experts.config, epochs=1))
    assert short.made_from() == experts.made_from()
    train(short, 0)
    assert experts.missing() == {"000": 2, "001": 3}
    train(experts, 0)
    train(experts, 1)
    assert experts.missing() == {}
    assert [len(losses) for losses in core.losses(experts)] == [3, 3]
    extended = files(experts, "000")
    (Path(experts.store.expert("000").path) / "state.safetensors").unlink()
    train(experts, 0)
    assert files(experts, "000") == extended
    falling = [replace(e, config=replace(e.config, schedule="step")) for e in (short, experts)]
    assert falling[0].made_from() != falling[1].made_from()


# ---- refusals


def test_experts_made_from_anything_else_are_refused(experts: WantedExperts):
    experts.store.check(experts.made_from())
    other = {
        "backbone": replace(experts, backbone=replace(experts.backbone, identity="tiny 2")),
        "text encoder": replace(experts, encoder=replace(experts.encoder, identity="other")),
        "source": replace(experts, shards=experts.shards[:1]),
        "train": replace(experts, config=replace(experts.config, train="backbone")),
        "seed": replace(experts, seed=4),
        "reading": replace(experts, read=replace(experts.read, captions="paper")),
        "learning rate": replace(experts, config=replace(experts.config, learning_rate=0.2)),
        "image size": replace(experts, config=replace(experts.config, image_size=8)),
    }
    for what, changed in other.items():
        with pytest.raises(ExpertStoreError, match=f"are of another {what} .*; give another --exp"):
            experts.store.check(changed.made_from())
    free = {"store": "elsewhere", "count": 9, "epochs": 9, "cpus": 2, "gpus": 0.5, "rank": 8}
    for name, value in free.items():
        changed = replace(experts, config=replace(experts.config, **{name: value}))
        experts.store.check(changed.made_from())


class Normalised(TinyBackbone):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(FEATURES)


def test_a_backbone_with_batch_statistics_is_refused_unless_frozen(tmp_path: Path):
    def normalised(_info: object, _size: int) -> nn.Module:
        return Normalised()

    for part in ("all", "backbone"):
        with pytest.raises(ConfigError, match="backbone tiny normalises over the batch"):
            core.describe_model(wanted(tmp_path, train=part), normalised)
    frozen = core.describe_model(wanted(tmp_path, train="heads"), normalised)
    assert frozen["width"] == FEATURES


def test_a_training_that_diverges_keeps_the_snapshots_before(experts: WantedExperts):
    wild = replace(experts, config=replace(experts.config, learning_rate=1e38, momentum=0.9))
    with pytest.raises(ConfigError, match="expert 000 diverged in epoch 1"):
        train(wild, 0)
    assert experts.store.epochs("000") == 0


@pytest.mark.parametrize("part", ["all", "heads"])
def test_bytes_that_are_needed_are_those_that_are_written(tmp_path: Path, part: str):
    """All but the heads of files and the manifests, which take some kB."""
    experts = wanted(tmp_path / "store", train=part)
    about = core.describe_model(experts, build)
    assert about["text_width"] == TEXT_WIDTH
    sizes = core.weights_of(about)
    model = core.build_model(experts, 0, core.build_backbone(experts, 0, build), FEATURES)
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    assert sum(sizes.values()) == sum(trained)
    needed = core.needed_bytes(experts, about, 20)
    begin(experts)
    for number in range(2):
        train(experts, number)
    written = sum(path.stat().st_size for path in (tmp_path / "store").rglob("*.safetensors"))
    captions = expert_data.load_pairs(experts).text.shape[0] * (4 * TEXT_WIDTH + 8)
    heads = 16 * 1500 + len(trained) * 150 * 10
    assert 0 <= written - captions - needed <= heads
    assert core.needed_bytes(experts, about, 20) == 0

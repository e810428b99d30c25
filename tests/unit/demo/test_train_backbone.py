"""Pretraining a small backbone: classes that are seen, the same bytes, features that hold them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pds_ray import catalog
from pds_ray.demo import train_backbone
from pds_ray.demo.data import to_signed
from pds_ray.demo.scene_reader import read_scene
from pds_ray.sources.scenes import COLORS, SHAPES, ScenesSource

TINY = "--source scenes:40:3 --holdout scenes:20:4 --steps 4 --batch-size 16 --checkpoint-every 2"


def pretrain(folder: Path, extra: str = "", options: str = TINY) -> Path:
    out = folder / "backbone.safetensors"
    assert train_backbone.main([*options.split(), "--out", str(out), *extra.split()]) == 0
    return out


def test_the_labels_are_what_is_seen_in_the_images_of_the_source():
    """Shapes and colours as another program reads them from the pixels."""
    data = train_backbone.draw_labelled("scenes:40:5")
    source = ScenesSource("scenes:40:5")
    names = [(kind, color) for kind in SHAPES for color in COLORS]
    for index, (pixels, labels) in enumerate(zip(data.pixels, data.labels, strict=True)):
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        assert source.scene(index).ground in " ".join(source.sample(index).captions)
        read = {(shape.kind, shape.color) for shape in read_scene(image).shapes}
        assert {names[number] for number in labels.nonzero().flatten().tolist()} == read


@pytest.mark.parametrize("backbone", ["small_conv", "small_vit", "small_mixer"])
def test_the_file_loads_and_depends_on_the_seed_alone(backbone, tmp_path):
    files = [
        pretrain(tmp_path / name, f"--backbone {backbone} --seed {seed}")
        for name, seed in (("one", 0), ("again", 0), ("other", 1))
    ]
    one, again, other = (file.read_bytes() for file in files)
    assert one == again
    assert one != other
    network = catalog.build_backbone(catalog.describe_backbone(f"{backbone}:{files[0]}"), 64)
    assert network(torch.zeros(2, 3, 64, 64)).shape[0] == 2


def test_other_settings_and_another_source_are_one_line(tmp_path, capsys):
    out = ["--out", str(pretrain(tmp_path))]
    assert train_backbone.main([*TINY.split(), "--batch-size", "8", *out]) == 2
    assert "other settings" in capsys.readouterr().err
    assert train_backbone.main(["--source", "pictures", *out]) == 2
    assert "not a scenes source" in capsys.readouterr().err


@pytest.mark.parametrize("seen", [{0}, {0, 5}, {3, 7, 40}])
def test_found_classes_are_counted(seen):
    labels = torch.zeros(1, 48)
    labels[0, list(seen)] = 1
    data = train_backbone.LabelledImages(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), labels)

    def found(logits: torch.Tensor) -> float:
        return train_backbone.measure_found(lambda images: logits.expand(len(images), -1), data)

    assert found(labels) == 100
    assert found(-labels) == 0
    lowest = labels.clone()
    lowest[0, min(seen)] = -1
    assert found(lowest) == pytest.approx(100 * (len(seen) - 1) / len(seen))


@pytest.mark.long
def test_a_linear_probe_reads_shapes_off_the_features(tmp_path):
    """Least squares on features of scenes with one shape tells the six kinds better apart."""
    file = pretrain(tmp_path, options="--source scenes:3000:3 --holdout scenes:200:4 --steps 400")
    torch.manual_seed(0)
    probed = {
        name: probe(catalog.build_backbone(catalog.describe_backbone(name), 64))
        for name in ("small_conv", f"small_conv:{file}")
    }
    without, pretrained = probed.values()
    assert pretrained > without + 0.1
    assert pretrained > 3 / len(SHAPES)


def probe(network: torch.nn.Module) -> float:
    """Return the share of 500 scenes whose kind a probe of 1,000 others tells."""
    source = ScenesSource("scenes:4000:6")
    lone = [i for i in range(source.count) if len(source.scene(i).shapes) == 1][:1500]
    drawn = train_backbone.draw_labelled(source.uri)
    kinds = np.array([SHAPES.index(source.scene(i).shapes[0].kind) for i in lone])
    with torch.inference_mode():
        features = network.eval()(to_signed(drawn.pixels[lone])).numpy()
    features = np.column_stack([features, np.ones(len(lone))])
    weights = np.linalg.lstsq(features[:1000], np.eye(len(SHAPES))[kinds[:1000]], rcond=None)[0]
    return float(((features[1000:] @ weights).argmax(1) == kinds[1000:]).mean())

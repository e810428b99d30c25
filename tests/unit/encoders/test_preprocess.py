"""Resizing against open_clip's own inference transform."""

from __future__ import annotations

import numpy as np
import pytest
from open_clip.transform import image_transform
from PIL import Image
from torchvision.transforms import Normalize, ToTensor

from pds_ray.modalities.image import MAX_ASPECT, Preprocess

SIZES = [
    (64, 64),
    (224, 224),
    (97, 41),
    (41, 97),
    (33, 500),
    (500, 333),
    (7, 5),
    (2, 3),
    (31, 33),
    (32, 33),
    (640, 427),
]
SIZES += [(int(w), int(h)) for w, h in np.random.default_rng(0).integers(8, 200, (40, 2))]


def noise(width: int, height: int) -> Image.Image:
    """Smooth enough to look like an image, with an edge in it."""
    rng = np.random.default_rng(width * 1000 + height)
    image = Image.fromarray(
        rng.integers(0, 256, (max(2, height // 4), max(2, width // 4), 3), dtype=np.uint8)
    )
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    image.paste((255, 0, 128), (0, 0, width // 3, height // 2))
    return image


def reference(
    image: Image.Image, size: int, mode: str, interpolation: str, fill: int
) -> np.ndarray:
    """open_clip's transform up to its conversion to floats."""
    whole = image_transform(
        size, is_train=False, resize_mode=mode, interpolation=interpolation, fill_color=fill
    )
    for step in whole.transforms:
        if isinstance(step, ToTensor):
            return np.asarray(image)
        assert not isinstance(step, Normalize)
        if callable(step):
            image = step(image)
    raise AssertionError("the transform has no ToTensor")


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("target", [32, 33])
def test_equals_open_clip_pixel_for_pixel(mode, interpolation, target):
    for width, height in SIZES:
        image = noise(width, height)
        found = Preprocess(target, interpolation, mode, fill=7)(image)
        assert found.shape == (target, target, 3)
        assert found.dtype == np.uint8
        expected = reference(image, target, mode, interpolation, 7)
        np.testing.assert_array_equal(found, expected, err_msg=f"{width} x {height}")


@pytest.mark.parametrize(("width", "height"), [(3, 3 * MAX_ASPECT + 90), (4_000, 2), (2, 60_000)])
def test_ribbons_are_not_enlarged_whole(width, height, monkeypatch):
    """Resized by its short side to 224, the last would have 1.5 thousand million pixels."""
    seen = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image,
        "resize",
        lambda self, size, *a, **k: seen.append(size) or resize(self, size, *a, **k),
    )
    found = Preprocess(224)(Image.new("RGB", (width, height), (9, 80, 200)))
    assert found.shape == (224, 224, 3)
    assert (found == (9, 80, 200)).all()
    assert all(w * h <= 224 * 224 * (MAX_ASPECT + 1) for w, h in seen)


def test_ribbons_show_their_middle():
    image = Image.new("RGB", (4_000, 10))
    image.paste((255, 255, 255), (1_990, 0, 2_010, 10))
    assert (Preprocess(32)(image) > 250).all()
    side = Image.new("RGB", (4_000, 10), (255, 255, 255))
    side.paste((0, 0, 0), (0, 0, 1_900, 10))
    assert (Preprocess(32)(side) > 250).all()

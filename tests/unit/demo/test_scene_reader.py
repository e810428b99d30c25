"""The scene reader against scenes that are drawn: it must see what was drawn, and nothing else."""

from __future__ import annotations

import random

import pytest
from PIL import Image, ImageDraw

from benchmarks.true_captions import exchanged
from pds_ray.demo.scene_reader import Seen, is_true, parse_caption, read_scene, seen
from pds_ray.sources.scenes import (
    COLORS,
    GROUNDS,
    PLACES,
    RADII,
    SHAPES,
    Scene,
    Shape,
    draw_scene,
    make_scene,
    write_captions,
)


def looks(image: Seen) -> list[tuple[str, str, str, str]]:
    return sorted((each.kind, each.color, each.size, each.place) for each in image.shapes)


@pytest.mark.parametrize("ground", GROUNDS)
def test_every_shape_in_every_colour_and_size_is_read(ground):
    places = list(PLACES.items())
    for number, kind in enumerate(SHAPES):
        for color in COLORS:
            for size in RADII:
                place, (x, y) = places[number % len(places)]
                scene = Scene(ground, (Shape(kind, color, size, place, x + 1.2, y - 0.7),))
                found = read_scene(draw_scene(scene))
                assert (found.ground, found.unclear) == (ground, 0)
                assert looks(found) == [(kind, color, size, place)]


def test_scenes_are_read_and_their_captions_are_true_and_exchanged_ones_false():
    for number in range(150):
        rng = random.Random(number)
        scene = make_scene(rng)
        found = read_scene(draw_scene(scene))
        assert (found.ground, looks(found)) == (scene.ground, looks(seen(scene)))
        for caption in write_captions(scene, rng):
            assert is_true(parse_caption(caption), found), caption
            for what in ("colour", "shape", "place"):
                wrong = exchanged(caption, what, rng)
                if wrong:
                    assert not is_true(parse_caption(wrong), found), (caption, wrong)


RED = Shape("circle", "red", "large", "top left", 16, 16)
BLUE = Shape("ring", "blue", "small", "bottom left", 16, 48)
IMAGE = Seen("white", (RED, BLUE))


@pytest.mark.parametrize(
    ("caption", "holds"),
    [
        ("a big red circle at the top left of a white picture", True),
        ("a big red circle at the top left of a black picture", False),
        ("a small red circle on white", False),
        ("in the bottom left is a little blue ring, the background is white", True),
        ("in the bottom left is a large blue ring, the background is white", False),
        ("a red circle above a blue ring on white", True),
        ("a red circle below a blue ring on white", False),
        ("a blue ring below a red circle on white", True),
        ("a red circle above and to the left of a blue ring on white", False),
        ("a red circle to the left of a blue ring on white", False),
        ("a red circle and a red circle on white", False),  # one shape is not two
        ("three shapes on white: a red circle, a blue ring and a red star", False),
    ],
)
def test_every_statement_counts(caption, holds):
    assert is_true(parse_caption(caption), IMAGE) == holds


def test_a_number_is_that_of_all_shapes_clear_or_not():
    star = Shape("star", "red", "small", "top right", 48, 16)
    caption = parse_caption("three shapes on white: a red circle, a blue ring and a red star")
    assert is_true(caption, Seen("white", (RED, BLUE, star)))
    assert not is_true(caption, Seen("white", (RED, BLUE, star), unclear=1))


def test_shapes_off_all_places_have_no_place_and_no_relation():
    off = Shape("star", "red", "small", "", 32, 12)
    image = Seen("white", (RED, off))
    assert is_true(parse_caption("a red circle and a red star on white"), image)
    assert not is_true(parse_caption("a red circle to the left of a red star on white"), image)


def test_what_is_no_shape_of_the_world_is_unclear_and_specks_are_nothing():
    image = Image.new("RGB", (64, 64), GROUNDS["mint"])
    brush = ImageDraw.Draw(image)
    brush.rectangle((5, 10, 50, 14), fill=COLORS["red"])  # a bar
    brush.rectangle((40, 40, 42, 42), fill=COLORS["red"])  # a speck
    found = read_scene(image)
    assert (found.ground, found.shapes, found.unclear) == ("mint", (), 1)


def test_an_image_of_another_size_is_read_alike():
    scene = Scene("sand", (RED,))
    assert looks(read_scene(draw_scene(scene).resize((128, 128)))) == looks(seen(scene))


@pytest.mark.parametrize("caption", ["", "two dogs play on sand", "a red circle", "red on white"])
def test_other_captions_are_refused(caption):
    with pytest.raises(ValueError, match="no caption of the built-in world"):
        parse_caption(caption)


def test_a_ground_that_is_none_of_the_world_has_no_name():
    assert read_scene(Image.new("RGB", (64, 64), (255, 0, 255))) == Seen("", ())

"""Read scenes of the built-in world from pixels, and judge captions by what was read.

A measuring tool for decoded images: it knows the world's colours, shapes and places, and nothing
of any encoder or decoder. Pixels unlike the ground are grouped to regions; a region's shape is the
one which, drawn around the same centre of mass, covers its pixels best.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations, product

import numpy as np
from PIL import Image
from scipy import ndimage

from pds_ray.sources.scenes import (
    COLORS,
    GROUNDS,
    IMAGE_SIZE,
    PLACES,
    RADII,
    SHAPES,
    Scene,
    Shape,
    draw_scene,
)

GROUND_DISTANCE = 60.0
"""A ground is named if the image's most common colour is no further from it, in RGB units."""
SHAPE_ALPHA = 0.4
"""A pixel belongs to a shape if it has at least this share of the way from ground to colour."""
FEWEST_PIXELS = 20
"""Smaller regions are specks: the smallest shape of the world, a small star, has 75 pixels."""
LEAST_FIT = 0.65
"""A region is a shape if it and the shape drawn there share this part of the area of both."""
MOST_OFF = 6.0
"""A shape is in a place if its centre is at most so many pixels from it, in x and in y."""
STEPS_PER_PIXEL = 4
"""Templates are drawn at so many positions per pixel."""


@dataclass(frozen=True)
class Seen:
    """The content read from an image: the name of its ground, "" if it has none, and shapes."""

    ground: str
    shapes: tuple[Shape, ...]
    """A shape off all places has the place ""."""
    unclear: int = 0
    """Regions that are no shape of the world."""


@dataclass(frozen=True)
class Noun:
    """A shape that a caption names, with the details that it gives; "" for those left out."""

    kind: str
    color: str
    size: str
    place: str


@dataclass(frozen=True)
class Statements:
    """Everything that a caption of the built-in world states."""

    ground: str
    nouns: tuple[Noun, ...]
    relation: str
    """The position of the first noun relative to the second, "" if it is not given."""
    count: int | None
    """The number of all shapes, where the caption gives it."""


def seen(scene: Scene) -> Seen:
    """Return what a perfect reader sees in a drawn scene."""
    return Seen(scene.ground, scene.shapes)


def read_scene(image: Image.Image) -> Seen:
    """Read an RGB image of any size as a scene."""
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
    pixels = np.asarray(image.convert("RGB"), np.float64)
    ground = _common_color(pixels)
    name, distance = _nearest(ground, GROUNDS)
    alphas = _alphas(pixels, ground)
    regions, count = ndimage.label(alphas.max(axis=0) >= SHAPE_ALPHA)
    shapes, unclear = [], 0
    for number in range(1, count + 1):
        inside = regions == number
        if inside.sum() < FEWEST_PIXELS:
            continue
        shape = _shape(inside, pixels, ground)
        if shape is None:
            unclear += 1
        else:
            shapes.append(shape)
    return Seen(name if distance <= GROUND_DISTANCE else "", tuple(shapes), unclear)


def _common_color(pixels: np.ndarray) -> np.ndarray:
    """Return the median colour of the pixels in the fullest cell of a coarse grid of colours."""
    flat = pixels.reshape(-1, 3)
    cells = (flat // 32).astype(np.int64) @ np.array([64, 8, 1])
    # neighbours count too, as a ground may lie on the border of two cells
    fullest = flat[cells == np.bincount(cells).argmax()].mean(axis=0)
    return np.median(flat[np.abs(flat - fullest).max(axis=1) <= 24], axis=0)


def _nearest(color: np.ndarray, named: dict[str, tuple[int, int, int]]) -> tuple[str, float]:
    distances = {name: float(np.linalg.norm(color - rgb)) for name, rgb in named.items()}
    name = min(distances, key=lambda each: distances[each])
    return name, distances[name]


def _alphas(pixels: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """Return how far each pixel is on the way from the ground to each colour, [8, S, S] in 0..1.

    It is 0 for a colour that another explains better.
    """
    ways = np.array(list(COLORS.values()), np.float64) - ground
    off = pixels - ground
    alphas = np.clip(np.einsum("yxc,kc->kyx", off, ways) / (ways**2).sum(1)[:, None, None], 0, 1)
    misses = ((alphas[..., None] * ways[:, None, None] - off) ** 2).sum(-1)
    return np.where(misses.argmin(axis=0) == np.arange(len(ways))[:, None, None], alphas, 0)


def _shape(inside: np.ndarray, pixels: np.ndarray, ground: np.ndarray) -> Shape | None:
    """Return the shape of a region, bool [S, S]; None if it is none of the world."""
    color = _region_color(inside, pixels, ground)
    way = COLORS[color] - ground
    near = ndimage.binary_dilation(inside, iterations=2)
    alpha = np.clip((pixels - ground) @ way / (way @ way), 0, 1) * near
    y, x = ndimage.center_of_mass(alpha)
    fits = {(kind, size): _fit(alpha, kind, size, x, y) for kind, size in product(SHAPES, RADII)}
    kind, size = max(fits, key=lambda each: fits[each])
    if fits[kind, size] < LEAST_FIT:
        return None
    off_x, off_y = _mass_offset(kind, size)
    return Shape(kind, color, size, _place(x - off_x, y - off_y), x - off_x, y - off_y)


def _region_color(inside: np.ndarray, pixels: np.ndarray, ground: np.ndarray) -> str:
    """Return the name of a region's colour: that of its pixels least mixed with the ground."""
    own = pixels[inside]
    distance = np.linalg.norm(own - ground, axis=1)
    pure = np.median(own[distance >= np.quantile(distance, 0.5)], axis=0)
    return _nearest(pure, COLORS)[0]


def _place(x: float, y: float) -> str:
    """Return the name of the place of a centre, "" if it is in none."""
    for name, (place_x, place_y) in PLACES.items():
        if max(abs(x - place_x), abs(y - place_y)) <= MOST_OFF:
            return name
    return ""


@cache
def _drawn(kind: str, size: str, x: float, y: float) -> np.ndarray:
    """Return the share of each pixel that a shape covers, drawn at (x, y), float [S, S]."""
    scene = Scene("black", (Shape(kind, "yellow", size, "", x, y),))
    red, dark = COLORS["yellow"][0], GROUNDS["black"][0]
    return (np.asarray(draw_scene(scene), np.float64)[..., 0] - dark) / (red - dark)


@cache
def _mass_offset(kind: str, size: str) -> tuple[float, float]:
    """Return the centre of mass of a shape relative to its centre, (x, y) in pixels."""
    middle = IMAGE_SIZE / 2
    y, x = ndimage.center_of_mass(_drawn(kind, size, middle, middle))
    return x - middle, y - middle


def _fit(alpha: np.ndarray, kind: str, size: str, x: float, y: float) -> float:
    """Return the shared part of a region and a shape with the same centre of mass, 0 to 1."""
    off_x, off_y = _mass_offset(kind, size)
    step = STEPS_PER_PIXEL
    at = round((x - off_x) * step) / step, round((y - off_y) * step) / step
    drawn = _drawn(kind, size, *at)
    return float(np.minimum(alpha, drawn).sum() / np.maximum(alpha, drawn).sum())


SIZES = {"large": "large", "big": "large", "small": "small", "little": "small", "": ""}
_CENTERS = {"middle": "center"}
_WHERE = rf"(?:in|at) the (?P<{{}}>{'|'.join(PLACES)}|middle)"
_NOUN = re.compile(
    rf"(?:{_WHERE.format('before')} is )?"
    rf"an? (?:(?P<size>{'|'.join(filter(None, SIZES))}) )?"
    rf"(?P<color>{'|'.join(COLORS)}) (?P<kind>{'|'.join(SHAPES)})"
    rf"(?: {_WHERE.format('after')})?"
)
_GROUND = re.compile(rf"\b(?P<ground>{'|'.join(GROUNDS)})\b")
_ACROSS = "to the (?:left|right) of"
_RELATION = re.compile(rf" (?P<relation>{_ACROSS}|(?:above|below)(?: and {_ACROSS})?) an? ")


def parse_caption(caption: str) -> Statements:
    """Return what a caption of the built-in world states. Raises ValueError for another one."""
    nouns = []
    for found in _NOUN.finditer(caption):
        place = found["before"] or found["after"] or ""
        place = _CENTERS.get(place, place)
        nouns.append(Noun(found["kind"], found["color"], SIZES[found["size"] or ""], place))
    grounds = {found["ground"] for found in _GROUND.finditer(caption)}
    if not nouns or len(grounds) != 1:
        raise ValueError(f"{caption!r} is no caption of the built-in world")
    relation = _RELATION.search(caption)
    count = 3 if caption.startswith("three shapes") else None
    return Statements(grounds.pop(), tuple(nouns), relation["relation"] if relation else "", count)


def is_true(statements: Statements, image: Seen) -> bool:
    """Return whether every statement holds: ground, looks, sizes, places, relation, number.

    Different nouns must be different shapes of the image. A shape that no noun stands for
    contradicts nothing but a number.
    """
    if statements.ground != image.ground:
        return False
    if statements.count not in (None, len(image.shapes) + image.unclear):
        return False
    count = len(statements.nouns)
    return any(_holds(statements, shapes) for shapes in permutations(image.shapes, count))


def _holds(statements: Statements, shapes: Sequence[Shape]) -> bool:
    pairs = zip(statements.nouns, shapes, strict=True)
    return all(_is(noun, shape) for noun, shape in pairs) and (
        not statements.relation or _related(statements.relation, *shapes[:2])
    )


def _is(noun: Noun, shape: Shape) -> bool:
    return (
        (noun.kind, noun.color) == (shape.kind, shape.color)
        and noun.size in ("", shape.size)
        and noun.place in ("", shape.place)
    )


def _related(relation: str, first: Shape, second: Shape) -> bool:
    """Return whether `first` is so placed relative to `second`.

    Places count, where both have one in a corner; "above" alone means in the same column.
    """
    if min(len(shape.place.split()) for shape in (first, second)) < 2:
        return False
    across = {"left": -1, "right": 1}
    (row, column), (other_row, other_column) = first.place.split(), second.place.split()
    x = (across[column] - across[other_column]) // 2
    y = (row == "bottom") - (other_row == "bottom")
    wanted_x = ("right of" in relation) - ("left of" in relation)
    wanted_y = relation.startswith("below") - relation.startswith("above")
    return (x, y) == (wanted_x, wanted_y)

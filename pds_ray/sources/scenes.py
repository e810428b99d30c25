"""The built-in world: any number of captioned images of coloured shapes, drawn by this file.

`scenes:N[:SEED[:NOISE[:SHARD]]]` is a source of N images in shards of SHARD images. Sample i
depends on (SEED, NOISE, i) alone, so any shard can be drawn anywhere, again and again, with the
same bytes. NOISE percent of the captions describe some other image, as captions from the web do;
the images and the other captions are the same with and without noise.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image, ImageDraw

from pds_ray.config import FilesConfig
from pds_ray.sources.base import Fault, Sample, Shard, SourceError

IMAGE_SIZE = 64
SHARD_SIZE = 1000
"""Images per shard where the source does not say."""
FORM = "scenes:N[:SEED[:NOISE[:SHARD]]]"
# added to a seed: images that nobody would train or test on by chance
VALIDATION_SEED = 1_000_000_000
CAPTIONS_PER_IMAGE = 5
SUPERSAMPLING = 4
"""Shapes are drawn this many times larger and averaged down, which makes their edges smooth."""

RGB = tuple[int, int, int]

GROUNDS: dict[str, RGB] = {
    "white": (250, 250, 247),
    "black": (22, 22, 26),
    "gray": (128, 130, 136),
    "sand": (236, 208, 156),
    "sky blue": (150, 208, 246),
    "mint": (172, 232, 190),
}
COLORS: dict[str, RGB] = {
    "red": (222, 30, 38),
    "orange": (250, 126, 10),
    "yellow": (248, 206, 0),
    "green": (20, 142, 58),
    "blue": (28, 76, 220),
    "purple": (126, 38, 168),
    "pink": (250, 112, 182),
    "brown": (124, 72, 30),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
RADII = {"large": 14.0, "small": 8.0}
"""Size word to circumradius in pixels."""
PLACES: dict[str, tuple[int, int]] = {
    "top left": (16, 16),
    "top right": (48, 16),
    "bottom left": (16, 48),
    "bottom right": (48, 48),
    "center": (32, 32),
}
"""Place name to the (x, y) of a shape's centre, give or take JITTER pixels."""
JITTER = 1.5
SHAPE_COUNT_WEIGHTS = (45, 45, 10)
"""Percentages of scenes with one, two and three shapes. Only a lone shape may be in the center."""


@dataclass(frozen=True)
class Shape:
    """A shape of a scene, centred `x`, `y` pixels from the top left corner."""

    kind: str
    color: str
    size: str
    place: str
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    """The content of an image. Shapes never overlap."""

    ground: str
    shapes: tuple[Shape, ...]


def make_scene(rng: random.Random) -> Scene:
    """Draw a scene from the world's distribution: everything uniform but the number of shapes."""
    count = rng.choices((1, 2, 3), SHAPE_COUNT_WEIGHTS)[0]
    places = rng.sample([name for name in PLACES if count == 1 or name != "center"], count)
    looks = rng.sample([(kind, color) for kind in SHAPES for color in COLORS], count)
    shapes = []
    for place, (kind, color) in zip(places, looks, strict=True):
        x, y = (center + rng.uniform(-JITTER, JITTER) for center in PLACES[place])
        shapes.append(Shape(kind, color, rng.choice(list(RADII)), place, x, y))
    return Scene(rng.choice(list(GROUNDS)), tuple(shapes))


def draw_scene(scene: Scene) -> Image.Image:
    """Return a scene as an RGB image of IMAGE_SIZE x IMAGE_SIZE pixels."""
    side = IMAGE_SIZE * SUPERSAMPLING
    canvas = Image.new("RGB", (side, side), GROUNDS[scene.ground])
    brush = ImageDraw.Draw(canvas)
    for shape in scene.shapes:
        _draw_shape(brush, shape, GROUNDS[scene.ground])
    return canvas.reduce(SUPERSAMPLING)


def _draw_shape(brush: ImageDraw.ImageDraw, shape: Shape, ground: RGB) -> None:
    x, y, r = (SUPERSAMPLING * value for value in (shape.x, shape.y, RADII[shape.size]))
    color = COLORS[shape.color]

    def box(radius: float) -> tuple[float, float, float, float]:
        return (x - radius, y - radius, x + radius, y + radius)

    def polygon(corners: list[tuple[float, float]]) -> None:
        """Fill a polygon; a corner is (angle clockwise from the top in turns, radius)."""
        brush.polygon(
            [
                (x + radius * math.sin(math.tau * turn), y - radius * math.cos(math.tau * turn))
                for turn, radius in corners
            ],
            fill=color,
        )

    match shape.kind:
        case "circle":
            brush.ellipse(box(0.92 * r), fill=color)
        case "square":
            brush.rectangle(box(0.84 * r), fill=color)
        case "triangle":
            polygon([(0, r), (0.36, 1.08 * r), (0.64, 1.08 * r)])
        case "star":
            polygon([(i / 10, r if i % 2 == 0 else 0.42 * r) for i in range(10)])
        case "ring":
            brush.ellipse(box(0.95 * r), fill=color)
            brush.ellipse(box(0.5 * r), fill=ground)
        case "cross":
            brush.rectangle((x - r, y - 0.32 * r, x + r, y + 0.32 * r), fill=color)
            brush.rectangle((x - 0.32 * r, y - r, x + 0.32 * r, y + r), fill=color)


def write_captions(scene: Scene, rng: random.Random) -> tuple[str, ...]:
    """Describe a scene in CAPTIONS_PER_IMAGE different ways.

    Every statement is true; some leave a detail out.
    """
    shapes = rng.sample(scene.shapes, len(scene.shapes))
    ground = scene.ground
    full = [_noun(shape, rng, sized=True) for shape in shapes]
    short = [_noun(shape, rng, sized=False) for shape in shapes]
    where = [_where(shape, rng) for shape in shapes]
    placed = [f"{noun} {place}" for noun, place in zip(full, where, strict=True)]
    if len(shapes) == 1:
        templates = [
            f"{placed[0]} of a {ground} picture",
            f"{placed[0]} on {ground}",
            f"on a {ground} background there is {placed[0]}",
            f"a {ground} ground with {placed[0]}",
            f"{where[0]} is {full[0]}, the background is {ground}",
            f"a picture of {full[0]} on a {ground} background",
            f"{short[0]} {where[0]} on {ground}",
        ]
    elif len(shapes) == 2:
        relation = _relation(*shapes)
        templates = [
            f"{placed[0]} and {placed[1]} on {ground}",
            f"on a {ground} background, {placed[0]} and {placed[1]}",
            f"{full[0]} {relation} {full[1]} on a {ground} background",
            f"{ground} ground with {full[0]} {relation} {full[1]}",
            f"{where[0]} is {full[0]}, {where[1]} is {full[1]}, all on {ground}",
            f"{short[0]} {relation} {short[1]} on {ground}",
            f"a {ground} picture of {full[0]} and {full[1]}",
        ]
    else:
        templates = [
            f"{short[0]} {where[0]}, {short[1]} {where[1]} and {short[2]} {where[2]} on {ground}",
            f"on {ground}, {short[0]} {where[0]}, {short[1]} {where[1]}, {short[2]} {where[2]}",
            f"{full[0]}, {full[1]} and {full[2]} on a {ground} background",
            f"three shapes on {ground}: {full[0]}, {full[1]} and {full[2]}",
            f"{short[0]} {_relation(*shapes[:2])} {short[1]}, and {full[2]}, on {ground}",
            f"a {ground} picture of {short[0]}, {short[1]} and {short[2]}",
        ]
    return tuple(rng.sample(templates, CAPTIONS_PER_IMAGE))


def _noun(shape: Shape, rng: random.Random, *, sized: bool) -> str:
    size = {"large": ("large", "big"), "small": ("small", "little")}[shape.size]
    words = [rng.choice(size)] if sized else []
    words += [shape.color, shape.kind]
    return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"


def _where(shape: Shape, rng: random.Random) -> str:
    if shape.place == "center":
        return rng.choice(("in the center", "in the middle"))
    return rng.choice((f"in the {shape.place}", f"at the {shape.place}"))


def _relation(first: Shape, second: Shape) -> str:
    """Return the position of the first shape relative to the second."""
    vertical, horizontal = first.place.split()
    other_vertical, other_horizontal = second.place.split()
    if vertical == other_vertical:
        return f"to the {horizontal} of"
    above = "above" if vertical == "top" else "below"
    return above if horizontal == other_horizontal else f"{above} and to the {horizontal} of"


class ScenesSource:
    """`scenes:N[:SEED[:NOISE[:SHARD]]]`: N images with five captions each, SHARD images per shard.

    The defaults are seed 0, no noise and shards of SHARD_SIZE. Raises SourceError in one line for
    any other text, for no images, for more than 100 percent of noise and for empty shards.
    """

    def __init__(self, uri: str, _: FilesConfig | None = None) -> None:
        scheme, *numbers = uri.split(":")
        given = [int(number) for number in numbers if number.isascii() and number.isdecimal()]
        if scheme != "scenes" or not 1 <= len(numbers) <= 4 or len(given) < len(numbers):
            raise SourceError(f"not a scenes source: {uri!r}; write {FORM}, such as scenes:10000:1")
        self.uri = uri
        self.count, self.seed, self.noise, self.shard_size = (
            *given,
            *(0, 0, SHARD_SIZE)[len(given) - 1 :],
        )
        if self.count == 0:
            raise SourceError(f"{uri!r} has no images; ask for at least one, such as scenes:1000")
        if self.noise > 100:
            raise SourceError(
                f"{uri!r}: the noise is a percentage of the captions, such as scenes:1000:1:20"
            )
        if self.shard_size == 0:
            raise SourceError(
                f"{uri!r}: a shard has at least one image, such as scenes:1000:1:0:50"
            )
        self.validation = f"scenes:{self.count}:{VALIDATION_SEED + self.seed}"

    def shards(self) -> list[Shard]:
        """Return row ranges [start, stop) of `shard_size` samples, the last one perhaps shorter."""
        starts = range(0, self.count, self.shard_size)
        stops = [min(start + self.shard_size, self.count) for start in starts]
        version = f"seed {self.seed}" + (f", noise {self.noise}" if self.noise else "")
        if self.shard_size != SHARD_SIZE:  # shards of one name and size may hold other images
            version += f", shards of {self.shard_size}"
        return [
            Shard(f"scenes-{number:05d}", f"{start}:{stop}", stop - start, version)
            for number, (start, stop) in enumerate(zip(starts, stops, strict=True))
        ]

    def read(self, shard: Shard) -> Iterator[Sample | Fault]:
        """Draw the samples of a shard. There are never faults."""
        start, stop = map(int, shard.location.split(":"))
        for index in range(start, stop):
            yield self.sample(index)

    def sample(self, index: int) -> Sample:
        """Draw sample `index`. Its key is the index in nine digits, its image a PNG."""
        scene, rng = self._scene(index)
        file = io.BytesIO()
        draw_scene(scene).save(file, "PNG", compress_level=1)
        captions = write_captions(scene, rng)
        if self.noise:
            captions = self._disturb(captions, random.Random(f"{self.seed}:{index}:noise"))
        return Sample(f"{index:09d}", file.getvalue(), captions)

    def scene(self, index: int) -> Scene:
        """Return what there is to see in sample `index`."""
        return self._scene(index)[0]

    def _scene(self, index: int) -> tuple[Scene, random.Random]:
        """Return a scene and the generator that then writes its captions."""
        rng = random.Random(f"{self.seed}:{index}")
        return make_scene(rng), rng

    def _disturb(self, captions: tuple[str, ...], rng: random.Random) -> tuple[str, ...]:
        """Replace each caption, with the probability of the noise, by one of an absent image."""
        foreign = [write_captions(make_scene(rng), rng)[0] for _ in captions]
        wrong = [100 * rng.random() < self.noise for _ in captions]
        return tuple(
            other if swap else own
            for own, other, swap in zip(captions, foreign, wrong, strict=True)
        )

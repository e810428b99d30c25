"""Count the captions of a distilled set of the built-in world of which every statement is true.

    python benchmarks/true_captions.py runs/demo
    python benchmarks/true_captions.py --check scenes:2000:7

A scene reader tells shapes, colours, sizes and places from the pixels of each image
(pds_ray/demo/scene_reader.py); a caption is true if its ground, looks, sizes, places, relation and
number all are. `--check` judges the reader itself on drawn scenes: how many scenes it reads without
a mistake, how many of their captions it finds true, and how many of captions with a colour, a shape
or a place exchanged it finds false.
"""

from __future__ import annotations

import io
import random
import re
import sys

from PIL import Image

from pds_ray import load_distilled
from pds_ray.demo.scene_reader import Seen, is_true, parse_caption, read_scene
from pds_ray.sources.base import Sample
from pds_ray.sources.scenes import COLORS, PLACES, SHAPES, ScenesSource

SIDES = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
SIDES |= {"above": "below", "below": "above"}
_WORDS = {
    "colour": re.compile(rf"\b({'|'.join(COLORS)}) (?=(?:{'|'.join(SHAPES)})\b)"),
    "shape": re.compile(rf"\b({'|'.join(SHAPES)})\b"),
    "place": re.compile(rf"\b({'|'.join(filter(None, SIDES))}|center|middle)\b"),
}


def exchanged(caption: str, what: str, rng: random.Random) -> str | None:
    """Return the caption with one colour, shape or place exchanged; None if it names none.

    Looks are unique in a scene, so that another one in their place is false; so is another side.
    """
    found = list(_WORDS[what].finditer(caption))
    if not found:
        return None
    word = rng.choice(found)
    if what == "place":
        corners = [place for place in PLACES if place != "center"]
        new = SIDES.get(word[1]) or rng.choice(corners)
    else:
        names = {"colour": tuple(COLORS), "shape": SHAPES}[what]
        new = rng.choice([name for name in names if name != word[1]])
    return caption[: word.start(1)] + new + caption[word.end(1) :]


def check(source: str) -> None:
    """Print how well the reader does on the drawn scenes of `source`."""
    scenes = ScenesSource(source)
    images = read = captions = true = 0
    false = {what: [0, 0] for what in _WORDS}
    rng = random.Random(0)
    for shard in scenes.shards():
        for sample in scenes.read(shard):
            assert isinstance(sample, Sample)
            seen = read_scene(Image.open(io.BytesIO(sample.image)))
            images += 1
            verdicts = [is_true(parse_caption(caption), seen) for caption in sample.captions]
            captions, true = captions + len(verdicts), true + sum(verdicts)
            read += all(verdicts)
            for what, counts in false.items():
                wrong = exchanged(rng.choice(sample.captions), what, rng)
                if wrong:
                    counts[0] += not is_true(parse_caption(wrong), seen)
                    counts[1] += 1
    print(f"scenes of which all captions are found true: {read:,} of {images:,}")
    print(f"true captions found true: {true:,} of {captions:,}")
    for what, (found, count) in false.items():
        print(f"captions with a {what} exchanged found false: {found:,} of {count:,}")


def _whole(caption: str, seen: Seen) -> bool:
    """Return whether a true caption names every shape, and nothing else is in the image."""
    return len(parse_caption(caption).nouns) == len(seen.shapes) + seen.unclear


def main(run: str, source: str = "") -> None:
    """Print the count for the distilled set in `run`, or check the reader."""
    if run == "--check":
        return check(source)
    pairs = load_distilled(run)
    seen = [read_scene(pairs.image(pair)) for pair in range(len(pairs))]
    true = [
        is_true(parse_caption(caption), image)
        for caption, image in zip(pairs.captions, seen, strict=True)
    ]
    whole = sum(
        _whole(caption, image)
        for caption, image, holds in zip(pairs.captions, seen, true, strict=True)
        if holds
    )
    clear = sum(image.unclear == 0 and bool(image.shapes) for image in seen)
    print(f"captions of which every statement is true: {sum(true)} of {len(pairs)}")
    print(f"of these, captions that name every shape of their image: {whole}")
    print(f"images of clear shapes alone: {clear} of {len(pairs)}")
    return None


if __name__ == "__main__":
    main(*sys.argv[1:])

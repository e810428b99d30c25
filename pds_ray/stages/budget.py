"""The choice for a budget of bytes: pairs, side, format and quality (docs/methods.md).

The bytes of a set are those of its image files, and of its captions in UTF-8 with a line end each.
A seeded sample of the source's images, or of what the decoder makes of them, is saved in each way
that the options leave open; the encoder tells how well it still finds the own captions of real
images saved so.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from pds_ray.config import ConfigError, DecodeConfig
from pds_ray.modalities.image import SAVED_FORMATS, encode_image, resized

SHARES = (1.0, 0.75, 0.5, 0.375, 0.25)
"""Sides that are tried, as shares of the largest."""
QUALITIES = (90, 75, 50)
"""Qualities of JPEG and WebP that are tried."""
KEPT = 0.9
"""Share of the recall at the largest side, without loss, that a way of saving must keep."""
SAMPLE, SAMPLE_SHARDS = 256, 16
"""Images that are looked at, and shards of the source that they are taken from at most."""
RIVALS = 4096
"""Other images of these shards, with a caption each, among which the sample is looked for."""
DRAWN = 32
"""Images of the sample that a decoder draws, where one makes the images of the set."""


@dataclass(frozen=True)
class Saving:
    """A way of saving an image."""

    side: int
    format: str
    quality: int | None = None
    """None for PNG, which has none."""

    def __str__(self) -> str:
        return f"{self.side} px {self.format}" + (f" {self.quality}" if self.quality else "")


@dataclass(frozen=True)
class Room:
    """The budget, and the number and the captions of the pairs that are to fill it."""

    budget: int
    """Bytes."""
    pairs: int
    """Pairs that the set must have; 0 if as many as fit."""
    there: int
    """Pairs that the source can give at most."""
    caption_bytes: float
    """Mean bytes of a caption."""


@dataclass(frozen=True)
class Choice:
    """A number of pairs and a way of saving their images."""

    pairs: int
    saving: Saving
    r_mean: Mapping[Saving, float] = field(default_factory=dict)
    """Recalls that were measured on the way."""

    def options(self) -> dict[str, Any]:
        """Return it as options of a run, with dots."""
        saving = self.saving
        return {
            "pairs": self.pairs,
            "decode.image_size": saving.side,
            "decode.format": saving.format,
            "decode.quality": saving.quality,
        }


def draw(images: Mapping[str, int], seed: int) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Draw SAMPLE images and RIVALS others, fewer if there are not so many, from SAMPLE_SHARDS.

    `images` is shard -> number of its images. Returns shards, each with the rows of its images in
    the sample and of its rivals, ascending int64.
    """
    rng = np.random.default_rng([seed, 0xB7])  # apart from the draws of other stages
    names = [name for name, count in images.items() if count]
    some = sorted(rng.permutation(len(names))[:SAMPLE_SHARDS])
    starts = np.cumsum([0, *(images[names[number]] for number in some)])
    drawn = rng.permutation(starts[-1])[: SAMPLE + RIVALS]
    parts = [np.sort(part) for part in (drawn[:SAMPLE], drawn[SAMPLE:])]
    places = []
    for number, start, end in zip(some, starts[:-1], starts[1:], strict=True):
        own, rivals = (part[(part >= start) & (part < end)] - start for part in parts)
        if len(own):
            places.append((names[number], own, rivals))
    return places


def savings(full: int, config: DecodeConfig) -> list[Saving]:
    """Return the ways of saving that the options leave open, the largest side first."""
    sides = dict.fromkeys(max(1, round(full * share)) for share in SHARES)
    formats = SAVED_FORMATS if config.format == "auto" else (config.format,)
    qualities = QUALITIES if config.quality is None else (config.quality,)
    return [
        Saving(side, format, quality)
        for side in sides
        for format in formats
        for quality in ((None,) if format == "png" else qualities)
    ]


def saved(image: Image.Image, saving: Saving) -> bytes:
    """Return the file of an image saved so."""
    return encode_image(resized(image, saving.side), saving.format, saving.quality)


def mean_bytes(images: Iterable[Image.Image], saving: Saving) -> float:
    """Return the mean bytes of the files of images saved so."""
    return float(np.mean([len(saved(image, saving)) for image in images]))


def seen(image: Image.Image, saving: Saving) -> Image.Image:
    """Return an image as a reader of its file sees it."""
    with Image.open(io.BytesIO(saved(image, saving))) as opened:
        return opened.convert("RGB")


def found(
    images: np.ndarray,
    captions: np.ndarray,
    owner: np.ndarray,
    rival_images: np.ndarray,
    rival_captions: np.ndarray,
) -> float:
    """Return the mean of the six recalls of n images and their m captions among R rivals of each.

    Unit vectors, float32: images [n, d], captions [m, d], rivals [R, d] twice; owner int64 [m].
    Small galleries are found in whole however images are saved; hence the rivals.
    """
    from pds_ray.training.recall import CUTOFFS  # brings torch, which plans do without

    scores = images @ captions.T
    own = np.where(owner == np.arange(len(images))[:, None], scores, -np.inf).max(axis=1)
    by_image = (np.hstack([scores, images @ rival_captions.T]) > own[:, None]).sum(axis=1)
    of_captions = np.hstack([scores.T, captions @ rival_images.T])
    by_caption = (of_captions > scores[owner, np.arange(len(owner))][:, None]).sum(axis=1)
    shares = [np.mean(ranks < cutoff) for ranks in (by_image, by_caption) for cutoff in CUTOFFS]
    return 100 * float(np.mean(shares))


def choose(room: Room, sizes: Mapping[Saving, float], r_mean: Callable[[Saving], float]) -> Choice:
    """Choose pairs and a way of saving.

    `sizes` holds the mean bytes of an image for each way that is open, `r_mean` measures how well
    images saved so still find their captions. Without a number of pairs it is the way of fewest
    bytes that keeps KEPT of the recall, and as many pairs as fit; if they, or the pairs that there
    are, leave room, the way that finds most of those that fit. Raises ConfigError if nothing fits.
    """
    measured: dict[Saving, float] = {}

    def measure(saving: Saving) -> float:
        if saving not in measured:
            measured[saving] = r_mean(saving)
        return measured[saving]

    def fitting(saving: Saving) -> int:
        return int(room.budget / (sizes[saving] + room.caption_bytes))

    pairs = room.pairs
    if not pairs:
        smallest = _smallest(sizes, measure)
        pairs = fitting(smallest)
        if pairs <= room.there:
            _require_pairs(room, pairs, sizes)
            return Choice(pairs, smallest, measured)
        pairs = room.there
    _require_pairs(room, pairs if any(fitting(s) >= pairs for s in sizes) else 0, sizes)
    fit = [saving for saving in sizes if fitting(saving) >= pairs]
    of_side = {side: [s for s in fit if s.side == side] for side in {s.side for s in fit}}
    largest = [max(ways, key=lambda saving: sizes[saving]) for ways in of_side.values()]
    best = max(largest, key=lambda saving: (measure(saving), saving.side))
    return Choice(pairs, best, measured)


def _smallest(sizes: Mapping[Saving, float], measure: Callable[[Saving], float]) -> Saving:
    """Return the way of fewest bytes that keeps KEPT of the recall; if none, that of the most.

    A side that does not keep it without loss is not tried with loss.
    """
    sides = {saving.side for saving in sizes}
    whole = measure(Saving(max(sides), "png"))
    keeping = {side for side in sides if measure(Saving(side, "png")) >= KEPT * whole}
    candidates = sorted((s for s in sizes if s.side in keeping), key=lambda s: (sizes[s], s.side))
    found = next((s for s in candidates if measure(s) >= KEPT * whole), None)
    return found or max(candidates, key=lambda s: (measure(s), s.side))


def _require_pairs(room: Room, pairs: int, sizes: Mapping[Saving, float]) -> None:
    """Raise ConfigError if no pair fits."""
    if pairs:
        return
    least = min(sizes.values()) + room.caption_bytes
    wanted = f"{room.pairs:,} pairs need" if room.pairs else "a pair needs"
    raise ConfigError(
        f"budget is {room.budget:,} bytes; {wanted} about {least * max(room.pairs, 1):,.0f} at the "
        "fewest bytes that the options leave open; give more"
    )


def fitting_pairs(sizes: Sequence[int], budget: int) -> int:
    """Return how many of the first pairs fit; `sizes` are their bytes in order."""
    return int(np.searchsorted(np.cumsum(sizes), budget, side="right"))


def record(
    room: Room, images: int, shown: int, sizes: Mapping[Saving, float], choice: Choice
) -> dict[str, Any]:
    """Return the content of budget.json, from which the choice can be followed.

    Of the sample's `images`, the bytes of `shown` ones were measured.
    """
    return {
        "budget": room.budget,
        "asked": room.pairs,
        "bytes": "image files, and captions in UTF-8 with a line end each",
        "sampled": images,
        "measured_on": shown,
        "caption_bytes": room.caption_bytes,
        "measured": [
            {**asdict(saving), "bytes": size, "r_mean": choice.r_mean.get(saving)}
            for saving, size in sizes.items()
        ],
        "kept": KEPT,
        "chosen": choice.options(),
    }

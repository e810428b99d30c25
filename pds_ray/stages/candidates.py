"""Choice among the images of a pair: decoded candidates and, if allowed, a real one.

    score(x) = a cos(x, image prototype) + b cos(x, text prototype)

x is the embedding of an image by the run's encoder, a and b are `decode.image_weight` and
`decode.text_weight` (docs/methods.md, "decode").
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from PIL import Image

from pds_ray.config import DecodeConfig
from pds_ray.encoders.base import Encoder
from pds_ray.modalities.image import Preprocess
from pds_ray.stages.embed import embed_images
from pds_ray.stages.vectors import normalized
from pds_ray.store.schemas import vectors

REAL, SYNTHETIC = "real", "synthetic"
DECIMALS = 4
"""Scores are compared to so many decimals: the size of a batch changes later ones."""
ENCODED_TOGETHER = 64


@dataclass(frozen=True)
class Choice:
    """An image of a pair and how it was judged: a row of choices.parquet."""

    pair: int
    origin: str
    """REAL or SYNTHETIC."""
    candidate: int | None
    """Its number among the pair's candidates; None for a real image."""
    noise_level: int | None
    image_cosine: float
    """To the pair's image prototype."""
    text_cosine: float
    """To the pair's text prototype."""
    score: float
    round_trip: bool
    """True if of all image prototypes the pair's own is nearest to the image."""


@dataclass(frozen=True)
class Judged:
    """An image with its judgement."""

    image: Image.Image
    choice: Choice


class Judge:
    """The run's encoder with all prototypes."""

    def __init__(
        self, encoder: Encoder, preprocess: Preprocess, prototypes: pa.Table, config: DecodeConfig
    ) -> None:
        self.encoder, self.preprocess, self.config = encoder, preprocess, config
        # all of them are searched, in float64, for each chunk: made so once
        self.image = normalized(vectors(prototypes, "image_prototype")).astype(np.float64)
        self.text = normalized(vectors(prototypes, "text_prototype"))

    def judge(
        self,
        pairs: range,
        images: Iterable[Image.Image],
        origin: str,
        candidate: int | None = None,
        noise_level: int | None = None,
    ) -> list[Judged]:
        """Judge one image for each of `pairs`."""
        made = list(images)
        embedded = normalized(
            embed_images(made, self.encoder, self.preprocess, ENCODED_TOGETHER)
        ).astype(np.float64)
        own = slice(pairs.start, pairs.stop)
        image = np.einsum("bd,bd->b", embedded, self.image[own])
        text = np.einsum("bd,bd->b", embedded, self.text[own])
        nearest = (embedded @ self.image.T).argmax(axis=1)
        weights = self.config.image_weight, self.config.text_weight
        return [
            Judged(
                made[row],
                Choice(
                    pair,
                    origin,
                    candidate,
                    noise_level,
                    round(float(image[row]), DECIMALS),
                    round(float(text[row]), DECIMALS),
                    round(float(weights[0] * image[row] + weights[1] * text[row]), DECIMALS),
                    bool(nearest[row] == pair),
                ),
            )
            for row, pair in enumerate(pairs)
        ]


def better(kept: Sequence[Judged], others: Sequence[Judged]) -> list[Judged]:
    """Return of each pair the image with the higher score; of equals the kept one."""
    both = zip(kept, others, strict=True)
    return [theirs if theirs.choice.score > own.choice.score else own for own, theirs in both]


def fallen_back(decoded: Sequence[Judged], real: Sequence[Judged], margin: float) -> list[Judged]:
    """Return the real image of each pair whose decoded one fails, otherwise the decoded one.

    It fails if its nearest image prototype is another pair's, or if its score is lower by more
    than `margin`.
    """
    return [
        own
        if own.choice.round_trip and own.choice.score >= theirs.choice.score - margin
        else theirs
        for own, theirs in zip(decoded, real, strict=True)
    ]

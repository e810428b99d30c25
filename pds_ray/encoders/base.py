"""What an encoder offers: images and captions as vectors of one space.

`EncoderInfo` says what the encoder is without loading weights; it is small, pickles, and travels to workers, which
resize pictures with it and load the weights themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes the pixels an encoder takes. Pillow only, so that decoding workers need no torch.

    Gives the pixels of open_clip's inference transform before its conversion to floats.
    """

    size: int
    interpolation: str = "bicubic"
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"
    fill: int = 0

    def __call__(self, image: Image.Image) -> np.ndarray:
        """RGB picture -> uint8 [size, size, 3]."""
        resample = (
            Image.Resampling.BILINEAR
            if self.interpolation == "bilinear"
            else Image.Resampling.BICUBIC
        )
        if self.resize_mode == "squash":
            return np.asarray(image.resize((self.size, self.size), resample))
        if self.resize_mode == "shortest":
            image = _bounded(image)
        width, height = image.size
        if self.resize_mode == "longest":
            ratio = max(width / self.size, height / self.size)
            scaled = (round(width / ratio), round(height / ratio))
        elif width <= height:
            scaled = (self.size, int(self.size * height / width))
        else:
            scaled = (int(self.size * width / height), self.size)
        scaled = (max(1, scaled[0]), max(1, scaled[1]))
        if scaled != (width, height):
            image = image.resize(scaled, resample)
        left, top = (self._edge(side) for side in scaled)
        if (left, top) == (0, 0) and scaled == (self.size, self.size):
            return np.asarray(image)
        canvas = Image.new("RGB", (self.size, self.size), (self.fill,) * 3)
        canvas.paste(image, (-left, -top))
        return np.asarray(canvas)

    def _edge(self, side: int) -> int:
        """Where the middle `size` pixels of a side begin; below 0 where it is padded, the odd pixel at the far end."""
        return -((self.size - side) // 2) if side < self.size else round((side - self.size) / 2)


ROW_MULTIPLE = (
    16  # forward passes take multiples of 16 rows: then a row's result does not depend on its batch
)
MAX_ASPECT = 32


def _bounded(image: Image.Image) -> Image.Image:
    """The middle of a picture longer than MAX_ASPECT times its short side: enlarged whole it would fill memory."""
    width, height = image.size
    limit = MAX_ASPECT * min(width, height)
    if max(width, height) <= limit:
        return image
    left, top = max(0, (width - limit) // 2), max(0, (height - limit) // 2)
    return image.crop((left, top, min(width, left + limit), min(height, top + limit)))


@dataclass(frozen=True)
class EncoderInfo:
    """What an encoder is."""

    name: str
    """As the user gave it."""
    dim: int
    """Width d of the embeddings."""
    space: str
    """Identity of the embedding space: equal for two encoders only if their vectors may be mixed."""
    identity: str
    """What the bytes of the embeddings depend on besides precision: weights, architecture, preprocessing, tokenizer."""
    preprocess: Preprocess
    load_args: tuple[tuple[str, Any], ...]
    """What `load` needs beyond the name."""


@dataclass(frozen=True)
class TextEncoderInfo:
    """What an encoder of captions alone is; the fields mean what they do in `EncoderInfo`."""

    name: str
    dim: int
    space: str
    identity: str
    load_args: tuple[tuple[str, Any], ...]


class TextEncoder(Protocol):
    """A loaded encoder of captions."""

    dim: int

    def encode_captions(self, captions: list[str]) -> np.ndarray:
        """B captions, cut to the model's context length -> float32 [B, d]."""
        ...


class Encoder(Protocol):
    """A loaded encoder. Embeddings are un-normalised projections, float32."""

    dim: int

    def encode_images(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [B, S, S, 3] at the preprocess' size -> float32 [B, d]."""
        ...

    def encode_captions(self, captions: list[str]) -> np.ndarray:
        """B captions, cut to the model's context length -> float32 [B, d]."""
        ...

"""What an encoder offers: images and captions as vectors of one space.

`EncoderInfo` says what the encoder is without loading weights; it is small, pickles, and travels to workers, which
resize pictures with it and load the weights themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pds_ray.modalities.image import Preprocess

ROW_MULTIPLE = (
    16  # forward passes take multiples of 16 rows: then a row's result does not depend on its batch
)


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

"""The interface of an encoder: images and captions as vectors of one space.

`EncoderInfo` describes the encoder without loading weights; it is small, pickles, and travels to
workers, which resize images with it and load the weights themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pds_ray.modalities.image import Preprocess

ROW_MULTIPLE = 16
"""Forward passes take multiples of 16 rows: then a row's result does not depend on its batch."""


@dataclass(frozen=True)
class EncoderInfo:
    """The description of an encoder, known without loading it."""

    name: str
    """As the user gave it."""
    dim: int
    """Width d of the embeddings."""
    space: str
    """Name of the embedding space: equal only if the vectors of two encoders may be mixed."""
    identity: str
    """Weights, architecture, preprocessing and tokenizer.

    The bytes of the embeddings depend on nothing else but the precision.
    """
    preprocess: Preprocess
    load_args: tuple[tuple[str, Any], ...]
    """Arguments that `load` needs beyond the name."""
    aliases: tuple[str, ...] = ()
    """Other names of the same space: those of the same weights elsewhere."""


@dataclass(frozen=True)
class TextEncoderInfo:
    """The description of an encoder of captions alone, with the fields of `EncoderInfo`."""

    name: str
    dim: int
    space: str
    identity: str
    load_args: tuple[tuple[str, Any], ...]
    aliases: tuple[str, ...] = ()


def spaces(encoder: EncoderInfo | TextEncoderInfo) -> tuple[str, ...]:
    """Return all names of an encoder's space: the vectors of two that share one may be mixed."""
    return (encoder.space, *encoder.aliases)


class TextEncoder(Protocol):
    """A loaded encoder of captions."""

    dim: int

    def encode_captions(self, captions: list[str]) -> np.ndarray:
        """Encode B captions, cut to the model's context length. float32 [B, d]."""
        ...


class Encoder(Protocol):
    """A loaded encoder. Embeddings are un-normalised projections."""

    dim: int

    def encode_images(self, pixels: np.ndarray) -> np.ndarray:
        """Encode pixels, uint8 [B, S, S, 3] at the preprocess' size. float32 [B, d]."""
        ...

    def encode_captions(self, captions: list[str]) -> np.ndarray:
        """Encode B captions, cut to the model's context length. float32 [B, d]."""
        ...


class EncoderModule(Protocol):
    """A module that the catalog names as an encoder."""

    def describe(self, name: str) -> EncoderInfo:
        """Describe `name` without loading its weights.

        Raises ConfigError in one line if it is nothing, or its files are damaged or do not fit.
        """
        ...

    def load(self, info: EncoderInfo, precision: str) -> Encoder:
        """Load the weights, onto the GPU if there is one; precision fp32, fp16, bf16 or auto.

        Raises ConfigError in one line if they cannot be had.
        """
        ...


class TextEncoderModule(Protocol):
    """A module that the catalog names as a text encoder: an encoder module, or one of captions."""

    def describe(self, name: str) -> EncoderInfo | TextEncoderInfo:
        """Describe `name` without its weights. Raises ConfigError in one line if it is nothing."""
        ...

    def load(self, info: Any, precision: str) -> TextEncoder:
        """Load the weights as `EncoderModule.load` does; `info` is what `describe` returned."""
        ...

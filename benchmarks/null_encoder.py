"""An encoder that does nothing: embedding is then reading, decoding, moving and writing.

Workers register it by unpickling its description, which imports this module.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pds_ray import catalog
from pds_ray.encoders.base import EncoderInfo
from pds_ray.modalities.image import Preprocess

NAME, DIM, SIDE = "null", 16, 16
catalog.ENCODERS[NAME] = __name__


@dataclass(frozen=True)
class NullInfo(EncoderInfo):
    """An encoder's description; unpickling it imports this module."""


@dataclass(frozen=True)
class Blank(Preprocess):
    """Black images instead of resized ones: blocks of full size that cost nothing to make."""

    def __call__(self, _: object) -> np.ndarray:
        """Return black pixels, uint8 [size, size, 3]."""
        return np.zeros((self.size, self.size, 3), np.uint8)


def describe(name: str = NAME) -> NullInfo:
    return NullInfo(name, DIM, NAME, NAME, Preprocess(SIDE), ())


def describe_blank(side: int) -> NullInfo:
    """Return an encoder that takes black images of this side."""
    return NullInfo(NAME, DIM, NAME, NAME, Blank(side), ())


def load(_info: EncoderInfo, _precision: str) -> NullEncoder:
    return NullEncoder()


class NullEncoder:
    """Encode everything as ones."""

    dim = DIM

    def encode_images(self, pixels: np.ndarray) -> np.ndarray:
        """Encode uint8 [B, S, S, 3] to float32 [B, d]."""
        return np.ones((len(pixels), DIM), np.float32)

    def encode_captions(self, captions: list[str]) -> np.ndarray:
        """Encode B captions to float32 [B, d]."""
        return np.ones((len(captions), DIM), np.float32)

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


def describe(name: str = NAME) -> NullInfo:
    return NullInfo(name, DIM, NAME, NAME, Preprocess(SIDE), ())


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

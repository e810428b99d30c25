"""An encoder that does nothing: what is left of embedding is reading, decoding, moving and writing.

Workers get to know it by unpickling its description, which imports this module.
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
    """Like any other; its class lies here."""


def describe(name: str = NAME) -> NullInfo:
    return NullInfo(name, DIM, NAME, NAME, Preprocess(SIDE), ())


def load(_info: EncoderInfo, _precision: str) -> NullEncoder:
    return NullEncoder()


class NullEncoder:
    """Ones for everything."""

    dim = DIM

    def encode_images(self, pixels: np.ndarray) -> np.ndarray:
        """[B, S, S, 3] -> float32 [B, d]."""
        return np.ones((len(pixels), DIM), np.float32)

    def encode_captions(self, captions: list[str]) -> np.ndarray:
        """B captions -> float32 [B, d]."""
        return np.ones((len(captions), DIM), np.float32)

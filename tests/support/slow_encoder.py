"""An encoder that takes its time: four seconds to load, and a tenth of a second per image.

Workers register it by unpickling its description, which imports this module.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from pds_ray import catalog
from pds_ray.encoders.base import EncoderInfo
from pds_ray.modalities.image import Preprocess

NAME, DIM, SIDE = "slow", 4, 16
LOAD_S, IMAGE_S = 4.0, 0.1
catalog.ENCODERS[NAME] = __name__


@dataclass(frozen=True)
class SlowInfo(EncoderInfo):
    """An encoder's description; unpickling it imports this module."""


def describe(name: str = NAME) -> SlowInfo:
    return SlowInfo(name, DIM, NAME, NAME, Preprocess(SIDE), ())


def load(_info: EncoderInfo, _precision: str) -> SlowEncoder:
    time.sleep(LOAD_S)
    return SlowEncoder()


class SlowEncoder:
    """Encode everything as ones, slowly."""

    dim = DIM

    def encode_images(self, pixels: np.ndarray) -> np.ndarray:
        """Encode uint8 [B, S, S, 3] to float32 [B, d]."""
        time.sleep(IMAGE_S * len(pixels))
        return np.ones((len(pixels), DIM), np.float32)

    def encode_captions(self, captions: list[str]) -> np.ndarray:
        """Encode B captions to float32 [B, d]."""
        return np.ones((len(captions), DIM), np.float32)

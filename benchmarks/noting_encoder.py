"""An encoder that wraps another one and notes when it is loaded: there a clock can start.

Workers register it by unpickling its description, which imports this module.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pds_ray import catalog
from pds_ray.encoders.base import Encoder, EncoderInfo

NAME = "noting"
catalog.ENCODERS[NAME] = __name__


@dataclass(frozen=True, kw_only=True)
class NotingInfo(EncoderInfo):
    """The wrapped encoder, and the file that the first actor creates when it has loaded it."""

    other: EncoderInfo
    note: Path


def describe(other: EncoderInfo, note: Path) -> NotingInfo:
    common = (NAME, other.dim, other.space, other.identity, other.preprocess, ())
    return NotingInfo(*common, other=other, note=note)


def load(info: NotingInfo, precision: str) -> Encoder:
    encoder = catalog.load_encoder(info.other, precision)
    with suppress(FileExistsError):
        info.note.touch(exist_ok=False)
    return encoder

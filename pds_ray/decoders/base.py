"""The interface of a decoder: images from prototypes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from pds_ray.config import DecodeConfig
from pds_ray.encoders.base import EncoderInfo
from pds_ray.sources.base import Source


@dataclass(frozen=True)
class DecoderInfo:
    """The description of a decoder, known without loading it."""

    name: str
    dim: int | None
    """Width of the embeddings it takes; None if its images are real ones that it looks up."""
    identity: str
    """Repository and revision, or a hash of the weights: with the request it decides the images."""
    load_args: tuple[tuple[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    """One-line notes for the user, such as that the embedding space could not be checked."""


@dataclass(frozen=True)
class DecodeBatch:
    """A request to decode B prototypes."""

    prototypes: np.ndarray
    """float32 [B, d], un-normalised image prototypes."""
    captions: list[str]
    seeds: list[int]
    nearest: list[tuple[str, str]]
    """(shard, key) of the real image nearest to each prototype."""
    noise_level: int | None = None
    """Noise added to the prototypes, for decoders that add some; None: as configured."""
    tell: Callable[[float], object] = lambda _share: None
    """Called now and then, if the decoder can tell, with the share of the batch that is done."""


class Decoder(Protocol):
    """A loaded decoder. Image i depends on row i of the batch alone, up to float tolerance."""

    def decode(self, batch: DecodeBatch) -> Iterable[Image.Image]:
        """Return one RGB image per row.

        Each is made when it is asked for where a batch of them would take much memory.
        """
        ...


class DecoderModule(Protocol):
    """A module that the catalog names as a decoder."""

    def describe(self, config: DecodeConfig, encoder: EncoderInfo) -> DecoderInfo:
        """Describe the decoder without its weights, checked against the encoder's space.

        Raises ConfigError in one line if it is nothing, or takes other embeddings.
        """
        ...

    def load(self, info: DecoderInfo, config: DecodeConfig, source: Source) -> Decoder:
        """Load the decoder, onto the GPU if there is one; `source` holds the real images."""
        ...

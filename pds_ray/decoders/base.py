"""What a decoder offers: pictures from prototypes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class DecoderInfo:
    """What a decoder is, known without loading it."""

    name: str
    dim: int | None
    """Width of the embeddings it takes; None if it takes any."""
    identity: str
    """What its pictures depend on besides the request: repository and revision, or a hash of the weights."""
    load_args: tuple[tuple[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    """What the user should know (a space that could not be checked)."""


@dataclass(frozen=True)
class DecodeBatch:
    """B prototypes to be made visible."""

    prototypes: np.ndarray
    """float32 [B, d], un-normalised image prototypes."""
    captions: list[str]
    seeds: list[int]
    nearest: list[tuple[str, str]]
    """(shard, key) of the real image nearest to each prototype."""


class Decoder(Protocol):
    """A loaded decoder. Picture i depends on row i of the batch alone, up to float tolerance."""

    def decode(self, batch: DecodeBatch) -> Iterable[Image.Image]:
        """One RGB picture a row, made when it is asked for where a batch of them would take much memory."""
        ...

"""What a backbone offers: pictures as feature vectors, to be trained in evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class BackboneInfo:
    """What a backbone is, known without building it. A backbone module offers `describe(name)` and `build(info, size)`.

    `build` gives a torch module that takes float32 [B, 3, size, size] and gives float32 [B, d]; what it draws at random
    comes from torch's global generator.
    """

    name: str
    """As the user gave it."""
    identity: str
    """What the weights at the start depend on besides the seed: architecture, and the file or tag of the weights."""
    image_size: int
    """Side of the pictures it was made for."""
    mean: tuple[float, float, float]
    """Constants that its pixels, in 0 to 1, are normalised with."""
    std: tuple[float, float, float]
    pretrained: bool
    load_args: tuple[tuple[str, Any], ...] = ()


class BackboneModule(Protocol):
    """A module that the catalog names as a backbone."""

    def describe(self, name: str) -> BackboneInfo:
        """Describe `name` without building it. Raises ConfigError in one line if it is nothing."""
        ...

    def build(self, info: BackboneInfo, image_size: int) -> nn.Module:
        """Build a module from float32 [B, 3, image_size, image_size] to float32 [B, d].

        Random weights are drawn from torch's global generator.
        """
        ...

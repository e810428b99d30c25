"""The interface of a backbone: images to feature vectors, trained in evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class BackboneInfo:
    """The description of a backbone, known without building it."""

    name: str
    """The name as the user gave it."""
    identity: str
    """All that the initial weights depend on besides the seed: architecture, file or tag."""
    image_size: int
    """The side of the images it was made for, in pixels."""
    mean: tuple[float, float, float]
    """Per channel, of pixels in 0 to 1: they are normalised with mean and std."""
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

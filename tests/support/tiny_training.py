"""A model of a few hundred weights and data for it."""

from __future__ import annotations

import torch
from torch import nn

from pds_ray.training.data import Gallery, Pixels, TrainingPairs
from pds_ray.training.two_towers import TwoTowers

PIXELS = Pixels((0.5, 0.4, 0.3), (0.5, 0.6, 0.7))
SIDE, TEXT_WIDTH, FEATURES = 16, 6, 12


class TinyBackbone(nn.Module):
    """Convolution and pooling; counts the images it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, FEATURES, 5, stride=3)
        self.seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += len(x)
        return self.conv(x).tanh().mean((2, 3))


def make_data(seed: int = 0, pairs: int = 20, images: int = 15) -> tuple[TrainingPairs, Gallery]:
    """A training set and a gallery of two captions per image."""
    draw = torch.Generator().manual_seed(seed)

    def random_images(count: int) -> torch.Tensor:
        return torch.randint(0, 256, (count, 3, SIDE, SIDE), generator=draw, dtype=torch.uint8)

    owner = torch.arange(images).repeat_interleave(2)
    held_out = Gallery(
        random_images(images), torch.randn(2 * images, TEXT_WIDTH, generator=draw), owner
    )
    return TrainingPairs(
        random_images(pairs), torch.randn(pairs, TEXT_WIDTH, generator=draw)
    ), held_out


def with_extras(pairs: TrainingPairs, seed: int = 0) -> TrainingPairs:
    """The same images with one to three captions each, and soft targets."""
    draw = torch.Generator().manual_seed(seed)
    count = len(pairs.images)
    owner = torch.arange(count).repeat_interleave(torch.arange(count) % 3 + 1)
    text = torch.randn(len(owner), TEXT_WIDTH, generator=draw)
    similarity = torch.eye(count) + torch.rand(count, count, generator=draw)
    return TrainingPairs(pairs.images, text, owner, similarity)


def make_model(part: str = "all", seed: int = 0) -> TwoTowers:
    torch.manual_seed(seed)
    return TwoTowers(TinyBackbone(), FEATURES, TEXT_WIDTH, image_head=part in ("heads", "all"))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Return whether two models' weights are the same to the bit."""
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) for name, value in one.items()
    )

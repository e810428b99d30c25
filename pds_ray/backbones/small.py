"""Small networks for the built-in world: convolutions, attention, mixed tokens.

They start from random weights, take images of 64 pixels and train in seconds on one CPU core. None
has batch statistics, so that an image's features never depend on the other images.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pds_ray.backbones.base import BackboneInfo

if TYPE_CHECKING:
    from torch import nn

IMAGE_SIZE, PATCH_SIZE = 64, 8
CHANNELS = (16, 32, 64, 128)
WIDTH, DEPTH = 64, 2
HALF = (0.5, 0.5, 0.5)


def describe(name: str) -> BackboneInfo:
    """Describe one of small_conv, small_vit, small_mixer."""
    return BackboneInfo(name, f"{name} 1", IMAGE_SIZE, HALF, HALF, pretrained=False)


def build(info: BackboneInfo, image_size: int) -> nn.Module:
    """Return the network with fresh weights: 128 features for small_conv, 64 for the others."""
    return {"small_conv": _conv, "small_vit": _vit, "small_mixer": _mixer}[info.name](image_size)


def _conv(image_size: int) -> nn.Module:  # noqa: ARG001 - takes any size
    from torch import nn

    layers: list[nn.Module] = []
    for before, after in zip((3, *CHANNELS), CHANNELS, strict=False):
        layers += [
            nn.Conv2d(before, after, 3, stride=2, padding=1),
            nn.GroupNorm(8, after),
            nn.GELU(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _vit(image_size: int) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=image_size,
        patch_size=PATCH_SIZE,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=2,
        num_classes=0,
        global_pool="avg",
    )


def _mixer(image_size: int) -> nn.Module:
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(
        img_size=image_size, patch_size=PATCH_SIZE, num_blocks=DEPTH, embed_dim=WIDTH, num_classes=0
    )

"""Small networks for the built-in world: convolutions, attention, mixed tokens.

`NAME` starts from random weights, `NAME:FILE` from those of a safetensors file, such as
`pds_ray.demo.train_backbone` writes. They take images of 64 pixels and train in seconds on one CPU
core. None has batch statistics, so that an image's features never depend on the other images.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pds_ray.backbones.base import BackboneInfo
from pds_ray.backbones.files import find_weights, require_fitting, unbuildable
from pds_ray.config import ConfigError
from pds_ray.store.storage import file_sha256

if TYPE_CHECKING:
    from torch import nn

IMAGE_SIZE, PATCH_SIZE = 64, 8
CHANNELS = (16, 32, 64, 128)
WIDTH, DEPTH = 64, 2
HALF = (0.5, 0.5, 0.5)


def describe(name: str) -> BackboneInfo:
    """Describe one of small_conv, small_vit, small_mixer, with the weights of a file or without.

    Raises ConfigError in one line if there is no such file, or if its weights do not fit.
    """
    model, given, file = name.partition(":")
    identity = f"{model} 1"
    if not given:
        return BackboneInfo(name, identity, IMAGE_SIZE, HALF, HALF, pretrained=False)
    path = find_weights(name, f"{model}:FILE or {model}")
    if path.suffix != ".safetensors":
        raise ConfigError(f"backbone {name}: {file} is no .safetensors file; save its weights so")
    identity += f" {file_sha256(path)}"
    args = (("file", str(path)),)
    info = BackboneInfo(name, identity, IMAGE_SIZE, HALF, HALF, pretrained=True, load_args=args)
    require_fitting(info, path, build)
    return info


def build(info: BackboneInfo, image_size: int) -> nn.Module:
    """Return the network, of 128 features for small_conv and 64 for the others.

    Raises ConfigError in one line if the weights of its file do not fit, as those of small_vit and
    small_mixer do not at another size.
    """
    model = info.name.partition(":")[0]
    network = {"small_conv": _conv, "small_vit": _vit, "small_mixer": _mixer}[model](image_size)
    if info.pretrained:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            network.load_state_dict(load_file(dict(info.load_args)["file"]))
        except (SafetensorError, RuntimeError, OSError) as error:
            raise unbuildable(info, error) from error
    return network


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

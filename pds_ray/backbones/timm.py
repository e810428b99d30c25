"""Any timm model: `NAME` (published weights), `NAME:FILE` (yours) or `NAME:scratch` (none)."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pds_ray.backbones.base import BackboneInfo
from pds_ray.config import ConfigError
from pds_ray.errors import first_line
from pds_ray.store.hub import require_repository
from pds_ray.store.storage import file_sha256

if TYPE_CHECKING:
    from torch import nn

SCRATCH = "scratch"
LOGITS = ("nf_resnet50", "nf_regnet_b1", "vit_tiny_patch16_224")
"""Published evaluations take the 1,000 ImageNet logits of these pretrained models as embedding."""
HALF = (0.5, 0.5, 0.5)
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def describe(name: str) -> BackboneInfo:
    """Describe a model by timm's tables.

    Raises ConfigError in one line if there is no such model, or no such weights.
    """
    import timm

    model, _, weights = name.partition(":")
    if not timm.is_model(model):
        near = ", ".join(difflib.get_close_matches(model, timm.list_models(), n=4, cutoff=0.4))
        known = (
            f"near it in timm: {near}" if near else "timm.list_models() names those that there are"
        )
        raise ConfigError(
            f"unknown backbone {model!r}; {known}; or one of small_conv, small_vit, small_mixer"
        )
    cfg = timm.get_pretrained_cfg(model, allow_unregistered=False)
    pretrained = weights != SCRATCH
    logits = pretrained and model.partition(".")[0] in LOGITS
    args: dict[str, Any] = {"model_name": model, **({} if logits else {"num_classes": 0})}
    identity = f"{model} {SCRATCH}"
    if pretrained:
        identity, of_weights = _weights(name, cfg)
        args |= {"pretrained": True, **of_weights}
    mean, std = (_triple(cfg.mean), _triple(cfg.std)) if cfg else (HALF, HALF)
    size = cfg.input_size[-1] if cfg else 224
    return BackboneInfo(name, identity, size, mean, std, pretrained, tuple(args.items()))


def _weights(name: str, cfg: Any) -> tuple[str, dict[str, Any]]:
    """Return the identity of pretrained weights, and the arguments of timm that load them.

    `cfg` is timm's entry for the published weights. Raises ConfigError if there are none.
    """
    model, _, file = name.partition(":")
    if file:
        path = Path(file).expanduser()
        if not path.is_file():
            raise ConfigError(
                f"backbone {name}: {file} is no file; "
                f"give {model}:FILE, {model}:{SCRATCH} or {model}"
            )
        overlay = {"file": str(path.resolve())}
        return f"{model} {file_sha256(path)}", {"pretrained_cfg_overlay": overlay}
    if not cfg or not (cfg.hf_hub_id or cfg.url or cfg.file):
        raise ConfigError(
            f"backbone {name}: timm has no weights for it; give {model}:FILE or {model}:{SCRATCH}"
        )
    if cfg.hf_hub_id:
        instead = f"give a checkpoint as {model}:FILE, or {model}:{SCRATCH}"
        require_repository(cfg.hf_hub_id, None, WEIGHT_FILES, f"backbone {name}", instead)
    return f"{model}.{cfg.tag}", {}


def _triple(values: Any) -> tuple[float, float, float]:
    red, green, blue = values
    return float(red), float(green), float(blue)


def build(info: BackboneInfo, image_size: int) -> nn.Module:
    """Return the model, adapted to `image_size` where its architecture is tied to one.

    Raises ConfigError in one line if the weights cannot be had or do not fit.
    """
    import timm

    args = dict(info.load_args)
    cfg = timm.get_pretrained_cfg(args["model_name"], allow_unregistered=False)
    if cfg and cfg.fixed_input_size and image_size != cfg.input_size[-1]:
        args["img_size"] = image_size
    try:
        return timm.create_model(**args)
    except Exception as error:  # timm, torch and the hub client raise many kinds of errors
        line = first_line(error)
        raise ConfigError(f"backbone {info.name}: cannot be built ({line})") from error

"""Any timm model: `NAME` (published weights), `NAME:FILE` (yours) or `NAME:scratch` (none)."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pds_ray.backbones.base import BackboneInfo
from pds_ray.backbones.files import find_weights, require_fitting, unbuildable
from pds_ray.config import ConfigError
from pds_ray.errors import squashed
from pds_ray.store.hub import require_repository
from pds_ray.store.storage import file_sha256

if TYPE_CHECKING:
    from torch import nn

SCRATCH = "scratch"
SMALL = ("small_conv", "small_vit", "small_mixer")
ELSEWHERE = ("hf-hub:", "hf_hub:", "timm/")
"""Beginnings of names that other programs take."""
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
    if not _is_known(model):
        raise ConfigError(f"unknown backbone {model!r}; {_advice(name)}")
    cfg = timm.get_pretrained_cfg(model, allow_unregistered=False)
    pretrained = weights != SCRATCH
    logits = pretrained and model.partition(".")[0] in LOGITS
    args: dict[str, Any] = {"model_name": model, **({} if logits else {"num_classes": 0})}
    identity, file = f"{model} {SCRATCH}", None
    if pretrained:
        identity, of_weights, file = _weights(name, cfg)
        args |= {"pretrained": True, **of_weights}
    mean, std = (_triple(cfg.mean), _triple(cfg.std)) if cfg else (HALF, HALF)
    size = cfg.input_size[-1] if cfg else 224
    info = BackboneInfo(name, identity, size, mean, std, pretrained, tuple(args.items()))
    if file:
        require_fitting(info, file, build)
    return info


def _is_known(model: str) -> bool:
    """Return whether timm has the architecture, and the tag if one is given."""
    import timm

    return timm.is_model(model) and ("." not in model or model in timm.list_pretrained())


def _advice(name: str) -> str:
    """Return what to give in place of a name that timm does not know, as `give NAME` if clear."""
    import timm

    for beginning in ELSEWHERE:
        name = name.removeprefix(beginning)
    model, colon, weights = name.partition(":")
    known = [*SMALL, *timm.list_models(), *timm.list_pretrained()]
    right = next((one for one in known if squashed(one) == squashed(model)), None)
    if right:
        return f"give {right}{colon}{weights}"
    near = difflib.get_close_matches(model, known, n=4, cutoff=0.4)
    there = f"near it: {', '.join(near)}" if near else "timm.list_models() names all"
    return there if set(near) & set(SMALL) else f"{there}; or one of {', '.join(SMALL)}"


def _weights(name: str, cfg: Any) -> tuple[str, dict[str, Any], Path | None]:
    """Return the identity of pretrained weights, timm's arguments that load them, and their file.

    `cfg` is timm's entry for the published weights; there is no file while they are on the hub.
    Raises ConfigError if there are none.
    """
    model, _, file = name.partition(":")
    if file:
        path = find_weights(name, f"{model}:FILE, {model}:{SCRATCH} or {model}")
        overlay = {"file": str(path)}
        return f"{model} {file_sha256(path)}", {"pretrained_cfg_overlay": overlay}, path
    if not cfg or not (cfg.hf_hub_id or cfg.url or cfg.file):
        raise ConfigError(
            f"backbone {name}: timm has no weights for it; give {model}:FILE or {model}:{SCRATCH}"
        )
    cached = None
    if cfg.hf_hub_id:
        instead = f"give a checkpoint as {model}:FILE, or {model}:{SCRATCH}"
        cached = require_repository(cfg.hf_hub_id, None, WEIGHT_FILES, f"backbone {name}", instead)
    return f"{model}.{cfg.tag}", {}, cached


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
        raise unbuildable(info, error) from error

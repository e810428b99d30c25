"""Name -> module of every plug-in and method: the one place to add one.

A plug-in is one file in its folder and one line here. Modules are imported only when used, so that
naming one costs nothing; an unknown name lists the known ones.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from pds_ray.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from pds_ray.backbones.base import BackboneInfo, BackboneModule
    from pds_ray.config import DecodeConfig, EmbedConfig, FilesConfig
    from pds_ray.decoders.base import Decoder, DecoderInfo, DecoderModule
    from pds_ray.distillers.base import Distiller
    from pds_ray.encoders.base import (
        Encoder,
        EncoderInfo,
        EncoderModule,
        TextEncoder,
        TextEncoderInfo,
        TextEncoderModule,
    )
    from pds_ray.methods.base import Method
    from pds_ray.selectors.base import Selector
    from pds_ray.sources.base import Source

SOURCES = {  # URI scheme -> class(uri, read); else a folder, or a tar path, glob or brace range
    "scenes": "pds_ray.sources.scenes:ScenesSource",
    "flickr30k": "pds_ray.sources.karpathy:KarpathySource",
    "coco": "pds_ray.sources.karpathy:KarpathySource",
    "folder": "pds_ray.sources.folder:FolderSource",
    "parquet": "pds_ray.sources.parquet:ParquetSource",
    "hf": "pds_ray.sources.hub:HubSource",
    "": "pds_ray.sources.webdataset:WebDatasetSource",
}

ENCODERS = {  # prefix of the encoder name -> module with describe(name) and load(info, precision)
    "": "pds_ray.encoders.open_clip",
}

TEXT_ENCODERS = {  # prefix of a text encoder's name -> module, as for encoders
    **ENCODERS,
    "bert": "pds_ray.encoders.hf_text",
    "distilbert": "pds_ray.encoders.hf_text",
}

BACKBONES = {  # NAME or NAME:FILE -> module with describe(name), build(info, size); else timm's
    "small_conv": "pds_ray.backbones.small",
    "small_vit": "pds_ray.backbones.small",
    "small_mixer": "pds_ray.backbones.small",
    "": "pds_ray.backbones.timm",
}

DECODERS = {  # decoder name -> module with describe(config, encoder) and load(info, config, source)
    "unclip": "pds_ray.decoders.unclip",
    "nearest": "pds_ray.decoders.nearest",
}

SELECTORS = {  # method -> module with DESCRIPTION and select(candidates, pairs, seed, config)
    "random": "pds_ray.selectors.random",
    "herding": "pds_ray.selectors.herding",
    "k_center": "pds_ray.selectors.k_center",
    "forgetting": "pds_ray.selectors.forgetting",
    "clip_score": "pds_ray.selectors.clip_score",
}

DISTILLERS = {  # method -> module with TRAIN, DEFAULTS, variables(...) and step(...)
    "bi_trajectory": "pds_ray.distillers.bi_trajectory",
    "lors": "pds_ray.distillers.lors",
    "repblend": "pds_ray.distillers.repblend",
    "lora_matching": "pds_ray.distillers.lora_matching",
    "mdm": "pds_ray.distillers.mdm",
}

METHODS = {  # method -> the Method: its stages in order
    "pds": "pds_ray.methods.pds:PDS",
    "coverage": "pds_ray.methods.coverage:COVERAGE",
    **dict.fromkeys(SELECTORS, "pds_ray.methods.selection:SELECTION"),
    **dict.fromkeys(DISTILLERS, "pds_ray.methods.optimisation:OPTIMISATION"),  # after its start
}

STARTS = {"real": "random", "noise": "random"}
"""Other names of a start -> the method that chooses its pairs."""


def _known(kind: str, table: dict[str, str], name: str) -> str:
    if name not in table:
        raise ConfigError(f"unknown {kind} {name!r}; known: {', '.join(filter(None, table))}")
    return table[name]


def make_source(uri: str, read: FilesConfig | None = None) -> Source:
    """Return the source a URI names, read by the options `read`, by default those of a run.

    Raises SourceError or ConfigError in one line if it cannot be used.
    """
    scheme, _, rest = uri.partition(":")
    if _is_misspelt(uri):
        _known("source", SOURCES, scheme)
    if scheme not in SOURCES or rest.startswith("//"):
        scheme = "folder" if os.path.isdir(os.path.expanduser(uri)) else ""
    module, _, cls = SOURCES[scheme].partition(":")
    make = getattr(import_module(module), cls)
    return make(uri) if read is None else make(uri, read)


def _is_misspelt(uri: str) -> bool:
    """Return whether a URI names no file and is no pattern, but begins nearly as a source does."""
    scheme, colon, rest = uri.partition(":")
    if scheme in SOURCES or not colon or rest.startswith("//"):
        return False
    near = difflib.get_close_matches(scheme.lower(), SOURCES, cutoff=0.7)
    return bool(near) and not re.search(r"[*?\[{@\s]|::", uri) and not os.path.exists(uri)


def describe_encoder(config: EmbedConfig) -> EncoderInfo:
    """Describe the encoder without loading its weights.

    Raises ConfigError in one line if there is no such encoder.
    """
    return _encoder_module(config.encoder).describe(config.encoder)


def load_encoder(info: EncoderInfo, precision: str) -> Encoder:
    """Return the encoder with its weights, on the GPU if there is one."""
    return _encoder_module(info.name).load(info, precision)


def describe_text_encoder(name: str) -> EncoderInfo | TextEncoderInfo:
    """Describe a text encoder. Raises ConfigError in one line if there is no such encoder."""
    return _text_encoder_module(name).describe(name)


def load_text_encoder(info: EncoderInfo | TextEncoderInfo, precision: str) -> TextEncoder:
    """Return the text encoder with its weights, on the GPU if there is one."""
    return _text_encoder_module(info.name).load(info, precision)


def _text_encoder_module(name: str) -> TextEncoderModule:
    """Return the module of a name. Raises ConfigError if it lacks its prefix: bert-base-uncased."""
    prefix = name.partition(":")[0]
    parts = re.split(r"[-_.]", name.rstrip("/").rpartition("/")[2].lower())
    meant = next((part for part in parts if part in TEXT_ENCODERS and part), "")
    if meant not in ("", name) and ":" not in name:
        raise ConfigError(f"text encoder {name}: its kind comes first; give {meant}:{name}")
    entry = TEXT_ENCODERS[prefix if prefix in TEXT_ENCODERS else ""]
    return cast("TextEncoderModule", import_module(entry))


def describe_backbone(name: str) -> BackboneInfo:
    """Describe a backbone without building it.

    Raises ConfigError in one line if there is no such backbone.
    """
    return _backbone_module(name).describe(name)


def build_backbone(info: BackboneInfo, image_size: int) -> nn.Module:
    """Return the backbone with its initial weights.

    Random weights come from torch's global generator.
    """
    return _backbone_module(info.name).build(info, image_size)


def _backbone_module(name: str) -> BackboneModule:
    entry = BACKBONES.get(name.partition(":")[0], BACKBONES[""])
    return cast("BackboneModule", import_module(entry))


def _encoder_module(name: str) -> EncoderModule:
    prefix = name.partition(":")[0]
    entry = ENCODERS[prefix if prefix in ENCODERS else ""]
    return cast("EncoderModule", import_module(entry))


def describe_decoder(config: DecodeConfig, encoder: EncoderInfo) -> DecoderInfo:
    """Describe the decoder, checked against the encoder's space.

    Raises ConfigError in one line if they do not fit.
    """
    return _decoder_module(config.decoder).describe(config, encoder)


def load_decoder(info: DecoderInfo, config: DecodeConfig, source: Source) -> Decoder:
    """Return the decoder, ready to decode; some look up real images in `source`."""
    return _decoder_module(config.decoder).load(info, config, source)


def _decoder_module(name: str) -> DecoderModule:
    return cast("DecoderModule", import_module(_known("decoder", DECODERS, name)))


def method(name: str, budget: str = "", init: str = "random") -> Method:
    """Return the method called `name`, with the stage of a budget if there is one.

    A distiller improves the set of another method, or of a finished run: that which `init` names.
    Its stages come after those that make this set. Raises ConfigError listing the known names.
    """
    module, _, attribute = _known("method", METHODS, name).partition(":")
    found = getattr(import_module(module), attribute)
    if name in DISTILLERS:
        found = import_module("pds_ray.methods.start").on_start(found, init)
    return import_module("pds_ray.methods.budget").on_budget(found) if budget else found


def recorded_method(config: Mapping[str, Any]) -> Method:
    """Return the method of a configuration as run.json holds it, of an earlier version, too."""
    init = config.get("distill", {}).get("init", "random")
    return method(config.get("method", "pds"), config.get("budget", ""), init)


def start_of(method: str, init: str) -> str:
    """Return the method that makes the pairs, "" where they are those of a finished run.

    That is `method` itself, unless it improves a start.
    """
    if method not in DISTILLERS:
        return method
    name = STARTS.get(init, init)
    return name if name in METHODS else ""


def distiller(method: str) -> Distiller:
    """Return the distiller of a method that learns its set. Raises ConfigError."""
    return cast("Distiller", import_module(_known("distiller", DISTILLERS, method)))


def selector(method: str) -> Selector:
    """Return the selector of a method that chooses real pairs."""
    return cast("Selector", import_module(_known("selector", SELECTORS, method)))

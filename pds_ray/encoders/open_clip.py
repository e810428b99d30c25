"""open_clip models: by name and tag, from a checkpoint file, from a folder or from the hub.

Names: `MODEL:TAG` (ViT-L-14:openai), `MODEL:/path/to/checkpoint`, `local-dir:/path`,
`hf-hub:org/repo`, and `demo`, the model in the package.
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pds_ray.config import ConfigError
from pds_ray.encoders.base import ROW_MULTIPLE, EncoderInfo
from pds_ray.encoders.open_clip_names import (
    CONFIG,
    HUB,
    HUB_WEIGHTS,
    QUICK_GELU,
    advice,
    architecture,
    names_of,
    published_as,
    tags,
    weights_of,
)
from pds_ray.errors import cause, first_line
from pds_ray.modalities.image import Preprocess
from pds_ray.store.hub import cached_sha256, require_repository
from pds_ray.store.storage import file_sha256, folder_sha256
from pds_ray.store.weights import loading_reason, require_vocabulary, require_whole

if TYPE_CHECKING:
    import torch
    from open_clip import SimpleTokenizer

DEFAULT_SIZE = 224
ARRAYS = (".npz", ".npy")  # weights of NumPy, which are read whole or not at all
SHORT_CONTEXTS = (16, 24, 32, 48)  # tokens; the mean caption has a dozen
MAX_WORD_BYTES = 768
"""Bytes of a word that are read: 75 tokens, all that fit, would need 10 bytes each to go beyond."""
MAX_WORDS_KNOWN = 1 << 17
"""Words whose tokens are kept."""


@dataclass(frozen=True)
class _Found:
    """The files behind a name."""

    info: EncoderInfo
    weights: Path | None
    """None if they are still on the hub."""
    repository: str = ""


def demo_folder() -> Path:
    """Return the folder of the built-in CLIP, an open_clip folder like any other."""
    return Path(str(resources.files("pds_ray.demo") / "weights" / "clip"))


def describe(name: str) -> EncoderInfo:
    """Describe `name` by its files, of whose weights only names and shapes are looked at.

    All but the built-in model are tried, which imports open_clip and takes seconds. Raises
    ConfigError in one line if it is nothing, or its files are damaged or do not fit each other.
    """
    if name == "demo":
        return _find_folder(name, demo_folder()).info
    found = _find(name)
    _try_loading(found.info, found.weights)
    if found.repository:
        sha256 = cached_sha256(found.weights) if found.weights else None
    else:
        sha256 = found.info.space
    same = (*names_of(found.repository, sha256), sha256)
    aliases = tuple(other for other in same if other and other != found.info.space)
    return replace(found.info, aliases=aliases)


def _find(name: str) -> _Found:
    model, _, weights = name.partition(":")
    if model == "local-dir":
        return _find_folder(name, Path(weights).expanduser())
    if model == "hf-hub":
        return _find_on_hub(name)
    config = None if Path(name).expanduser().exists() else architecture(model)
    if config is None:
        raise ConfigError(f"encoder {name}: there is no open_clip model {model!r}; {advice(name)}")
    if not weights:
        known = tags(model.replace("/", "-"))
        published = f"{advice(name)} (tags: {', '.join(known)}) or" if known else "give"
        raise ConfigError(f"encoder {name}: which weights? {published} {model}:FILE")
    if Path(weights).expanduser().is_file():
        return _find_checkpoint(name, model, config, Path(weights).expanduser().resolve())
    return _find_tag(name, model, config, weights)


def _find_folder(name: str, folder: Path) -> _Found:
    config_path = folder / CONFIG
    if not config_path.is_file():
        raise ConfigError(
            f"encoder {name}: {config_path} does not exist; an open_clip folder must hold it"
            f"{_hint(name)}"
        )
    try:
        config = json.loads(config_path.read_text())
        model = config["model_cfg"]
        dim = int(model["embed_dim"])
        preprocess = _preprocess(name, model, config.get("preprocess_cfg") or {})
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"encoder {name}: {config_path} is not an open_clip configuration ({cause(error)})"
        ) from None
    weights = weights_of(folder)
    if weights is None:
        raise ConfigError(f"encoder {name}: no .safetensors weights in {folder}")
    require_whole(weights, f"encoder {name}")
    info = EncoderInfo(
        name=name,
        dim=dim,
        space=file_sha256(weights),
        identity=folder_sha256(folder, ("*.safetensors", "*.json", "*.txt")),
        preprocess=preprocess,
        load_args=(("model_name", f"local-dir:{folder.resolve()}"),),
    )
    return _Found(info, weights)


def _hint(name: str) -> str:
    """Return the right name as the end of a message that says what is wrong; empty if unclear."""
    hint = advice(name)
    return f"; {hint}" if "give " in hint else ""


def _find_on_hub(name: str) -> _Found:
    from open_clip import factory

    repository = name.removeprefix(HUB)
    try:
        config = factory._get_hf_config(repository)
        info = EncoderInfo(
            name=name,
            dim=int(config["model_cfg"]["embed_dim"]),
            space=name,
            identity=f"{name} {json.dumps(config, sort_keys=True)}",
            preprocess=_preprocess(name, config["model_cfg"], config.get("preprocess_cfg", {})),
            load_args=(("model_name", name),),
        )
    except Exception as error:  # the hub client raises many kinds, all meaning: cannot be had
        raise ConfigError(
            f"encoder {name}: no open_clip model of this name can be fetched or found in the cache "
            f"({first_line(error)}); {advice(name)}"
        ) from error
    return _Found(info, _cached_weights(name, repository, HUB_WEIGHTS), repository)


def _cached_weights(name: str, repository: str, files: tuple[str, ...]) -> Path | None:
    """Return the weights of a repository if they are in the cache, whole.

    None if the hub has them. Raises ConfigError if they cannot be had.
    """
    who, instead = f"encoder {name}", "give a checkpoint as MODEL:FILE, or local-dir:PATH"
    weights = require_repository(repository, None, files, who, instead)
    if weights:
        require_whole(weights, who)
    return weights


def _find_checkpoint(name: str, model: str, config: dict[str, Any], checkpoint: Path) -> _Found:
    require_whole(checkpoint, f"encoder {name}")
    info = EncoderInfo(
        name=name,
        dim=int(config["embed_dim"]),
        space=file_sha256(checkpoint),
        identity=f"{model}:{file_sha256(checkpoint)}",
        preprocess=_preprocess(name, config, {}),
        load_args=(("model_name", model), ("pretrained", str(checkpoint))),
    )
    return _Found(info, checkpoint)


def _find_tag(name: str, model: str, config: dict[str, Any], tag: str) -> _Found:
    """Find published weights by their tag. Raises ConfigError if they cannot be had."""
    from open_clip import pretrained

    published = published_as(model, tag)
    if published is None:
        known = ", ".join(tags(model)) or "none"
        raise ConfigError(
            f"encoder {name}: {tag!r} is neither a file nor a tag of {model}; its tags: {known}"
            f"{_hint(name)}"
        )
    entry = pretrained.get_pretrained_cfg(model, tag)
    weights, repository = None, published.repository
    if repository:
        weights = _cached_weights(name, repository, published.files)
    identity = f"{model.removesuffix(QUICK_GELU)}:{tag}"
    info = EncoderInfo(
        name=name,
        dim=int(config["embed_dim"]),
        space=identity,
        identity=identity,
        preprocess=_preprocess(name, config, entry),
        # open_clip only warns when weights trained with QuickGELU meet an architecture without it
        load_args=(
            ("model_name", model),
            ("pretrained", tag),
            ("force_quick_gelu", bool(entry.get("quick_gelu"))),
        ),
    )
    return _Found(info, weights, repository)


def _preprocess(name: str, model_cfg: dict[str, Any], overrides: dict[str, Any]) -> Preprocess:
    size = model_cfg["vision_cfg"].get("image_size", DEFAULT_SIZE)
    if isinstance(size, list):
        if len(set(size)) != 1:
            raise ConfigError(
                f"encoder {name}: its images are not square ({size}), which is not supported; "
                "take another model"
            )
        size = size[0]
    return Preprocess(
        size=int(size),
        interpolation=overrides.get("interpolation") or "bicubic",
        resize_mode=overrides.get("resize_mode") or "shortest",
        fill=int(overrides.get("fill_color") or 0),
    )


@cache  # a comparison describes the encoder of every row
def _try_loading(info: EncoderInfo, weights: Path | None) -> None:
    """Build the model on torch's meta device, hold the weights against it, make the tokenizer.

    open_clip's own code decides what fits, and no tensor is read. Raises ConfigError in one line.
    """
    import open_clip
    import torch

    args = {name: value for name, value in info.load_args if name != "pretrained"}
    where, what = torch.device("meta"), "its configuration makes no model"
    try:
        # open_clip warns that no weights are loaded, torch that copies to that device copy nothing
        with _quiet(logging.CRITICAL), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with where:
                model = open_clip.create_model(
                    **args,
                    device=where,
                    load_weights=False,
                    pretrained_image=False,
                    pretrained_text=False,
                )
            if weights and weights.suffix not in ARRAYS:
                what = f"the weights {weights} do not fit"
                # safetensors maps the file, and knows no meta device
                device = "cpu" if weights.suffix == ".safetensors" else "meta"
                open_clip.load_checkpoint(model, str(weights), device=device)
            what = "its tokenizer cannot be loaded"
            require_vocabulary(open_clip.get_tokenizer(args["model_name"]))
    except Exception as error:  # open_clip, torch, transformers and the hub raise many kinds
        raise ConfigError(f"encoder {info.name}: {what} ({loading_reason(error)})") from error


def load(info: EncoderInfo, precision: str) -> OpenClipEncoder:
    """Load the model, onto the GPU if there is one.

    Raises ConfigError in one line if the weights cannot be had.
    """
    return OpenClipEncoder(info, precision)


def bound_words(tokenizer: SimpleTokenizer) -> None:
    """Bound the cost of a word in CLIP's own tokenizer.

    Its time grows with the square of the word's length (a minute for 20,000 letters), and it keeps
    every word that it ever met.
    """
    encode, specials = tokenizer.bpe, dict(tokenizer.cache)

    @lru_cache(MAX_WORDS_KNOWN)
    def bounded(word: str) -> str:
        tokenizer.cache = dict(specials)
        return encode(word[:MAX_WORD_BYTES])

    tokenizer.bpe = bounded


def _by_length(model: Any) -> dict[int, Any]:
    """Return context length -> `model` with its weights and that context, in rising order.

    Under a causal mask nothing behind the end of a caption acts on it: most take a fifth of the
    work. The context of a caption depends on itself alone, not on its batch. Empty if the model
    must see all tokens.
    """
    import open_clip
    import torch

    if not isinstance(model, open_clip.CLIP) or model.attn_mask is None:
        return {}
    if model.text_pool_type not in ("argmax", "eos"):
        return {}
    models = {}
    shorter = [length for length in SHORT_CONTEXTS if length < model.context_length]
    for length in (*shorter, model.context_length):
        short = copy.copy(model)
        positions = torch.nn.Parameter(model.positional_embedding[:length], requires_grad=False)
        short._parameters = {**model._parameters, "positional_embedding": positions}
        short._buffers = {**model._buffers, "attn_mask": model.attn_mask[:length, :length]}
        models[length] = short
    return models


@contextmanager
def _quiet(least: int = logging.WARNING) -> Iterator[None]:
    """Keep open_clip's reports off the terminal, and leave the root logger as it was.

    open_clip reports every step at INFO by `logging.info`, which gives a root logger without
    handlers one.
    """
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    root.setLevel(max(level, least))
    try:
        yield
    finally:
        root.setLevel(level)
        for handler in set(root.handlers).difference(handlers):
            root.removeHandler(handler)


class OpenClipEncoder:
    """An open_clip model in evaluation mode; pixels are normalised on the device."""

    def __init__(self, info: EncoderInfo, precision: str = "auto") -> None:
        import open_clip
        import torch

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        args = dict(info.load_args)
        try:
            with _quiet():
                self.model = open_clip.create_model(
                    **args, device=self.device, require_pretrained=True
                ).eval()
                self.tokenizer = open_clip.get_tokenizer(args["model_name"])
        # open_clip and the hub client raise many kinds: missing, corrupt, unreachable
        except Exception as error:
            raise ConfigError(
                f"encoder {info.name}: cannot load the weights ({loading_reason(error)})"
            ) from error
        if isinstance(self.tokenizer, open_clip.SimpleTokenizer):
            bound_words(self.tokenizer)
        cfg = open_clip.get_model_preprocess_cfg(self.model)
        if precision == "auto":
            precision = "bf16" if self.device.type == "cuda" else "fp32"
        dtypes = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}
        self.autocast_dtype = dtypes[precision]
        self.mean = torch.tensor(cfg["mean"], device=self.device).view(1, 3, 1, 1)
        self.std = torch.tensor(cfg["std"], device=self.device).view(1, 3, 1, 1)
        self.dim = info.dim
        self.by_length = _by_length(self.model)

    def _forward(self, encode: Any, batch: torch.Tensor) -> np.ndarray:
        import torch

        dtype = self.autocast_dtype
        autocast = torch.autocast(self.device.type, dtype, enabled=dtype is not None)
        with torch.inference_mode(), autocast:
            return encode(batch, normalize=False).float().cpu().numpy()

    def encode_images(self, pixels: np.ndarray) -> np.ndarray:
        """Encode pixels, uint8 [B, S, S, 3]. float32 [B, d]."""
        import torch

        batch = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).float().div_(255)
        return self._forward(self.model.encode_image, (batch - self.mean) / self.std)

    def encode_captions(self, captions: list[str]) -> np.ndarray:
        """Encode B captions, truncated to the context length. float32 [B, d]."""
        tokens = self.tokenizer(captions)
        if not self.by_length:
            return self._forward(self.model.encode_text, tokens.to(self.device))
        lengths = np.array(list(self.by_length))
        ends = tokens if self.model.text_pool_type == "argmax" else tokens == self.model.text_eos_id
        enough = lengths[np.searchsorted(lengths, ends.int().argmax(dim=1).numpy() + 1)]
        found = np.empty((len(captions), self.dim), np.float32)
        for length in np.unique(enough).tolist():
            rows = np.flatnonzero(enough == length)
            filled = np.resize(rows, len(rows) + -len(rows) % ROW_MULTIPLE)
            some = tokens[filled, :length].to(self.device)
            found[rows] = self._forward(self.by_length[length].encode_text, some)[: len(rows)]
        return found

"""open_clip models: by name and tag, from a checkpoint file, from a folder or from the hub.

Names: `MODEL:TAG` (ViT-L-14:openai), `MODEL:/path/to/checkpoint`, `local-dir:/path`,
`hf-hub:org/repo`, and `demo`, the model in the package.
"""

from __future__ import annotations

import copy
import difflib
import importlib.util
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pds_ray.config import ConfigError
from pds_ray.encoders.base import ROW_MULTIPLE, EncoderInfo
from pds_ray.errors import first_line
from pds_ray.modalities.image import Preprocess
from pds_ray.store.hub import require_repository
from pds_ray.store.storage import file_sha256, folder_sha256

if TYPE_CHECKING:
    import torch
    from open_clip import SimpleTokenizer

DEFAULT_SIZE = 224
SHORT_CONTEXTS = (16, 24, 32, 48)  # tokens; the mean caption has a dozen
MAX_WORD_BYTES = 768
"""Bytes of a word that are read: 75 tokens, all that fit, would need 10 bytes each to go beyond."""
MAX_WORDS_KNOWN = 1 << 17
"""Words whose tokens are kept."""
HUB_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def demo_folder() -> Path:
    """Return the folder of the built-in CLIP, an open_clip folder like any other."""
    return Path(str(resources.files("pds_ray.demo") / "weights" / "clip"))


def describe(name: str) -> EncoderInfo:
    """Describe `name` from configuration files alone.

    Raises ConfigError in one line if it is nothing.
    """
    if name == "demo":
        return _describe_folder(name, demo_folder())
    prefix, _, rest = name.partition(":")
    if prefix == "local-dir":
        return _describe_folder(name, Path(rest).expanduser())
    if prefix == "hf-hub":
        return _describe_hub(name)
    return _describe_builtin(name, prefix, rest)


def _describe_folder(name: str, folder: Path) -> EncoderInfo:
    config_path = folder / "open_clip_config.json"
    if not config_path.is_file():
        raise ConfigError(
            f"encoder {name}: {config_path} does not exist; an open_clip folder must hold it"
        )
    try:
        config = json.loads(config_path.read_text())
        model = config["model_cfg"]
        dim = int(model["embed_dim"])
        preprocess = _preprocess(model, config.get("preprocess_cfg") or {})
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"encoder {name}: {config_path} is not an open_clip configuration ({error!r})"
        ) from None
    weights = [path.name for path in folder.glob("*.safetensors")]
    if not weights:
        raise ConfigError(f"encoder {name}: no .safetensors weights in {folder}")
    loaded = min(weights, key=lambda file: (_preference(file), file))
    return EncoderInfo(
        name=name,
        dim=dim,
        space=file_sha256(folder / loaded),
        identity=folder_sha256(folder, ("*.safetensors", "*.json", "*.txt")),
        preprocess=preprocess,
        load_args=(("model_name", f"local-dir:{folder.resolve()}"),),
    )


def _preference(weights: str) -> int:
    """Rank a weights file: of several, open_clip loads the lowest."""
    preferred = (
        "open_clip_model.safetensors",
        "open_clip_pytorch_model.safetensors",
        "model.safetensors",
    )
    return preferred.index(weights) if weights in preferred else len(preferred)


def _describe_hub(name: str) -> EncoderInfo:
    from open_clip import factory

    try:
        config = factory._get_hf_config(name.removeprefix("hf-hub:"))
    except Exception as error:  # the hub client raises many kinds, all meaning: cannot be had
        raise ConfigError(
            f"encoder {name}: cannot be fetched or found in the cache ({first_line(error)})"
        ) from error
    return EncoderInfo(
        name=name,
        dim=int(config["model_cfg"]["embed_dim"]),
        space=name,
        identity=f"{name} {json.dumps(config, sort_keys=True)}",
        preprocess=_preprocess(config["model_cfg"], config.get("preprocess_cfg", {})),
        load_args=(("model_name", name),),
    )


def _describe_builtin(name: str, model: str, weights: str) -> EncoderInfo:
    architecture = _architecture(model)
    if architecture is None:
        close = ", ".join(_close(model)) or "ViT-B-32, ViT-L-14, ViT-H-14"
        raise ConfigError(
            f"encoder {name}: no open_clip model {model!r}; near it: {close}; or local-dir:PATH"
        )
    if not weights:
        raise ConfigError(
            f"encoder {name}: which weights? give {model}:TAG (such as {model}:openai) "
            f"or {model}:FILE"
        )
    if Path(weights).expanduser().is_file():
        checkpoint = Path(weights).expanduser().resolve()
        return _describe_checkpoint(name, model, architecture, checkpoint)
    return _describe_tag(name, model, architecture, weights)


def _describe_checkpoint(
    name: str, model: str, architecture: dict[str, Any], checkpoint: Path
) -> EncoderInfo:
    return EncoderInfo(
        name=name,
        dim=int(architecture["embed_dim"]),
        space=file_sha256(checkpoint),
        identity=f"{model}:{file_sha256(checkpoint)}",
        preprocess=_preprocess(architecture, {}),
        load_args=(("model_name", model), ("pretrained", str(checkpoint))),
    )


def _describe_tag(name: str, model: str, architecture: dict[str, Any], weights: str) -> EncoderInfo:
    """Describe published weights, by their tag; raise ConfigError if they cannot be had."""
    from open_clip import pretrained

    tag = pretrained.get_pretrained_cfg(model, weights)
    if not tag:
        tags = ", ".join(pretrained.list_pretrained_tags_by_model(model)) or "none"
        raise ConfigError(
            f"encoder {name}: {weights!r} is neither a file nor a tag of {model}; its tags: {tags}"
        )
    repository, _, file = tag.get("hf_hub", "").rpartition("/")
    if repository:
        instead = f"give a checkpoint as {model}:FILE, or local-dir:PATH"
        files = (file,) if file else HUB_WEIGHTS
        require_repository(repository, None, files, f"encoder {name}", instead)
    identity = f"{model.removesuffix('-quickgelu')}:{weights}"
    return EncoderInfo(
        name=name,
        dim=int(architecture["embed_dim"]),
        space=identity,
        identity=identity,
        preprocess=_preprocess(architecture, tag),
        # open_clip only warns when weights trained with QuickGELU meet an architecture without it
        load_args=(
            ("model_name", model),
            ("pretrained", weights),
            ("force_quick_gelu", bool(tag.get("quick_gelu"))),
        ),
    )


def _architectures() -> Path:
    spec = importlib.util.find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("open_clip is not installed: pip install open_clip_torch")
    return Path(spec.submodule_search_locations[0]) / "model_configs"


def _architecture(model: str) -> dict[str, Any] | None:
    """Read the configuration of an architecture, None if there is none.

    The file is read directly, since importing open_clip takes seconds.
    """
    path = _architectures() / f"{model.replace('/', '-')}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _close(model: str) -> list[str]:
    names = [path.stem for path in _architectures().glob("*.json")]
    return difflib.get_close_matches(model, names, n=4, cutoff=0.5)


def _preprocess(model_cfg: dict[str, Any], overrides: dict[str, Any]) -> Preprocess:
    size = model_cfg["vision_cfg"].get("image_size", DEFAULT_SIZE)
    if isinstance(size, list):
        if len(set(size)) != 1:
            raise ConfigError(
                f"encoders with images that are not square ({size}) are not supported"
            )
        size = size[0]
    return Preprocess(
        size=int(size),
        interpolation=overrides.get("interpolation") or "bicubic",
        resize_mode=overrides.get("resize_mode") or "shortest",
        fill=int(overrides.get("fill_color") or 0),
    )


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
def _quiet() -> Iterator[None]:
    """Keep open_clip's reports off the terminal, and leave the root logger as it was.

    open_clip reports every step at INFO by `logging.info`, which gives a root logger without
    handlers one.
    """
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    root.setLevel(max(level, logging.WARNING))
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
                f"encoder {info.name}: cannot load the weights ({first_line(error)})"
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

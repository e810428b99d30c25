"""BERT and DistilBERT as text encoders of an evaluation: `bert:MODEL`, `distilbert:MODEL`.

MODEL is a hub id or a folder. A caption's vector is the last hidden state of its first token, as
VL-Distill and LoRS take it (docs/methods.md).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pds_ray.config import ConfigError
from pds_ray.encoders.base import TextEncoderInfo
from pds_ray.errors import first_line
from pds_ray.store.hub import require_repository
from pds_ray.store.storage import folder_sha256
from pds_ray.store.weights import loading_reason, require_vocabulary, require_whole

MAX_TOKENS = 512
KINDS = ("bert", "distilbert")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
# left out, trust_remote_code means: ask on the terminal
LOADING: dict[str, Any] = {"trust_remote_code": False}
FILES = ("config.json", "*.safetensors", "tokenizer*.json", "vocab.txt")


def describe(name: str) -> TextEncoderInfo:
    """Describe `name`. Raises ConfigError in one line if it cannot be had."""
    from transformers import AutoConfig

    kind, _, model = name.partition(":")
    if not model:
        raise ConfigError(
            f"text encoder {name!r}: which model? give {kind}:ID (such as {kind}-base-uncased) "
            f"or {kind}:FOLDER"
        )
    folder: Path | None = None
    if Path(model).expanduser().is_dir():
        folder = Path(model).expanduser().resolve()
        model, identity = str(folder), folder_sha256(folder, FILES)
    else:
        instead = f"give a folder as {kind}:FOLDER"
        cached = require_repository(model, None, WEIGHTS, f"text encoder {name}", instead)
        identity, folder = model, cached and cached.parent
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        found, width = config.model_type, int(config.hidden_size)
    # transformers and the hub client raise many kinds, all meaning: no such model
    except Exception as error:
        line = first_line(error)
        raise ConfigError(
            f"text encoder {name}: {model} holds no transformers model ({line})"
        ) from error
    if found != kind:
        raise ConfigError(
            f"text encoder {name}: {model} is a model of type {found}, not {kind}"
            + (f"; give {found}:{model}" if found in KINDS else "")
        )
    if folder:
        _try_loading(name, folder)
    identity = f"{kind} {identity}"
    return TextEncoderInfo(name, width, identity, identity, (("model", model),))


def _try_loading(name: str, folder: Path) -> None:
    """Build the model on torch's meta device, hold the weights against it, make the tokenizer.

    No tensor is read. Raises ConfigError in one line.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    for weights in folder.glob("*.safetensors"):
        require_whole(weights, f"text encoder {name}")
    try:
        _, report = transformers.AutoModel.from_pretrained(
            folder, device_map="meta", output_loading_info=True, **LOADING, use_safetensors=True
        )
        # what follows the last hidden state is not used
        missing = [key for key in report["missing_keys"] if not key.startswith("pooler.")]
        if missing:
            raise ValueError(f"{len(missing)} tensors are missing, such as {min(missing)}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **LOADING)
        require_vocabulary(lambda texts: tokenizer(texts).input_ids)
    except Exception as error:  # missing, corrupt, of another model: of many kinds
        raise ConfigError(
            f"text encoder {name}: cannot load the weights ({loading_reason(error)})"
        ) from error


def load(info: TextEncoderInfo, precision: str) -> HfTextEncoder:  # noqa: ARG001
    """Load the model, always in fp32: a set has few captions."""
    return HfTextEncoder(info)


class HfTextEncoder:
    """A transformers text model in evaluation mode, on the GPU if there is one."""

    def __init__(self, info: TextEncoderInfo) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        model = dict(info.load_args)["model"]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(model, **LOADING)
            loaded = AutoModel.from_pretrained(model, use_safetensors=True, **LOADING)
            self.model = loaded.eval().to(self.device)
        except Exception as error:  # missing, corrupt, unreachable: of many kinds
            raise ConfigError(
                f"text encoder {info.name}: cannot load the weights ({loading_reason(error)})"
            ) from error
        self.dim = info.dim
        positions = getattr(self.model.config, "max_position_embeddings", MAX_TOKENS)
        self.max_tokens = min(MAX_TOKENS, self.tokenizer.model_max_length, positions)

    def encode_captions(self, captions: list[str]) -> np.ndarray:
        """Encode B captions, cut to the model's context length. float32 [B, d]."""
        import torch

        tokens = self.tokenizer(
            captions, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(self.device)
        with torch.inference_mode():
            return self.model(**tokens).last_hidden_state[:, 0].float().cpu().numpy()

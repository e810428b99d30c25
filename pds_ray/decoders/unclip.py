"""diffusers `StableUnCLIPImg2ImgPipeline`: Stable Diffusion with a CLIP embedding as class label.

The image embedding goes in un-normalised: the pipeline standardises it by the statistics of raw
embeddings stored with the checkpoint (docs/methods.md). Each image has a generator of its own.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pds_ray.config import ConfigError, DecodeConfig
from pds_ray.decoders.base import DecodeBatch, DecoderInfo
from pds_ray.encoders.base import EncoderInfo
from pds_ray.errors import first_line
from pds_ray.sources.base import Source
from pds_ray.store.hub import require_repository
from pds_ray.store.storage import folder_sha256

WEIGHTS = ("unet", "vae", "text_encoder", "image_normalizer")
SPACE_FILE = "pds_ray.json"
"""{"space": ..., "dim": ...}, written beside checkpoints trained by our scripts."""

# repository name -> embedding space its class label was trained on
KNOWN_SPACES = {
    "stable-diffusion-2-1-unclip-small": "ViT-L-14:openai",
    "stable-diffusion-2-1-unclip": "ViT-H-14:laion2b_s32b_b79k",
}
# embedding space -> checkpoint that takes it (the original repositories were withdrawn)
DEFAULT_MODELS = {
    "ViT-L-14:openai": "sd2-community/stable-diffusion-2-1-unclip-small",
    "ViT-H-14:laion2b_s32b_b79k": "sd2-community/stable-diffusion-2-1-unclip",
}


def demo_folder() -> Path:
    """Return the folder of the built-in unCLIP, a diffusers folder like any other."""
    return Path(str(resources.files("pds_ray.demo") / "weights" / "unclip"))


def describe(config: DecodeConfig, encoder: EncoderInfo) -> DecoderInfo:
    """Describe the checkpoint from its configuration files, checked against the encoder.

    Raises ConfigError in one line if it cannot be found, is no unCLIP, or takes other embeddings.
    """
    model = _choose(encoder) if config.model == "auto" else config.model
    folder = demo_folder() if model == "demo" else Path(model).expanduser()
    if folder.is_dir():
        dim, space, identity = _inspect(folder)
        model = str(folder.resolve())
    else:
        dim, space, identity = _inspect_hub(model, config.revision)
    if dim != encoder.dim:
        raise ConfigError(
            f"decoder {model} takes embeddings of width {dim}, encoder {encoder.name} gives "
            f"{encoder.dim}; choose a matching pair, or --decoder nearest"
        )
    notes: tuple[str, ...] = ()
    known = KNOWN_SPACES.get(model.rstrip("/").rsplit("/", 1)[-1], space)
    # a name and a file's hash cannot be compared
    if known is None or _is_hash(known) != _is_hash(encoder.space):
        notes = (
            f"whether decoder {model} was trained on embeddings of {encoder.name} cannot be told; "
            "check it",
        )
    elif known != encoder.space:
        raise ConfigError(
            f"decoder {model} was trained on the embeddings of {_short(known)}, not of "
            f"{encoder.name} ({_short(encoder.space)}): same width, other space; "
            "choose a matching pair, or --decoder nearest"
        )
    args = (("model", model), ("revision", config.revision))
    return DecoderInfo(name="unclip", dim=dim, identity=identity, load_args=args, notes=notes)


def _choose(encoder: EncoderInfo) -> str:
    if encoder.name == "demo" or _demo_space() == encoder.space:
        return "demo"
    if encoder.space in DEFAULT_MODELS:
        return DEFAULT_MODELS[encoder.space]
    raise ConfigError(
        f"no unCLIP decoder is known for encoder {encoder.name}; known for: "
        f"{', '.join(DEFAULT_MODELS)}. Name one with --decode.model, or use --decoder nearest"
    )


def _demo_space() -> str | None:
    path = demo_folder() / SPACE_FILE
    return json.loads(path.read_text())["space"] if path.is_file() else None


def _is_hash(space: str) -> bool:
    return len(space) == 64 and ":" not in space


def _short(space: str) -> str:
    return f"weights {space[:12]}" if _is_hash(space) else space


def _inspect(folder: Path) -> tuple[int, str | None, str]:
    """Return the embedding width, the space if stated, and the identity of a diffusers folder."""
    index = _read_json(folder / "model_index.json", folder)
    if "image_normalizer" not in index:
        kind = index.get("_class_name", "folder without a pipeline")
        raise ConfigError(
            f"decoder {folder}: is a {kind}, not an unCLIP image pipeline "
            "(it has no image_normalizer)"
        )
    try:
        dim = int(_read_json(folder / "image_normalizer" / "config.json", folder)["embedding_dim"])
        space_file = folder / SPACE_FILE
        space = _read_json(space_file, folder)["space"] if space_file.is_file() else None
    except ConfigError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"decoder {folder}: its configuration files do not say the width ({error!r})"
        ) from None
    for part in WEIGHTS:
        if not list((folder / part).glob("*.safetensors")):
            raise ConfigError(f"decoder {folder}: no .safetensors weights under {part}/")
    files = ("*/*.safetensors", "*/*.json", "*/*.txt", "model_index.json")
    return dim, space, folder_sha256(folder, files)[:16]


def _inspect_hub(model: str, revision: str | None) -> tuple[int, str | None, str]:
    """Return width, space (not stated) and identity of a repository of the hub."""
    from huggingface_hub import hf_hub_download

    name = "image_normalizer/config.json"
    instead = "give a local copy with --decode.model PATH, or use --decoder nearest"
    cached = (
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
    )
    require_repository(model, revision, cached, f"decoder {model}", instead)
    try:
        path = Path(hf_hub_download(model, name, revision=revision))
        dim = int(json.loads(path.read_text())["embedding_dim"])
    except Exception as error:  # no such file (no unCLIP), gone offline, malformed: many kinds
        reason = first_line(error)
        raise ConfigError(
            f"decoder {model}: is no unCLIP image pipeline ({reason}); {instead}"
        ) from error
    # .../snapshots/COMMIT/image_normalizer/config.json: branches move, commits do not
    commit = path.parents[1].name
    return dim, None, f"{model}@{commit}"


def _read_json(path: Path, folder: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        name = path.relative_to(folder)
        raise ConfigError(f"decoder {folder}: cannot read {name} ({error})") from None
    if not isinstance(value, dict):
        name = path.relative_to(folder)
        raise ConfigError(f"decoder {folder}: {name} does not hold a JSON object")
    return value


def load(info: DecoderInfo, config: DecodeConfig, source: Source) -> UnClipDecoder:  # noqa: ARG001
    """Load the pipeline, onto the GPU if there is one; it needs no real images."""
    return UnClipDecoder(info, config)


class UnClipDecoder:
    """The pipeline, loaded once."""

    def __init__(self, info: DecoderInfo, config: DecodeConfig) -> None:
        import diffusers
        import torch
        import transformers

        diffusers.utils.logging.set_verbosity_error()
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        args = dict(info.load_args)
        cuda = torch.cuda.is_available()
        precision = config.precision if config.precision != "auto" else ("fp16" if cuda else "fp32")
        dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
        try:
            self.pipeline = diffusers.StableUnCLIPImg2ImgPipeline.from_pretrained(
                args["model"], revision=args["revision"], dtype=dtype, use_safetensors=True
            ).to("cuda" if cuda else "cpu")
        # missing, cut off, of another version: diffusers and safetensors raise many kinds
        except Exception as error:
            reason = first_line(error)
            raise ConfigError(f"decoder {args['model']}: cannot load ({reason})") from error
        self.pipeline.set_progress_bar_config(disable=True)
        self.config = config

    def decode(self, batch: DecodeBatch) -> list[Image.Image]:
        """Return one image per row: prompt = retrieved caption, class label = prototype.

        Each image has one generator (PDS, image synthesis; docs/methods.md).
        """
        import torch

        pipeline, config = self.pipeline, self.config
        embeddings = torch.from_numpy(np.ascontiguousarray(batch.prototypes))
        images = pipeline(
            prompt=batch.captions,
            negative_prompt=[config.negative_prompt] * len(batch.captions),
            image_embeds=embeddings.to(pipeline.device, pipeline.dtype),
            num_inference_steps=config.steps,
            guidance_scale=config.guidance,
            noise_level=config.noise_level,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in batch.seeds],
            callback=lambda step, *_: batch.tell((step + 1) / config.steps),
        ).images
        return [image.convert("RGB") for image in images]

"""diffusers `StableUnCLIPImg2ImgPipeline`: Stable Diffusion with a CLIP embedding as class label.

The image embedding goes in un-normalised: the pipeline standardises it by the statistics of raw
embeddings stored with the checkpoint (docs/methods.md). Each image has a generator of its own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pds_ray.config import ConfigError, DecodeConfig
from pds_ray.decoders.base import DecodeBatch, DecoderInfo
from pds_ray.encoders.base import EncoderInfo, spaces
from pds_ray.errors import cause, first_line
from pds_ray.sources.base import Source
from pds_ray.store.hub import require_repository
from pds_ray.store.storage import folder_sha256
from pds_ray.store.weights import loading_reason, require_vocabulary, require_whole

INDEX, NORMALIZER = "model_index.json", "image_normalizer"
MODELS = {  # component with weights -> its class in diffusers or transformers, and their file
    "unet": ("UNet2DConditionModel", "diffusion_pytorch_model.safetensors"),
    "vae": ("AutoencoderKL", "diffusion_pytorch_model.safetensors"),
    NORMALIZER: ("StableUnCLIPImageNormalizer", "diffusion_pytorch_model.safetensors"),
    "text_encoder": ("CLIPTextModel", "model.safetensors"),
    "image_encoder": ("CLIPVisionModelWithProjection", "model.safetensors"),
}
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
    """Describe the checkpoint by its files, checked against the encoder.

    All but the built-in one are tried: every component is built without memory, and the names and
    shapes of its weights held against it. That imports diffusers, which takes seconds. Raises
    ConfigError in one line if it cannot be found, is no unCLIP, is damaged, or takes other
    embeddings.
    """
    model = _choose(encoder) if config.model == "auto" else config.model
    stated = KNOWN_SPACES.get(model.rstrip("/").rsplit("/", 1)[-1])
    _check_space(model, stated, encoder)
    folder = demo_folder() if model == "demo" else Path(model).expanduser()
    if folder.is_dir():
        found = _inspect(folder, encoder)
        model = str(folder.resolve())
    else:
        found = _inspect_hub(model, config.revision, encoder)
    if found.dim != encoder.dim:
        raise ConfigError(
            f"decoder {model} takes embeddings of width {found.dim}, encoder {encoder.name} gives "
            f"{encoder.dim}; {_instead(model, encoder)}"
        )
    notes = _check_space(model, stated or found.space, encoder)
    if found.folder and found.folder != demo_folder():
        _try_loading(model, found)
    args = (("model", model), ("revision", config.revision))
    return DecoderInfo("unclip", found.dim, found.identity, args, notes)


def _choose(encoder: EncoderInfo) -> str:
    fitting = _fitting(encoder)
    if fitting is None:
        raise ConfigError(
            f"no unCLIP decoder is known for encoder {encoder.name}; known for: "
            f"{', '.join(DEFAULT_MODELS)}. Name one with --decode.model, or use --decoder nearest"
        )
    return fitting


def _fitting(encoder: EncoderInfo) -> str | None:
    """Return the known decoder that takes the embeddings of an encoder."""
    names = spaces(encoder)
    if encoder.name == "demo" or _demo_space() in names:
        return "demo"
    return next((DEFAULT_MODELS[name] for name in names if name in DEFAULT_MODELS), None)


def _instead(model: str, encoder: EncoderInfo) -> str:
    """Return what to give in place of a decoder that cannot be had or does not fit."""
    fitting = _fitting(encoder)
    if fitting and fitting != model:
        return f"give --decode.model {fitting}, or use --decoder nearest"
    return "give the folder of one that fits as --decode.model PATH, or use --decoder nearest"


def _check_space(model: str, stated: str | None, encoder: EncoderInfo) -> tuple[str, ...]:
    """Return a note if it is unknown whether a decoder takes the encoder's embeddings.

    `stated` is the space it was trained on. Raises ConfigError if that is another.
    """
    names = spaces(encoder)
    if stated in names:
        return ()
    if stated is None or not _comparable(stated, encoder):
        return (
            f"whether decoder {model} was trained on embeddings of {encoder.name} cannot be told; "
            "check it",
        )
    raise ConfigError(
        f"decoder {model} was trained on the embeddings of {_short(stated)}, not of "
        f"{encoder.name} ({_short(encoder.space)}): same width, other space; "
        f"{_instead(model, encoder)}"
    )


def _comparable(stated: str, encoder: EncoderInfo) -> bool:
    """Return whether a space that is none of the encoder's names is known to be another.

    A name and a file's hash cannot be compared; nor can the hash of a published file tell that
    another file does not hold the same weights.
    """
    if _is_hash(stated):
        return _is_hash(encoder.space)
    return not all(map(_is_hash, spaces(encoder)))


def _demo_space() -> str | None:
    path = demo_folder() / SPACE_FILE
    return json.loads(path.read_text())["space"] if path.is_file() else None


def _is_hash(space: str) -> bool:
    return len(space) == 64 and ":" not in space


def _short(space: str) -> str:
    return f"weights {space[:12]}" if _is_hash(space) else space


@dataclass(frozen=True)
class _Found:
    """The files of a pipeline."""

    dim: int
    """Width of the embeddings that it takes."""
    space: str | None
    """None if no file states it."""
    identity: str
    folder: Path | None
    """None while some of its weights are still on the hub."""


def _inspect(folder: Path, encoder: EncoderInfo) -> _Found:
    """Find the files of a diffusers folder. Raises ConfigError if they are no whole unCLIP."""
    _check_pipeline(folder, encoder)
    try:
        dim = int(_read_json(folder / NORMALIZER / "config.json", folder)["embedding_dim"])
        space_file = folder / SPACE_FILE
        space = _read_json(space_file, folder)["space"] if space_file.is_file() else None
    except ConfigError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"decoder {folder}: its configuration files do not say the width ({cause(error)})"
        ) from None
    for part in MODELS:
        for weights in _weights(folder, part):
            require_whole(weights, f"decoder {folder}")
    files = ("*/*.safetensors", "*/*.json", "*/*.txt", INDEX)
    return _Found(dim, space, folder_sha256(folder, files)[:16], folder)


def _check_pipeline(folder: Path, encoder: EncoderInfo) -> None:
    """Raise ConfigError unless a folder holds an unCLIP image pipeline of diffusers."""
    if not (folder / INDEX).is_file():
        around = [folder.parent / INDEX, *sorted(folder.glob(f"snapshots/*/{INDEX}"))]
        right = next((path.parent for path in reversed(around) if path.is_file()), None)
        hint = f"give --decode.model {right}" if right else _instead(str(folder), encoder)
        raise ConfigError(
            f"decoder {folder}: has no {INDEX}, so it is no diffusers pipeline; {hint}"
        )
    index = _read_json(folder / INDEX, folder)
    if any(index.get(part, [None])[0] is None for part in MODELS):
        kind = index.get("_class_name", "folder without a pipeline")
        raise ConfigError(
            f"decoder {folder}: is a {kind}, not an unCLIP image pipeline "
            f"(it has no {NORMALIZER} or image_encoder); {_instead(str(folder), encoder)}"
        )


def _weights(folder: Path, part: str) -> list[Path]:
    """Return the files of a component's weights. Raises ConfigError if one is missing."""
    _, name = MODELS[part]
    index = folder / part / f"{name}.index.json"
    if not (folder / part / name).is_file() and index.is_file():
        shards = _read_json(index, folder).get("weight_map", {})
        files = [folder / part / shard for shard in sorted(set(shards.values()))]
    else:
        files = [folder / part / name]
    missing = next((file for file in files if not file.is_file()), None)
    if missing:
        raise ConfigError(
            f"decoder {folder}: no .safetensors weights {part}/{missing.name}, of which the "
            "pipeline is made"
        )
    return files


def _inspect_hub(model: str, revision: str | None, encoder: EncoderInfo) -> _Found:
    """Find the files of a repository of the hub, in the cache as far as they are there.

    Raises ConfigError if it cannot be had, is no unCLIP, or what is in the cache is damaged.
    """
    from huggingface_hub import hf_hub_download

    who, instead = f"decoder {model}", _instead(model, encoder)
    if Path(model).expanduser().is_file():
        raise ConfigError(f"{who}: is a file, not the folder of a diffusers pipeline; {instead}")
    wanted = {part: f"{part}/{name}" for part, (_, name) in MODELS.items()}
    choices = {part: (file, f"{file}.index.json") for part, file in wanted.items()}
    there = [require_repository(model, revision, files, who, instead) for files in choices.values()]
    try:
        path = Path(hf_hub_download(model, f"{NORMALIZER}/config.json", revision=revision))
        dim = int(json.loads(path.read_text())["embedding_dim"])
    except Exception as error:  # no such file (no unCLIP), gone offline, malformed: many kinds
        reason = first_line(error)
        raise ConfigError(f"{who}: is no unCLIP image pipeline ({reason}); {instead}") from error
    # .../snapshots/COMMIT/image_normalizer/config.json: branches move, commits do not
    snapshot = path.parents[1]
    identity = f"{model}@{snapshot.name}"
    if None in there or not (snapshot / INDEX).is_file():
        return _Found(dim, None, identity, None)
    for part in MODELS:
        for weights in _weights(snapshot, part):
            require_whole(weights, who)
    return _Found(dim, None, identity, snapshot)


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


@cache  # a comparison describes the decoder of every row
def _try_loading(model: str, found: _Found) -> None:
    """Build the pipeline with its models on torch's meta device.

    diffusers and transformers decide what fits, and no tensor is read. Raises ConfigError in one
    line that names the component.
    """
    import diffusers

    _silence_libraries()
    folder, dim = found.folder, found.dim
    assert folder is not None
    parts, part = {}, ""
    try:
        for part in MODELS:
            parts[part] = _on_meta_device(folder, part)
        labels = parts["unet"].config.projection_class_embeddings_input_dim
        if labels != 2 * dim:
            part = "unet"
            raise ValueError(f"its labels are {labels} wide, not twice the {dim} of {NORMALIZER}")
        part = "tokenizer, scheduler or feature_extractor"
        pipeline = diffusers.StableUnCLIPImg2ImgPipeline.from_pretrained(folder, **parts)
        require_vocabulary(lambda texts: pipeline.tokenizer(texts).input_ids)
    # missing, of another version, of another model: diffusers and transformers raise many kinds
    except Exception as error:
        reason = loading_reason(error)
        raise ConfigError(f"decoder {model}: its {part} does not load ({reason})") from error


def _on_meta_device(folder: Path, part: str) -> Any:
    """Return a component with weights of the right shapes, none of them read.

    Raises ValueError if some are missing, which the libraries would fill with noise.
    """
    name, _ = MODELS[part]
    model, report = _class(name).from_pretrained(
        folder, subfolder=part, device_map="meta", output_loading_info=True, use_safetensors=True
    )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(f"{len(missing)} of its tensors are missing, such as {missing[0]}")
    return model


def _class(name: str) -> Any:
    import diffusers
    import transformers
    from diffusers.pipelines.stable_diffusion import stable_unclip_image_normalizer as normalizer

    places = (diffusers, transformers, normalizer)
    return next(getattr(place, name) for place in places if hasattr(place, name))


def _silence_libraries() -> None:
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def load(info: DecoderInfo, config: DecodeConfig, source: Source) -> UnClipDecoder:  # noqa: ARG001
    """Load the pipeline, onto the GPU if there is one; it needs no real images."""
    return UnClipDecoder(info, config)


class UnClipDecoder:
    """The pipeline, loaded once."""

    def __init__(self, info: DecoderInfo, config: DecodeConfig) -> None:
        import diffusers
        import torch

        _silence_libraries()
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
            reason = loading_reason(error)
            raise ConfigError(f"decoder {args['model']}: cannot load ({reason})") from error
        self.pipeline.set_progress_bar_config(disable=True)
        self.config = config

    def decode(self, batch: DecodeBatch) -> list[Image.Image]:
        """Return one image per row: prompt = retrieved caption, class label = prototype.

        Each image has one generator (PDS, image synthesis; docs/methods.md).
        """
        import torch

        pipeline, config = self.pipeline, self.config
        level = config.noise_level if batch.noise_level is None else batch.noise_level
        embeddings = torch.from_numpy(np.ascontiguousarray(batch.prototypes))
        images = pipeline(
            prompt=batch.captions,
            negative_prompt=[config.negative_prompt] * len(batch.captions),
            image_embeds=embeddings.to(pipeline.device, pipeline.dtype),
            num_inference_steps=config.steps,
            guidance_scale=config.guidance,
            noise_level=level,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in batch.seeds],
            callback=lambda step, *_: batch.tell((step + 1) / config.steps),
        ).images
        return [image.convert("RGB") for image in images]

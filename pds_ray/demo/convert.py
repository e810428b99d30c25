"""An open_clip model's towers as the transformers classes that diffusers pipelines are made of."""

from __future__ import annotations

import open_clip
import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

LAYER_PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def convert_text_tower(
    model: open_clip.CLIP, config: dict, tokenizer: CLIPTokenizer
) -> CLIPTextModel:
    """Return the text tower without its projection. `config` is open_clip's `model_cfg`.

    `last_hidden_state` [B, context length, width] equals open_clip's states after its final
    LayerNorm.
    """
    text = config["text_cfg"]
    target = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=text["vocab_size"],
            hidden_size=text["width"],
            intermediate_size=4 * text["width"],
            projection_dim=config["embed_dim"],
            num_hidden_layers=text["layers"],
            num_attention_heads=text["heads"],
            max_position_embeddings=text["context_length"],
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    source = model.state_dict()
    weights = {
        "embeddings.token_embedding.weight": source["token_embedding.weight"],
        "embeddings.position_embedding.weight": source["positional_embedding"],
        "final_layer_norm.weight": source["ln_final.weight"],
        "final_layer_norm.bias": source["ln_final.bias"],
        **_layers(source, "transformer.resblocks", text["layers"]),
    }
    _load(target, weights, prefix=_prefix(target, "embeddings.token_embedding.weight"))
    return target.eval()


def convert_image_tower(model: open_clip.CLIP, config: dict) -> CLIPVisionModelWithProjection:
    """Return the image tower with its projection.

    `image_embeds` [B, d] equals open_clip's `encode_image`, not normalised.
    """
    vision = config["vision_cfg"]
    target = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=vision["width"],
            intermediate_size=4 * vision["width"],
            projection_dim=config["embed_dim"],
            num_hidden_layers=vision["layers"],
            num_attention_heads=vision["width"] // vision["head_width"],
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            hidden_act="gelu",
        )
    )
    source = model.visual.state_dict()
    weights = {
        "embeddings.class_embedding": source["class_embedding"],
        "embeddings.position_embedding.weight": source["positional_embedding"],
        "embeddings.patch_embedding.weight": source["conv1.weight"],
        "pre_layrnorm.weight": source["ln_pre.weight"],  # sic: transformers' own spelling
        "pre_layrnorm.bias": source["ln_pre.bias"],
        "post_layernorm.weight": source["ln_post.weight"],
        "post_layernorm.bias": source["ln_post.bias"],
        **_layers(source, "transformer.resblocks", vision["layers"]),
    }
    _load(
        target.vision_model,
        weights,
        prefix=_prefix(target.vision_model, "embeddings.class_embedding"),
    )
    _load(target.visual_projection, {"weight": source["proj"].T}, prefix="")
    return target.eval()


def _layers(source: dict[str, torch.Tensor], prefix: str, count: int) -> dict[str, torch.Tensor]:
    weights = {}
    for i in range(count):
        old, new = f"{prefix}.{i}", f"encoder.layers.{i}"
        for kind in ("weight", "bias"):
            for old_part, new_part in LAYER_PARTS.items():
                weights[f"{new}.{new_part}.{kind}"] = source[f"{old}.{old_part}.{kind}"]
            for part, tensor in zip(
                "qkv", source[f"{old}.attn.in_proj_{kind}"].chunk(3), strict=True
            ):
                weights[f"{new}.self_attn.{part}_proj.{kind}"] = tensor
    return weights


def _prefix(target: torch.nn.Module, name: str) -> str:
    """Return the prefix of transformers' names of weights, which differs between its releases."""
    return next(key for key in target.state_dict() if key.endswith(name)).removesuffix(name)


def _load(target: torch.nn.Module, weights: dict[str, torch.Tensor], prefix: str) -> None:
    target.load_state_dict(
        {prefix + name: tensor.detach().cpu().clone() for name, tensor in weights.items()}
    )

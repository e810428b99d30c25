"""Tiny random models in the formats of real ones: open_clip, diffusers unCLIP, transformers."""

from __future__ import annotations

import json
from pathlib import Path

VOCABULARY = 49_408  # of open_clip's own tokenizer
CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {
        "context_length": 12,
        "vocab_size": VOCABULARY,
        "width": 16,
        "heads": 2,
        "layers": 2,
    },
}


def save_clip(folder: Path, seed: int = 0, **preprocess: object) -> Path:
    """An open_clip folder with random weights: 32-pixel images, 12 tokens, width 16."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.model.CLIP(**CLIP)
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    config = {"model_cfg": CLIP, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


def save_unclip(folder: Path, dim: int = 16, seed: int = 0, space: str | None = None) -> Path:
    """An unCLIP pipeline folder with random weights: 16-pixel images, labels of width `dim`."""
    import diffusers
    import torch
    import transformers
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
        StableUnCLIPImageNormalizer,
    )

    words = [
        "<|startoftext|>",
        "<|endoftext|>",
        *(f"{c}{end}" for c in "abcdefghijklmnopqrstuvwxyz " for end in ("", "</w>")),
    ]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = transformers.CLIPTokenizer(
            vocab={word: number for number, word in enumerate(words)}, merges=[], model_max_length=8
        )
        text = transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                vocab_size=len(words),
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=8,
                projection_dim=16,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
            )
        )
        vision = transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=16,
                patch_size=8,
                projection_dim=dim,
            )
        )
        unet = diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=8,
            cross_attention_dim=16,
            class_embed_type="projection",
            projection_class_embeddings_input_dim=2 * dim,
        )
        vae = diffusers.AutoencoderKL(
            block_out_channels=(16, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=8,
            latent_channels=4,
            sample_size=16,
        )
        normalizer = StableUnCLIPImageNormalizer(embedding_dim=dim)
        normalizer.mean.data.normal_(std=0.1)
        normalizer.std.data.uniform_(0.5, 1.5)
    pipeline = diffusers.StableUnCLIPImg2ImgPipeline(
        feature_extractor=transformers.CLIPImageProcessor(size=16, crop_size=16),
        image_encoder=vision,
        image_normalizer=normalizer,
        image_noising_scheduler=diffusers.DDPMScheduler(),
        tokenizer=tokenizer,
        text_encoder=text,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False),
        vae=vae,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    if space is not None:
        (folder / "pds_ray.json").write_text(json.dumps({"space": space, "dim": dim}))
    return folder


TEXT_WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *"abcdefghijklmnopqrstuvwxyz",
    "red",
    "dog",
    "runs",
    "##s",
]
TEXT_CONTEXT = 16


def save_text_model(folder: Path, kind: str, seed: int = 0) -> Path:
    """A transformers folder of kind bert or distilbert with random weights: width 24, 16 tokens."""
    import torch
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "bert":
            config = transformers.BertConfig(
                vocab_size=len(TEXT_WORDS),
                hidden_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=TEXT_CONTEXT,
            )
            model = transformers.BertModel(config)
        else:
            config = transformers.DistilBertConfig(
                vocab_size=len(TEXT_WORDS),
                dim=24,
                n_layers=2,
                n_heads=2,
                hidden_dim=32,
                max_position_embeddings=TEXT_CONTEXT,
            )
            model = transformers.DistilBertModel(config)
        with torch.no_grad():
            for (
                parameter
            ) in model.parameters():  # fresh weights are so small that every caption looks alike
                parameter.add_(0.2 * torch.randn_like(parameter))
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(TEXT_WORDS) + "\n")
    tokenizer = transformers.BertTokenizerFast(
        vocab=str(folder / "vocab.txt"), model_max_length=TEXT_CONTEXT
    )
    tokenizer.save_pretrained(folder)
    return folder

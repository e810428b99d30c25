"""Train a small CLIP on any source and write it as an open_clip folder.

python -m pds_ray.demo.train_clip --source scenes:50000:1 --holdout scenes:1000:2 --out runs/clip

The folder loads with `open_clip.create_model_from_pretrained("local-dir:runs/clip")`. Run the same
command again to go on after an interruption.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own habit
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTokenizer

from pds_ray.demo.data import CaptionedImages, load_captioned_images, to_signed
from pds_ray.demo.tokenizer import train_tokenizer
from pds_ray.demo.training import Schedule, train
from pds_ray.errors import UserError
from pds_ray.training.losses import info_nce
from pds_ray.training.recall import recalls

HEAD_WIDTH = 64
MAX_LOGIT_SCALE = float(np.log(100))
PREPROCESS = {
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
"""Pixels come to -1..1, as `to_signed` brings them there in training."""


def model_config(args: argparse.Namespace, vocab_size: int) -> dict:
    """Return open_clip's `model_cfg` of a plain ViT and a plain causal text tower.

    Both can be converted to transformers.
    """
    return {
        "embed_dim": args.embed_dim,
        "vision_cfg": {
            "image_size": args.image_size,
            "patch_size": args.patch_size,
            "width": args.width,
            "layers": args.layers,
            "head_width": HEAD_WIDTH,
        },
        "text_cfg": {
            "context_length": args.context_length,
            "vocab_size": vocab_size,
            "width": args.width,
            "heads": args.width // HEAD_WIDTH,
            "layers": args.text_layers,
            "hf_tokenizer_name": "local",  # with any name open_clip reads the folder's tokenizer
        },
    }


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Return token ids, int64 [B, context length], cut and padded as open_clip and diffusers do."""
    ids = tokenizer(
        captions,
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    )
    return ids["input_ids"]


def swapped(caption: str, pairs: Sequence[tuple[str, str]], number: int) -> str:
    """Return the caption with the two words of a pair exchanged, or "" if it has no such word.

    Of the pairs it has words of, the `number`th is taken, counted in a circle.
    """
    words = set(re.findall(r"\w+", caption))
    present = [pair for pair in pairs if words & set(pair)]
    if not present:
        return ""
    one, other = present[number % len(present)]
    return re.sub(
        rf"\b({re.escape(one)}|{re.escape(other)})\b",
        lambda w: other if w[0] == one else one,
        caption,
    )


class CaptionTokens:
    """Every caption of a data set and its negative (see `swapped`) as ids, looked up per step."""

    def __init__(
        self, tokenizer: CLIPTokenizer, data: CaptionedImages, swaps: Sequence[tuple[str, str]] = ()
    ) -> None:
        counts = torch.tensor([len(captions) for captions in data.captions])
        self.counts = counts
        self.starts = counts.cumsum(0) - counts
        flat = [caption for captions in data.captions for caption in captions]
        self.ids = tokenize(tokenizer, flat).to(torch.int32)
        negatives = (
            [swapped(caption, swaps, number) for number, caption in enumerate(flat)]
            if swaps
            else []
        )
        self.has_negative = torch.tensor(
            [bool(caption) for caption in negatives] or [False] * len(flat)
        )
        self.negatives = tokenize(tokenizer, negatives).to(torch.int32) if negatives else self.ids

    def draw(self, rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Draw a caption for each of the images `rows` [B]; the negatives of those follow.

        Returns ids, int64 [B + negatives, context length].
        """
        choice = (
            self.starts[rows]
            + (torch.rand(len(rows), generator=generator) * self.counts[rows]).long()
        )
        return torch.cat(
            [self.ids[choice], self.negatives[choice[self.has_negative[choice]]]]
        ).long()


def train_model(
    model: open_clip.CLIP,
    data: CaptionedImages,
    tokens: CaptionTokens,
    args: argparse.Namespace,
    settings: dict,
) -> None:
    """Train by symmetric InfoNCE over batches of distinct images with one random caption each.

    The negatives are further captions. Words that are exchanged teach what contrast alone teaches
    slowly: where things are (NegCLIP, Yuksekgonul et al., ICLR 2023).
    """
    device = torch.device(args.device)
    # On CPUs the backward pass of the fused attention is several times slower than that of the
    # plain one.
    attention = [SDPBackend.MATH] if device.type == "cpu" else list(SDPBackend.__members__.values())

    def loss(generator: torch.Generator) -> torch.Tensor:
        rows = torch.randperm(len(data), generator=generator)[: args.batch_size]
        pixels = to_signed(data.pixels[rows]).to(device)
        ids = tokens.draw(rows, generator).to(device)
        with torch.no_grad():
            model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
        with autocast, sdpa_kernel(attention):
            image = model.encode_image(pixels, normalize=True)
            text = model.encode_text(ids, normalize=True)
        return info_nce(image.float(), text.float(), model.logit_scale.exp())

    schedule = Schedule(
        args.steps, args.learning_rate, 0.1, checkpoint_every=args.checkpoint_every, seed=args.seed
    )
    train("train CLIP", model, loss, schedule, args.out / "checkpoint", settings)


@torch.inference_mode()
def embed_images(
    model: open_clip.CLIP, pixels: torch.Tensor, batch_size: int = 500
) -> torch.Tensor:
    """Return projections, not normalised: uint8 [N, 3, S, S] -> float32 [N, d] on the CPU."""
    device = model.logit_scale.device
    return torch.cat(
        [model.encode_image(to_signed(part).to(device)).cpu() for part in pixels.split(batch_size)]
    )


@torch.inference_mode()
def embed_captions(
    model: open_clip.CLIP, ids: torch.Tensor, batch_size: int = 2000
) -> torch.Tensor:
    """Return projections of ids [N, context length], not normalised, float32 [N, d] on the CPU."""
    device = model.logit_scale.device
    return torch.cat(
        [model.encode_text(part.long().to(device)).cpu() for part in ids.split(batch_size)]
    )


def measure_recall(
    model: open_clip.CLIP, data: CaptionedImages, tokenizer: CLIPTokenizer
) -> dict[str, float]:
    """Return recall at 1 in both directions, in percent (see `training.recall`)."""
    tokens = CaptionTokens(tokenizer, data)
    owner = torch.repeat_interleave(torch.arange(len(data)), tokens.counts)
    image = F.normalize(embed_images(model, data.pixels), dim=-1)
    text = F.normalize(embed_captions(model, tokens.ids), dim=-1)
    found = recalls(image, text, owner)
    return {"TR@1": found["tr@1"], "IR@1": found["ir@1"]}


def save_open_clip(
    folder: Path, model: open_clip.CLIP, config: dict, tokenizer: CLIPTokenizer
) -> None:
    """Write a folder that open_clip's `local-dir:` loads: weights, configuration, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    weights = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    save_file(weights, folder / "open_clip_model.safetensors")
    document = {"model_cfg": config, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(document, indent=2) + "\n")


def word_pairs(text: str) -> list[tuple[str, str]]:
    """Return `a/b,c/d` as [(a, b), (c, d)]. Raises ValueError for anything else."""
    pairs = [tuple(pair.split("/")) for pair in text.split(",")]
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise ValueError(text)
    return [(one, other) for one, other in pairs]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a small CLIP and write it as an open_clip folder."
    )
    add = parser.add_argument
    add("--source", default="scenes:50000:1", help="what to train on (default %(default)s)")
    add(
        "--holdout", default="scenes:1000:2", help="what to measure recall on (default %(default)s)"
    )
    add(
        "--out",
        type=Path,
        required=True,
        help="folder of the result and, in checkpoint/, of the state to resume",
    )
    add("--steps", type=int, default=1000)
    add("--batch-size", type=int, default=256)
    add("--learning-rate", type=float, default=1.5e-3)
    add("--image-size", type=int, default=64, help="pixels; images are resized and centre-cropped")
    add("--patch-size", type=int, default=8, help="pixels")
    add("--width", type=int, default=128, help="of both towers, a multiple of 64")
    add("--layers", type=int, default=3, help="of the image tower")
    add("--text-layers", type=int, default=2)
    add("--embed-dim", type=int, default=128)
    add("--vocab-size", type=int, default=1024)
    add("--context-length", type=int, default=32, help="tokens; longer captions are cut")
    add("--checkpoint-every", type=int, default=500, help="steps")
    add(
        "--swap",
        type=word_pairs,
        default=[],
        help="words exchanged to make negatives: top/bottom,left/right",
    )
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--precision", choices=("bf16", "fp32"), default="bf16", help="of the towers in training")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> dict[str, float]:
    """Train, measure, write. Returns the metrics."""
    torch.manual_seed(args.seed)
    data = load_captioned_images(args.source, args.image_size)
    holdout = load_captioned_images(args.holdout, args.image_size)
    captions = (caption for captions in data.captions for caption in captions)
    tokenizer = train_tokenizer(captions, args.vocab_size, args.context_length)
    config = model_config(args, len(tokenizer))
    model = open_clip.CLIP(
        config["embed_dim"],
        open_clip.CLIPVisionCfg(**config["vision_cfg"]),
        open_clip.CLIPTextCfg(**config["text_cfg"]),
    ).to(args.device)
    settings = {
        "model": config,
        "source": args.source,
        "batch_size": args.batch_size,
        "swap": args.swap,
        "seed": args.seed,
    }
    train_model(model, data, CaptionTokens(tokenizer, data, args.swap), args, settings)
    save_open_clip(args.out, model, config, tokenizer)
    metrics = {
        **measure_recall(model, holdout, tokenizer),
        "holdout_pictures": len(holdout),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": args.steps,
    }
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


def main(argv: list[str] | None = None) -> int:
    try:
        metrics = run(parse_args(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"held-out recall: TR@1 {metrics['TR@1']:.1f}, IR@1 {metrics['IR@1']:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

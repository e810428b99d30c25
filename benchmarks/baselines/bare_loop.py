"""Embedding by hand: webdataset, a DataLoader and open_clip in a loop, results kept in memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.baselines.pds import encode_text
from pds_ray.encoders.open_clip import SHORT_CONTEXTS

TEXT_BATCH = 256  # captions, as in the package


@dataclass(frozen=True)
class Tuning:
    """Settings that decide the loop's speed."""

    batch: int
    threads: int
    workers: int


def encode_cut(model: Any, tokens: Any) -> Any:
    """Encode each caption in the package's shortest context that holds it; the rest is padding.

    Tokens [B, context] -> float32 [B, d].
    """
    import torch

    ends = tokens.argmax(dim=1) + 1  # the token that ends a caption has the highest number
    found = torch.empty(len(tokens), model.text_projection.shape[1])
    shorter = 0
    for length in (*SHORT_CONTEXTS, tokens.shape[1]):
        rows = torch.nonzero((ends > shorter) & (ends <= length)).squeeze(1)
        if len(rows):
            found[rows] = encode_text(model, tokens[rows, :length])
        shorter = length
    return found


def embed(
    shards: list[str],
    model_name: str,
    tuning: Tuning,
    encode_captions: Callable[[Any, Any], Any],
    out: Path,
) -> dict[str, Any]:
    """Embed every image and every caption of its .json; write OUT.npz. Return seconds and counts.

    `encode_captions` takes the model and the tokens of a batch's captions. The seconds begin when
    the model is loaded; the workers that read, decode and tokenise have begun before.
    """
    import open_clip
    import torch
    import webdataset as wds
    from torch.utils.data import DataLoader

    torch.set_num_threads(tuning.threads)
    _, _, preprocess = open_clip.create_model_and_transforms(model_name, load_weights=False)
    tokenizer = open_clip.get_tokenizer(model_name)

    def prepare(sample: dict[str, Any]) -> tuple[str, torch.Tensor, torch.Tensor]:
        return sample["__key__"], preprocess(sample["jpg"]), tokenizer(sample["json"]["captions"])

    def collate(samples: list[Any]) -> tuple[list[str], torch.Tensor, torch.Tensor, list[int]]:
        keys, pixels, tokens = zip(*samples, strict=True)
        return list(keys), torch.stack(pixels), torch.cat(tokens), [len(some) for some in tokens]

    dataset = (
        wds.WebDataset(shards, empty_check=False, shardshuffle=False).decode("pilrgb").map(prepare)
    )
    loader = iter(DataLoader(dataset, tuning.batch, num_workers=tuning.workers, collate_fn=collate))
    model = open_clip.create_model(model_name).eval()
    all_keys, images, texts, counts = [], [], [], []
    began = time.perf_counter()
    with torch.inference_mode():
        for keys, pixels, tokens, captions in loader:
            all_keys += keys
            counts += captions
            images.append(model.encode_image(pixels).numpy().astype(np.float16))
            texts += [
                encode_captions(model, some).numpy().astype(np.float16)
                for some in tokens.split(TEXT_BATCH)
            ]
    np.savez(
        out,
        keys=all_keys,
        image=np.concatenate(images),
        text=np.concatenate(texts),
        captions=counts,
    )
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "images": len(all_keys),
        "pairs": sum(counts),
        "tuning": asdict(tuning),
    }

"""Embedding as one writes it by hand: webdataset, a DataLoader and open_clip in a loop, results kept in memory."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Tuning:
    """What one turns to make the loop fast."""

    batch: int
    threads: int
    workers: int


def embed(shards: list[str], model_name: str, tuning: Tuning, out: Path) -> dict[str, Any]:
    """Embeds every picture and every caption of its .json; writes OUT.npz. Returns seconds and counts.

    The seconds begin when the model is loaded; the workers that read, decode and tokenise have begun before.
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

    dataset = wds.WebDataset(shards, empty_check=False, shardshuffle=False).decode("pilrgb").map(prepare)
    loader = iter(DataLoader(dataset, tuning.batch, num_workers=tuning.workers, collate_fn=collate))
    model = open_clip.create_model(model_name).eval()
    all_keys, images, texts, counts = [], [], [], []
    began = time.perf_counter()
    with torch.inference_mode():
        for keys, pixels, tokens, captions in loader:
            all_keys += keys
            counts += captions
            images.append(model.encode_image(pixels).numpy().astype(np.float16))
            texts += [model.encode_text(some).numpy().astype(np.float16) for some in tokens.split(tuning.batch)]
    np.savez(out, keys=all_keys, image=np.concatenate(images), text=np.concatenate(texts), captions=counts)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "images": len(all_keys), "pairs": sum(counts), "tuning": asdict(tuning)}

"""The authors' procedure of Prototype-guided Data Synthesis (Choi, Mo, Chae, ICLR 2026).

Everything is in memory, as published: an embedding per pair, pruned copies, one dense matrix of
similarities. Fixes, at no cost, where it would fail or shift rows: empty clusters stay in the
table, an empty match is dropped from 300 clusters on instead of averaging nothing, captions are cut
to the context length.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from scipy.optimize import linear_sum_assignment

SEED = 42
PRUNE_RATIO = 0.2
IMAGE_BATCH, TEXT_CHUNK = 128, 1_000
KEEP_EMPTY_BELOW = 300

Matched = tuple[int, int]  # an image cluster and its text cluster


def expand_pairs(root: Path) -> tuple[list[Path], list[str]]:
    """Step 2: return one row per caption and its image's path; an image repeats per caption."""
    records = json.loads((root / "flickr30k_train.json").read_text())
    return [root / record["image"] for record in records], [record["caption"] for record in records]


def embed_images(paths: list[Path], model: Any, preprocess: Any, workers: int) -> np.ndarray:
    """Step 4, images: open, resize and encode each row's image by 128: float32 [N, d]."""
    import torch
    from torch.utils.data import DataLoader, Dataset

    class Images(Dataset):
        def __len__(self) -> int:
            return len(paths)

        def __getitem__(self, row: int) -> torch.Tensor:
            return preprocess(Image.open(paths[row]).convert("RGB"))

    parts = []
    with torch.inference_mode():
        for batch in DataLoader(Images(), IMAGE_BATCH, num_workers=workers):
            parts.append(model.encode_image(batch).float().numpy())
    return np.concatenate(parts)


def embed_captions(captions: list[str], model: Any, tokenizer: Any) -> np.ndarray:
    """Step 4, captions: encode chunks of 1,000: float32 [N, d].

    Each is padded to the longest of its chunk, as by CLIP's own processor.
    """
    import torch

    parts = []
    with torch.inference_mode():
        for start in range(0, len(captions), TEXT_CHUNK):
            tokens = tokenizer(captions[start : start + TEXT_CHUNK])
            # the token that ends a caption has the highest number
            longest = int(tokens.argmax(dim=1).max()) + 1
            parts.append(encode_text(model, tokens[:, :longest]).float().numpy())
    return np.concatenate(parts)


def encode_text(model: Any, tokens: Any) -> Any:
    """Run open_clip's encode_text on fewer tokens than the context: attention is causal."""
    length = tokens.shape[1]
    x = model.token_embedding(tokens) + model.positional_embedding[:length]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    return x[range(len(tokens)), tokens.argmax(dim=1)] @ model.text_projection


def pair_similarity(image: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Step 5: return the cosine of the two vectors of each row, float32 [N]."""
    return (_unit(image) * _unit(text)).sum(axis=1)


def prune(similarity: np.ndarray, ratio: float = PRUNE_RATIO) -> np.ndarray:
    """Step 6: drop the int(ratio * N) rows of lowest cosine; return the others, ascending int64."""
    order = np.argsort(similarity, kind="stable")
    return np.sort(order[int(ratio * len(similarity)) :])


def cluster(vectors: np.ndarray, clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Step 7: return centroids [K, d] and labels [N] of mini-batch k-means on raw vectors."""
    from sklearn.cluster import MiniBatchKMeans

    kmeans = MiniBatchKMeans(
        n_clusters=clusters, batch_size=10_000, n_init=20, random_state=SEED
    ).fit(vectors)
    return kmeans.cluster_centers_, kmeans.labels_


def contingency(image_labels: np.ndarray, text_labels: np.ndarray, clusters: int) -> np.ndarray:
    """Step 8: count the rows that image and text clusters share, by group-by: int64 [K, K].

    Fixed: empty clusters keep their row and column.
    """
    rows = pd.DataFrame({"image": image_labels, "text": text_labels})
    table = rows.groupby(["image", "text"]).size().unstack(fill_value=0)
    return table.reindex(index=range(clusters), columns=range(clusters), fill_value=0).to_numpy()


def match(table: np.ndarray) -> list[Matched]:
    """Step 9: return the one-to-one assignment that shares most."""
    return list(zip(*(side.tolist() for side in linear_sum_assignment(-table)), strict=True))


@dataclass(frozen=True)
class Prototypes:
    """Prototypes in the order of falling cosine."""

    image: np.ndarray
    """float32 [B, d]."""
    text: np.ndarray
    """float32 [B, d]."""
    matched: list[Matched]


def prototypes(
    image: np.ndarray,
    text: np.ndarray,
    image_labels: np.ndarray,
    text_labels: np.ndarray,
    matched: list[Matched],
) -> Prototypes:
    """Steps 10 to 12: mask all rows for each match, average the pairs that it shares, sort.

    Fixed: an empty match gives the means of its two clusters below 300 clusters and is dropped
    above (the published code averages nothing there and fails); so is one with an empty cluster.
    """
    found: list[tuple[np.ndarray, np.ndarray, Matched]] = []
    for i, j in matched:
        mine_i, mine_j = image_labels == i, text_labels == j
        shared = mine_i & mine_j
        if shared.any():
            found.append((image[shared].mean(axis=0), text[shared].mean(axis=0), (i, j)))
        elif len(matched) < KEEP_EMPTY_BELOW and mine_i.any() and mine_j.any():
            found.append((image[mine_i].mean(axis=0), text[mine_j].mean(axis=0), (i, j)))
    images, texts = (np.stack([one[side] for one in found]) for side in (0, 1))
    order = np.argsort(-pair_similarity(images, texts), kind="stable")
    return Prototypes(images[order], texts[order], [found[place][2] for place in order])


def nearest_captions(prototypes: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Step 13: return the nearest of all N captions to each text prototype by cosine, int64 [B]."""
    return (_unit(prototypes) @ _unit(text).T).argmax(axis=1)


def decode(
    pipeline: Any,
    prototypes: np.ndarray,
    captions: list[str],
    steps: int,
    guidance: float,
    noise: int,
    negative: str,
) -> list[Image.Image]:
    """Step 14: decode one image per call, with the global random numbers."""
    import torch

    torch.manual_seed(SEED)
    return [
        pipeline(
            prompt=caption,
            negative_prompt=negative,
            image_embeds=torch.from_numpy(prototype[None]).to(pipeline.device, pipeline.dtype),
            num_inference_steps=steps,
            guidance_scale=guidance,
            noise_level=noise,
        ).images[0]
        for prototype, caption in zip(prototypes, captions, strict=True)
    ]


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

"""The authors' procedure of Prototype-guided Data Synthesis (Choi, Mo, Chae, ICLR 2026), step by step.

Everything is in memory, as there: an embedding a pair, pruned copies, one dense matrix of similarities. Mended is what
would make it fail or shift rows and costs nothing: empty clusters stay in the table, couples without a shared pair are
dropped from 300 clusters on instead of averaging nothing, captions are cut to the context length.
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
KEEP_PAIRLESS_BELOW = 300

Couple = tuple[int, int]


def expand_pairs(root: Path) -> tuple[list[Path], list[str]]:
    """Step 2: one row a caption, the path of its picture beside it; an image with five captions appears five times."""
    records = json.loads((root / "flickr30k_train.json").read_text())
    return [root / record["image"] for record in records], [record["caption"] for record in records]


def embed_images(paths: list[Path], model: Any, preprocess: Any, workers: int) -> np.ndarray:
    """Step 4, pictures: every row's picture opened, resized and encoded, in batches of 128. float32 [N, d]."""
    import torch
    from torch.utils.data import DataLoader, Dataset

    class Pictures(Dataset):
        def __len__(self) -> int:
            return len(paths)

        def __getitem__(self, row: int) -> torch.Tensor:
            return preprocess(Image.open(paths[row]).convert("RGB"))

    parts = []
    with torch.inference_mode():
        for batch in DataLoader(Pictures(), IMAGE_BATCH, num_workers=workers):
            parts.append(model.encode_image(batch).float().numpy())
    return np.concatenate(parts)


def embed_captions(captions: list[str], model: Any, tokenizer: Any) -> np.ndarray:
    """Step 4, captions: chunks of 1,000, padded to the longest of the chunk as CLIP's own processor does.

    float32 [N, d].
    """
    import torch

    parts = []
    with torch.inference_mode():
        for start in range(0, len(captions), TEXT_CHUNK):
            tokens = tokenizer(captions[start : start + TEXT_CHUNK])
            longest = (
                int(tokens.argmax(dim=1).max()) + 1
            )  # the token that ends a caption has the highest number
            parts.append(encode_text(model, tokens[:, :longest]).float().numpy())
    return np.concatenate(parts)


def encode_text(model: Any, tokens: Any) -> Any:
    """open_clip's encode_text for fewer tokens than the context: attention is causal, what is cut off has no part."""
    length = tokens.shape[1]
    x = model.token_embedding(tokens) + model.positional_embedding[:length]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    return x[range(len(tokens)), tokens.argmax(dim=1)] @ model.text_projection


def pair_similarity(image: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Step 5: the cosine of the two vectors of each row. float32 [N]."""
    return (_unit(image) * _unit(text)).sum(axis=1)


def prune(similarity: np.ndarray, ratio: float = PRUNE_RATIO) -> np.ndarray:
    """Step 6: the rows that stay when the int(ratio * N) of lowest cosine are dropped, ascending. int64."""
    order = np.argsort(similarity, kind="stable")
    return np.sort(order[int(ratio * len(similarity)) :])


def cluster(vectors: np.ndarray, clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Step 7: centroids [K, d] and labels [N] of mini-batch k-means on raw vectors."""
    from sklearn.cluster import MiniBatchKMeans

    kmeans = MiniBatchKMeans(
        n_clusters=clusters, batch_size=10_000, n_init=20, random_state=SEED
    ).fit(vectors)
    return kmeans.cluster_centers_, kmeans.labels_


def contingency(image_labels: np.ndarray, text_labels: np.ndarray, clusters: int) -> np.ndarray:
    """Step 8: how many rows each image cluster shares with each text cluster, by group-by. int64 [K, K].

    Mended: clusters that no row is in keep their row and column.
    """
    rows = pd.DataFrame({"image": image_labels, "text": text_labels})
    table = rows.groupby(["image", "text"]).size().unstack(fill_value=0)
    return table.reindex(index=range(clusters), columns=range(clusters), fill_value=0).to_numpy()


def match(table: np.ndarray) -> list[Couple]:
    """Step 9: the one-to-one assignment that shares most."""
    return list(zip(*(side.tolist() for side in linear_sum_assignment(-table)), strict=True))


@dataclass(frozen=True)
class Prototypes:
    """In the order of falling cosine."""

    image: np.ndarray
    """float32 [B, d]."""
    text: np.ndarray
    """float32 [B, d]."""
    couples: list[Couple]


def prototypes(
    image: np.ndarray,
    text: np.ndarray,
    image_labels: np.ndarray,
    text_labels: np.ndarray,
    couples: list[Couple],
) -> Prototypes:
    """Steps 10 to 12: a mask over all rows for each couple, the plain means of what it shares, sorted.

    Mended: a couple that shares nothing gives the means of its two clusters below 300 clusters, and is dropped above
    (the published code averages nothing there and fails); so is one of which a cluster is empty.
    """
    found: list[tuple[np.ndarray, np.ndarray, Couple]] = []
    for i, j in couples:
        mine_i, mine_j = image_labels == i, text_labels == j
        shared = mine_i & mine_j
        if shared.any():
            found.append((image[shared].mean(axis=0), text[shared].mean(axis=0), (i, j)))
        elif len(couples) < KEEP_PAIRLESS_BELOW and mine_i.any() and mine_j.any():
            found.append((image[mine_i].mean(axis=0), text[mine_j].mean(axis=0), (i, j)))
    images, texts = (np.stack([one[side] for one in found]) for side in (0, 1))
    order = np.argsort(-pair_similarity(images, texts), kind="stable")
    return Prototypes(images[order], texts[order], [found[place][2] for place in order])


def nearest_captions(prototypes: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Step 13: the caption of highest cosine to each text prototype, from all N, by the whole matrix. int64 [B]."""
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
    """Step 14: one picture a call, from the global random numbers."""
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

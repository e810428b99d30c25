"""The published evaluation (VL-Distill, LoRS, PDS): images encoded on demand, ranks sorted.

Heads, loss, optimiser and draws are those of the package, so that the recalls are the same numbers:
only the procedure differs.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import nn

from pds_ray.config import ProtocolConfig
from pds_ray.training.data import Gallery, Pixels, TrainingPairs, batches
from pds_ray.training.loop import generator
from pds_ray.training.losses import info_nce
from pds_ray.training.retrieval import make_optimizer, schedule
from pds_ray.training.two_towers import TwoTowers, dropout_masks

TOP = 128  # candidates of a query that keep their score
LOW = -100.0


def recalls(
    image: torch.Tensor,
    text: torch.Tensor,
    owner: np.ndarray,
    kind: Literal["quicksort", "stable"] = "quicksort",
) -> dict[str, float]:
    """Compute recalls from the whole matrix.

    The 128 best of each query keep their scores, then every query is sorted. image float32 [n, d],
    text float32 [m, d], both of unit length, owner int64 [m]. Fixed: galleries below 128. The sort
    is numpy's default, as published, which is faster; with `kind` stable the earlier of equal
    scores comes first, as in the package: use it for galleries that repeat captions.
    """
    scores = image @ text.T
    to_text, to_image = _top(scores), _top(scores.T)
    captions_of = [np.flatnonzero(owner == row) for row in range(len(image))]
    image_ranks, text_ranks = np.zeros(len(image)), np.zeros(len(text))
    for row, score in enumerate(to_text):
        order = np.argsort(-score, kind=kind)
        image_ranks[row] = min(np.where(order == caption)[0][0] for caption in captions_of[row])
    for row, score in enumerate(to_image):
        order = np.argsort(-score, kind=kind)
        text_ranks[row] = np.where(order == owner[row])[0][0]
    found = {
        f"{direction}@{k}": float(100.0 * (ranks < k).mean())
        for direction, ranks in (("tr", image_ranks), ("ir", text_ranks))
        for k in (1, 5, 10)
    }
    return {**found, "r_mean": sum(found.values()) / len(found)}


def _top(scores: torch.Tensor) -> np.ndarray:
    """Return the scores with all but the 128 best of each row set to -100, row by row."""
    kept = torch.full(scores.shape, LOW)
    for row, score in enumerate(scores):
        best, place = score.topk(min(TOP, len(score)))
        kept[row, place] = best
    return kept.numpy()


def train_on_frozen(
    backbone: nn.Module,
    width: int,
    pairs: TrainingPairs,
    test: Gallery,
    pixels: Pixels,
    protocol: ProtocolConfig,
    seed: int,
) -> dict[str, float]:
    """Train and test one network of the published evaluation.

    Only the text head learns, yet every batch and every test image goes through the frozen backbone
    again. Returns the recalls of the best epoch on the test split, as published. Captions of the
    split may repeat: sorting is stable.
    """
    torch.manual_seed(seed + (1 << 32))
    backbone.eval().requires_grad_(False)
    head = TwoTowers(None, width, pairs.text.shape[1], image_head=False)
    optimizer, factor = make_optimizer(head.parameters(), protocol), schedule(protocol)
    best: dict[str, float] = {}
    for epoch in range(protocol.epochs):
        steps = batches(len(pairs.text), protocol.batch_size, protocol.sampling, seed, epoch)
        for step, batch in enumerate(steps):
            for group in optimizer.param_groups:
                group["lr"] = protocol.learning_rate * factor(epoch + step / len(steps))
            masks = dropout_masks(len(batch), width, generator(seed, "dropout", epoch, step))
            with torch.no_grad():
                features = backbone(pixels(pairs.images[batch]))
            loss = info_nce(*head(features, pairs.text[batch], masks))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch % protocol.evaluate_every == 0 or epoch == protocol.epochs - 1:
            found = _test(head, backbone, test, pixels)
            if not best or found["r_mean"] > best["r_mean"]:
                best = found
    return best


@torch.no_grad()
def _test(head: TwoTowers, backbone: nn.Module, test: Gallery, pixels: Pixels) -> dict[str, float]:
    parts = test.images.split(TOP)
    image = torch.cat([head.embed_images(backbone(pixels(part))) for part in parts])
    return recalls(image, head.embed_text(test.text), test.owner.numpy(), kind="stable")

"""Images and captions of a source, made ready for the training of experts: decoded once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from pds_ray.config import ConfigError
from pds_ray.encoders.base import TextEncoder
from pds_ray.sources.base import Sample, Shard, Source
from pds_ray.stages.experts import LONELY, WantedExperts
from pds_ray.stages.trial import encode, read_split
from pds_ray.training.data import TrainingPairs
from pds_ray.training.retrieval import embed_images
from pds_ray.training.workers import Workers


def prepare_shard(
    experts: WantedExperts,
    shard: Shard,
    load: Callable[[], TextEncoder],
    limit: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, Any]:
    """Write images and caption vectors of a shard; return their counts, bad samples by reason.

    `load` returns the text encoder; `limit` is entered for each image that is decoded. What stands
    before the damage of a shard is used. Raises SourceError if the shard cannot be read.
    """
    square = experts.square
    rule, files = experts.read.captions, experts.read.files
    images, captions, bad = read_split(
        experts.source, shard, [square], rule, limit, files, whole=False
    )
    owner = np.repeat(np.arange(len(captions)), [len(own) for own in captions])
    flat = [caption for own in captions for caption in own]
    text = encode(load(), flat) if flat else np.zeros((0, experts.encoder.dim), np.float32)
    kept = _finite_images(text, owner, len(captions))
    if lost := int((~kept).sum()):
        bad = {**bad, "nonfinite_embedding": lost}
    rows = kept[owner]
    tensors = {
        "images": torch.from_numpy(images[square][kept]),
        "text": torch.from_numpy(text[rows]),
        "owner": torch.from_numpy((np.cumsum(kept) - 1)[owner[rows]]),
    }
    counts = {"images": int(kept.sum()), "captions": int(rows.sum()), "bad": bad}
    experts.store.save_captions(shard.name, [flat[row] for row in np.flatnonzero(rows)])
    experts.store.commit(experts.store.data, shard.name, tensors, counts)
    return counts


def _finite_images(text: np.ndarray, owner: np.ndarray, images: int) -> np.ndarray:
    """Return which images have finite vectors of all their captions, bool [images]."""
    kept = np.ones(images, bool)
    np.logical_and.at(kept, owner, np.isfinite(text).all(1))
    return kept


def embed_shard(experts: WantedExperts, shard: str, backbone: nn.Module, workers: Workers) -> None:
    """Write the features that a frozen backbone, on the worker's device, has of a shard's images.

    They are those of the images as they are, not augmented.
    """
    images = experts.store.read(experts.store.data, shard)["images"]
    features = embed_images(backbone.eval(), images, experts.pixels, workers).cpu()
    experts.store.commit(experts.store.features, shard, {"features": features}, {})


def load_pairs(experts: WantedExperts, pixels: bool = False) -> TrainingPairs:
    """Return all images, or their features where the backbone is frozen, with their captions.

    With `pixels` it is the images in any case. Raises ExpertStoreError for a damaged file, and
    ConfigError if too few images can be used.
    """
    store, images, text, owners, count = experts.store, [], [], [], 0
    for shard in experts.shards:
        found = store.read(store.data, shard.name)
        if not len(found["images"]):
            continue
        if experts.frozen and not pixels:
            images.append(store.read(store.features, shard.name)["features"])
        else:
            images.append(found["images"])
        text.append(found["text"])
        owners.append(found["owner"] + count)
        count += len(found["images"])
    if count < LONELY:
        raise ConfigError(
            f"{count} images of {experts.source.uri} can be used; experts need at least {LONELY}"
        )
    return TrainingPairs(_joined(images), _joined(text), _joined(owners))


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)  # one part is not copied


def estimate_images(source: Source, shards: Sequence[Shard]) -> int:
    """Return the images of a source, estimated by those of its first shard, and its size.

    Nothing is decoded. Sizes that are not known count as equal.
    """
    first = sum(isinstance(item, Sample) for item in source.read(shards[0]))
    if all(shard.size for shard in shards):
        return math.ceil(first * sum(shard.size for shard in shards) / shards[0].size)
    return first * len(shards)

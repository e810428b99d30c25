"""Learned parts of a set: which of them a trial can train on, and captions for people.

docs/methods.md, "Learned parts" has the rules.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pds_ray.backbones.base import BackboneInfo
from pds_ray.config import ProtocolConfig
from pds_ray.stages.vectors import normalized
from pds_ray.store.learned import LEARNED_CAPTION_SCHEMA, Learned
from pds_ray.training.data import Pixels

NEAREST = 5
"""Real captions that a set names for each learned text vector."""
STEPS_OF = {"heads": "heads", "backbone": "all", "all": "all"}
"""Value of protocol.train -> training whose step sizes it can use; a text head alone has none."""
COSINES_AT_ONCE = 2**24  # 64 MiB


@dataclass(frozen=True)
class Use:
    """The learned parts that a trial trains on."""

    parts: tuple[str, ...] = ()
    """Some of images, text, similarity, steps."""
    loss: str = "info_nce"
    """The loss that has the similarity as targets, or of hard pairs (training/losses.py)."""
    rates: tuple[float, float] | None = None
    """Learning rates of SGD for images and text; None for the protocol's."""
    pixels: Pixels | None = None
    """The normalisation of the images."""


NOTHING_LEARNED = Use()


def obstacles(
    learned: Learned, protocol: ProtocolConfig, backbone: BackboneInfo, text_encoder: str
) -> dict[str, str]:
    """Return for each part of a set why a trial cannot use it, "" for one that it uses.

    `text_encoder` is the identity of the trial's.
    """
    about = learned.about
    side = protocol.image_size or backbone.image_size
    found = dict.fromkeys(learned.parts, "")
    if side != about.image_size:
        found["images"] = f"it takes {side} pixels, they have {about.image_size}"
    if protocol.captions_per_image != "one":
        found["text"] = "the protocol takes all captions of an image"
    elif text_encoder != about.text_encoder_identity:
        found["text"] = f"they are vectors of {about.text_encoder}"
    if protocol.targets == "soft":
        found["similarity"] = "the protocol names other targets"
    elif about.loss == "info_nce":
        found["similarity"] = "the loss of the set takes none"
    if backbone.identity != about.backbone_identity:
        found["steps"] = f"they are those of {about.backbone}"
    elif about.train != STEPS_OF.get(protocol.train):
        found["steps"] = f"they were learned for the training of {about.train}"
    elif protocol.optimizer != "sgd":
        found["steps"] = f"they are those of sgd, not of {protocol.optimizer}"
    return {part: found[part] for part in learned.parts}


def use(
    learned: Learned | None, protocol: ProtocolConfig, backbone: BackboneInfo, text_encoder: str
) -> Use:
    """Return the learned parts that a trial uses: those that nothing stands against."""
    if learned is None or protocol.learned == "off":
        return NOTHING_LEARNED
    about = learned.about
    against = obstacles(learned, protocol, backbone, text_encoder)
    parts = tuple(part for part, reason in against.items() if not reason)
    rates = None
    if "steps" in parts and learned.step_sizes is not None:
        image, text = map(float, learned.step_sizes)
        rates = image, text
    loss = about.loss if "similarity" in parts else "info_nce"
    return Use(parts, loss, rates, Pixels(about.mean, about.std) if "images" in parts else None)


def nearest_captions(
    queries: np.ndarray, shards: Iterable[tuple[list[str], np.ndarray]], count: int = NEAREST
) -> pa.Table:
    """Return the real captions nearest to K learned text vectors, float32 [K, t], exactly.

    `shards` are captions with their vectors, float32 [n, t], a part of all at a time, in order.
    Rows of LEARNED_CAPTION_SCHEMA: `count` different captions by falling cosine, fewer if there are
    no more; of equals the first comes first.
    """
    unit = normalized(queries)
    best: list[list[tuple[float, str]]] = [[] for _ in unit]
    for captions, vectors in shards:
        for query, found in enumerate(_best_of(unit, captions, vectors, count)):
            best[query] = _different([*best[query], *found], count)
    columns = {
        "pair": np.arange(len(unit)),
        "learned_captions": [[caption for _, caption in found] for found in best],
        "learned_cosines": [[cosine for cosine, _ in found] for found in best],
    }
    return pa.table(columns, schema=LEARNED_CAPTION_SCHEMA)


def _best_of(
    unit: np.ndarray, captions: list[str], vectors: np.ndarray, count: int
) -> Iterable[list[tuple[float, str]]]:
    """Yield for each query, in order, the best different captions of one shard."""
    texts, rows = np.unique(np.array(captions, object), return_index=True)
    order = np.argsort(rows)  # equal captions have equal vectors: the first stands for them
    texts, rows = texts[order], rows[order]
    candidates = normalized(vectors[rows])
    together = max(1, COSINES_AT_ONCE // max(1, len(rows)))
    for start in range(0, len(unit), together):
        for cosines in unit[start : start + together] @ candidates.T:
            places = np.argsort(-cosines, kind="stable")[:count]
            yield [(float(cosines[place]), str(texts[place])) for place in places]


def _different(found: list[tuple[float, str]], count: int) -> list[tuple[float, str]]:
    """Return the first `count` different captions by falling cosine."""
    kept: dict[str, float] = {}
    for cosine, caption in sorted(found, key=lambda entry: -entry[0]):
        kept.setdefault(caption, cosine)
    return [(cosine, caption) for caption, cosine in kept.items()][:count]

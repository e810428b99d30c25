"""Evaluation: a trial trains one model on one set and measures retrieval on the test split; trials are then averaged.

The six recalls and r_mean are means over seeds with population standard deviations, as the published tables give them;
over backbones, the means of the seeds are averaged first, and the deviation is that of these averages over the seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pds_ray.backbones.base import BackboneInfo
from pds_ray.config import ConfigError, ProtocolConfig
from pds_ray.encoders.base import EncoderInfo, TextEncoder, TextEncoderInfo
from pds_ray.modalities.image import ImageError, Preprocess, decode_image
from pds_ray.modalities.text import CLEANERS
from pds_ray.sources.base import SHARD_ENDS, Fault, Shard, Source, SourceError, read_shard
from pds_ray.store.distilled_set import DistilledSet
from pds_ray.training.recall import RECALLS
from pds_ray.training.train import (
    Gallery,
    Pixels,
    Progress,
    TrainingPairs,
    TwoTowers,
    Workers,
    embed_images,
    train,
)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
ENCODE_CAPTIONS = 256
VALIDATION_EVERY = (
    5  # without a split of its own every fifth image of the test split chooses the epoch
)
BATCH_NORMS = torch.nn.modules.batchnorm._BatchNorm
MEASURES = (*RECALLS, "r_mean")


@dataclass(frozen=True)
class Candidate:
    """A set to be evaluated, and how."""

    label: str
    path: str
    protocol: ProtocolConfig


@dataclass(frozen=True)
class TextInput:
    """Which vectors stand for captions."""

    of_set: str
    """prototypes, or captions."""
    encoder: str
    """Identity of the text encoder."""
    cleaning: str


@dataclass(frozen=True)
class CheckedSet:
    """A candidate that can be evaluated, with `auto` settled."""

    candidate: Candidate
    distilled: DistilledSet
    encoder: EncoderInfo | TextEncoderInfo
    text: TextInput


@dataclass(frozen=True)
class Split:
    """A held-out split."""

    uri: str
    source: Source
    shards: list[Shard]
    part: str = ""
    """"test" or "val" where one source serves as both."""

    def chosen(self, images: int) -> np.ndarray:
        """Which of its images belong to it. bool [images]."""
        for_val = np.arange(images) % VALIDATION_EVERY == 0
        return {"": np.ones(images, bool), "val": for_val, "test": ~for_val}[self.part]


@dataclass(frozen=True)
class Trial:
    """One model to be trained and measured."""

    key: str
    """Fingerprint of all that the result depends on; names its file."""
    label: str
    """Which set."""
    backbone: BackboneInfo
    image_size: int
    seed: int
    protocol: ProtocolConfig
    text: TextInput
    pairs: int

    def __str__(self) -> str:
        return f"{self.backbone.name} on {self.label}, seed {self.seed}"


def read_split(
    source: Source,
    shard: Shard,
    sizes: list[int],
    captions: str,
    limit: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[dict[int, np.ndarray], list[list[str]], dict[str, int]]:
    """The pictures of a shard at each of the sizes, their cleaned captions, and how many samples were bad and why.

    Pictures are resized to squares, their aspect not kept (B.4 of the published evaluation): uint8 [n, 3, S, S].
    `limit` is entered for each. Raises SourceError if the shard cannot be read to its end: recalls are of all images.
    """
    clean = CLEANERS[captions]
    squares = {size: Preprocess(size, resize_mode="squash") for size in sizes}
    pictures: dict[int, list[np.ndarray]] = {size: [] for size in sizes}
    texts: list[list[str]] = []
    bad: dict[str, int] = {}
    for item in read_shard(source, shard):
        reason = item.reason if isinstance(item, Fault) else None
        if isinstance(item, Fault) and reason in SHARD_ENDS:
            raise SourceError(
                f"shard {shard.name} ends early ({reason}: {item.detail}); recalls would miss images"
            )
        if not isinstance(item, Fault):
            try:
                with limit():
                    image = decode_image(item.image)
            except ImageError as error:
                reason = error.reason
            kept = [cleaned for caption in item.captions if (cleaned := clean(caption))]
            if reason is None and not kept:
                reason = "missing_caption"
        if reason is not None:
            bad[reason] = bad.get(reason, 0) + 1
            continue
        for size, square in squares.items():
            pictures[size].append(square(image).transpose(2, 0, 1))
        texts.append(kept)
    return {size: _stacked(rows, size) for size, rows in pictures.items()}, texts, bad


def set_pictures(distilled: DistilledSet, size: int) -> np.ndarray:
    """The pictures of a set as squares, uint8 [B, 3, size, size]."""
    square = Preprocess(size, resize_mode="squash")
    return _stacked(
        [square(distilled.image(pair)).transpose(2, 0, 1) for pair in range(len(distilled))], size
    )


def _stacked(rows: list[np.ndarray], size: int) -> np.ndarray:
    return np.stack(rows) if rows else np.zeros((0, 3, size, size), np.uint8)


def encode(encoder: TextEncoder, captions: list[str]) -> np.ndarray:
    """Caption vectors, un-normalised. float32 [m, d]."""
    parts = [
        captions[start : start + ENCODE_CAPTIONS]
        for start in range(0, len(captions), ENCODE_CAPTIONS)
    ]
    return np.concatenate([encoder.encode_captions(part) for part in parts])


def pixels_of(trial: Trial) -> Pixels:
    """The normalisation that the trial's protocol asks for."""
    if trial.protocol.normalization == "clip":
        return Pixels(CLIP_MEAN, CLIP_STD)
    return Pixels(trial.backbone.mean, trial.backbone.std)


def check_shared(trial: Trial, backbone: torch.nn.Module, workers: int) -> None:
    """Raises ConfigError in one line if several workers would train a backbone otherwise than one."""
    trained = trial.protocol.train in ("backbone", "all")
    if (
        workers > 1
        and trained
        and any(isinstance(part, BATCH_NORMS) for part in backbone.modules())
    ):
        raise ConfigError(
            f"backbone {trial.backbone.name} normalises over the batch, and {workers} workers would each do so over "
            "their own share; give --workers 1, or train the heads alone"
        )


Features = dict[tuple[str, ...], torch.Tensor]


def run_trial(
    trial: Trial,
    build: Callable[[BackboneInfo, int], torch.nn.Module],
    pairs: TrainingPairs,
    val: Gallery | None,
    test: Gallery,
    device: torch.device,
    workers: Workers | None = None,
    features: Features | None = None,
    resume: Path | None = None,
    report: Callable[[Progress, Callable[[Path], None]], None] = lambda _progress, _save: None,
) -> dict[str, Any]:
    """Trains and measures; returns {"epoch", "score", "recalls"}. `build` makes the backbone.

    A frozen backbone sees each picture once; `features` keeps what a pretrained one gave, for later trials, which do
    without it.
    """
    team = workers or Workers()
    pixels = pixels_of(trial)
    part = trial.protocol.train
    kept: torch.nn.Module | None = None

    @cache
    def backbone() -> torch.nn.Module:
        torch.manual_seed(trial.seed)
        built = build(trial.backbone, trial.image_size)
        check_shared(trial, built, team.count)
        return built

    if part in ("text_head", "heads"):
        known = features if features is not None and trial.backbone.pretrained else {}

        def frozen(images: torch.Tensor, *name: str) -> torch.Tensor:
            key = (
                trial.backbone.identity,
                str(trial.image_size),
                trial.protocol.normalization,
                *name,
            )
            if key not in known:
                known[key] = embed_images(
                    backbone().eval().to(device), images, pixels, device, team
                ).cpu()
            return known[key]

        pairs = TrainingPairs(frozen(pairs.images, "set", trial.label), pairs.text)
        rule = trial.text.cleaning  # it decides which pictures have a caption
        val = val and Gallery(frozen(val.images, "val", rule), val.text, val.owner)
        test = Gallery(frozen(test.images, "test", rule), test.text, test.owner)
        width = pairs.images.shape[1]
    else:
        kept, width = backbone(), feature_width(backbone(), trial.image_size)
    torch.manual_seed(trial.seed + (1 << 32))  # the heads start alike whatever the backbone drew
    model = TwoTowers(kept, width, pairs.text.shape[1], image_head=part in ("heads", "all"))
    return train(
        model, pairs, val, test, pixels, trial.protocol, trial.seed, device, team, resume, report
    )


@torch.no_grad()
def feature_width(backbone: torch.nn.Module, image_size: int) -> int:
    """Width of what a backbone gives."""
    training = backbone.training
    found = backbone.eval()(torch.zeros(1, 3, image_size, image_size)).shape[1]
    backbone.train(training)
    return found


def summarize(trials: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Trials of one set and backbone -> their mean and population standard deviation, measure by measure."""
    values = {name: np.array([trial["recalls"][name] for trial in trials]) for name in MEASURES}
    return {
        "mean": {name: float(value.mean()) for name, value in values.items()},
        "std": {name: float(value.std()) for name, value in values.items()},
    }


def average(backbones: list[list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Trials of several backbones, the same seeds in the same order -> the average backbone's mean and deviation."""
    mixed = [
        {
            "recalls": {
                name: float(np.mean([trial["recalls"][name] for trial in same_seed]))
                for name in MEASURES
            }
        }
        for same_seed in zip(*backbones, strict=True)
    ]
    return summarize(mixed)

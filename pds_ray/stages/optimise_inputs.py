"""The inputs of an optimisation: start, student, experts, real batches, and the validation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from PIL import Image

from pds_ray.config import ConfigError, ProtocolConfig, RunConfig
from pds_ray.distillers.base import Experts, Problem, Snapshot, Start
from pds_ray.encoders.base import TextEncoder
from pds_ray.errors import without_secrets
from pds_ray.modalities.image import decode_image
from pds_ray.modalities.text import CLEANERS
from pds_ray.sources.base import Source
from pds_ray.stages import experts as of_experts
from pds_ray.stages.expert_data import load_pairs
from pds_ray.stages.experts import WantedExperts
from pds_ray.stages.learned import use
from pds_ray.stages.trial import (
    Build,
    TextInput,
    Trial,
    TrialData,
    encode,
    read_split,
    run_trial,
)
from pds_ray.store.expert_store import open_experts
from pds_ray.store.flat import Layout
from pds_ray.store.learned import Learned, LearnedFor
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.storage import side_by_side
from pds_ray.training.data import Gallery, TrainingPairs, caption_rows
from pds_ray.training.workers import Workers

KEPT_BYTES = 2**30
"""Snapshots are kept in memory where all of them together take no more."""
JUDGED_EPOCHS, JUDGED_IMAGES = 50, 1_000
"""Epochs of the student that a validation trains, and images that it is measured on at most."""
SGD_DECAY = 5e-4
"""Weight decay of SGD in the published evaluations (docs/methods.md, Protocols)."""
FLOAT_BYTES = 4
WHOLE = {"backbone": "all"}
"""Part that experts train -> part that a set is said to be learned for, where the two differ."""


@dataclass(frozen=True)
class Prepared:
    """An optimisation that can begin."""

    problem: Problem
    start: Start
    about: LearnedFor


class NearExperts:
    """Experts whose snapshots are on the device of the student, and kept where that is little."""

    def __init__(self, experts: Experts, device: torch.device) -> None:
        self.names, self.epochs, self.layout = experts.names, experts.epochs, experts.layout
        size = FLOAT_BYTES * sum(experts.layout.sizes) * len(experts.names) * (experts.epochs + 1)

        def read(expert: str, epoch: int) -> Snapshot:
            found = experts.snapshot(expert, epoch)
            return Snapshot(found.theta.to(device), found.phi.to(device))

        self._read = cache(read) if size <= KEPT_BYTES else read

    def snapshot(self, expert: str, epoch: int) -> Snapshot:
        """Return the weights of one expert after some epochs. Raises ExpertStoreError."""
        return self._read(expert, epoch)


def prepare(
    config: RunConfig,
    experts: WantedExperts,
    folder: RunFolder,
    captions: Sequence[str],
    encoder: TextEncoder,
    build: Build,
    device: torch.device,
    begun: tuple[Learned, np.ndarray] | None = None,
) -> Prepared:
    """Return problem and start of a run whose start and experts are there.

    `captions` are those of the start, `build` makes the backbone, `begun` are learned parts of the
    start with their images: they are gone on with where they are of these experts' kind. Raises
    ExpertStoreError in one line for experts that are gone, damaged or of other tensors than the
    student.
    """
    stored = open_experts(experts.store, experts.config.count, experts.config.epochs)
    width = experts.store.about()["width"]
    backbone = of_experts.build_backbone(experts, 0, build)
    student = of_experts.build_model(experts, 0, backbone, width).to(device)
    stored.layout.check(Layout.of(student), "the student")
    about = learned_for(config, experts)
    if begun is not None and goes_on(begun[0].about, about):
        start = as_start(*begun)
    else:
        start = _start(config, experts, folder, captions, encoder)
    problem = Problem(
        student,
        NearExperts(stored, device),
        config.distill,
        config.seed,
        real_batches(experts, config.distill.batch_size, device),
    )
    similarity = None if start.similarity is None else start.similarity.to(device)
    there = Start(start.images.to(device), start.text.to(device), similarity)
    return Prepared(problem, there, about)


def goes_on(before: LearnedFor, now: LearnedFor) -> bool:
    """Return whether pixels and text vectors learned `before` mean the same `now`."""
    names = ("image_size", "mean", "std", "text_encoder_identity")
    return all(getattr(before, name) == getattr(now, name) for name in names)


def as_start(learned: Learned, images: np.ndarray) -> Start:
    """Return learned parts as a start, copied: what comes through Ray is read-only."""
    similarity = learned.similarity
    return Start(
        torch.tensor(images),
        torch.tensor(learned.text),
        None if similarity is None else torch.tensor(similarity),
    )


def learned_for(config: RunConfig, experts: WantedExperts) -> LearnedFor:
    """Return the models and the training that a run learns its set for."""
    backbone, loss = experts.backbone, config.distill.loss
    return LearnedFor(
        distiller=config.method,
        backbone=backbone.name,
        backbone_identity=backbone.identity,
        image_size=experts.square.size,
        mean=backbone.mean,
        std=backbone.std,
        text_encoder=experts.encoder.name,
        text_encoder_identity=experts.encoder.identity,
        loss="info_nce" if loss == "auto" else loss,
        train=WHOLE.get(experts.config.train, experts.config.train),
    )


def _start(
    config: RunConfig,
    experts: WantedExperts,
    folder: RunFolder,
    captions: Sequence[str],
    encoder: TextEncoder,
) -> Start:
    """Return images at the experts' side, normalised, and vectors of the cleaned captions."""
    names = map(folder.image_name, range(len(captions)))
    files = side_by_side(folder.images.read_bytes, names)
    rows = [experts.square(decode_image(file, min_side=1)) for file in files]
    pixels = torch.from_numpy(np.stack(rows).transpose(0, 3, 1, 2).copy())
    clean = CLEANERS[config.read.captions]
    vectors = encode(encoder, [clean(caption) for caption in captions])
    return Start(experts.pixels(pixels), torch.from_numpy(vectors))


def real_batches(
    experts: WantedExperts, size: int, device: torch.device
) -> Callable[[torch.Generator], tuple[torch.Tensor, torch.Tensor]]:
    """Return a function that draws `size` real images, each with one of its captions.

    The images are read when the first batch is asked for.
    """

    @cache
    def pairs() -> TrainingPairs:
        return load_pairs(experts, pixels=True)

    def draw(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        of = pairs()
        rows = torch.randint(len(of.images), (size,), generator=generator)
        images = experts.pixels(of.images[rows].to(device))
        return images, of.text[caption_rows(of, rows, generator)].to(device)

    return draw


def learned(about: LearnedFor, tensors: Mapping[str, torch.Tensor]) -> tuple[Learned, np.ndarray]:
    """Return learned parts and their images, of the tensors of `Variables.tensors`."""
    arrays = {name: value.numpy().astype(np.float32) for name, value in tensors.items()}
    parts = (arrays.get(name) for name in ("text", "similarity", "step_sizes"))
    text, similarity, sizes = parts
    assert text is not None
    return Learned(about, text, similarity, sizes), arrays["images"]


def as_image(pixels: np.ndarray, about: LearnedFor) -> Image.Image:
    """Return normalised pixels, float32 [3, S, S], as an RGB image; values end at 0 and 255."""
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (about.mean, about.std))
    bytes_ = (255 * (pixels * std + mean)).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(bytes_.transpose(1, 2, 0))


# ---- validation


def held_out(
    config: RunConfig, experts: WantedExperts, source: Source, encoder: TextEncoder
) -> Gallery:
    """Return the first JUDGED_IMAGES images of a held-out source, at the experts' side.

    Raises ConfigError if it has none that can be used.
    """
    square, images, texts = experts.square, [], list[list[str]]()
    for shard in source.shards():
        found, captions, _ = read_split(
            source, shard, [square], config.read.captions, read=config.read.files, whole=False
        )
        images.append(found[square])
        texts += captions
        if len(texts) >= JUDGED_IMAGES:
            break
    if not texts:
        raise ConfigError(
            f"no image of {without_secrets(source.uri)}, the validation split, can be used; give "
            "--distill.evaluate-every 0, and the last iteration is kept"
        )
    texts = texts[:JUDGED_IMAGES]
    owner = np.repeat(np.arange(len(texts)), list(map(len, texts)))
    vectors = encode(encoder, [caption for captions in texts for caption in captions])
    pixels = torch.from_numpy(np.concatenate(images)[: len(texts)])
    return Gallery(pixels, torch.from_numpy(vectors), torch.from_numpy(owner))


def validation(
    config: RunConfig, experts: WantedExperts, gallery: Gallery, about: LearnedFor, build: Build
) -> Callable[[Mapping[str, torch.Tensor]], float]:
    """Return the score of a set: r_mean on `gallery` of a student trained on what was learned.

    The student has the experts' backbone and trains what they train, by protocol `standard`, with
    the similarity as targets. Where it can use learned step sizes, they are its rates, and SGD has
    the published decay of weights; those of adapters are of no use to it.
    """
    by_adamw = ProtocolConfig(
        train={"lora": "backbone"}.get(experts.config.train, experts.config.train),  # type: ignore[arg-type]  # one of its values
        epochs=JUDGED_EPOCHS,
        evaluate_every=JUDGED_EPOCHS,
        select="last",
        image_size=about.image_size,
    )
    by_sgd = replace(by_adamw, optimizer="sgd", weight_decay=SGD_DECAY)

    def score(tensors: Mapping[str, torch.Tensor]) -> float:
        parts, images = learned(about, tensors)
        protocol = by_sgd
        how = use(parts, protocol, experts.backbone, about.text_encoder_identity)
        if how.rates is None:
            protocol = by_adamw
        text = TextInput("captions", about.text_encoder_identity, config.read.captions)
        pairs = len(images)
        of_set = (experts.backbone, about.image_size, config.seed, protocol, text, pairs, how)
        trial = Trial("", "validation", *of_set)
        targets = parts.similarity if "similarity" in how.parts else None
        data = TrainingPairs(
            torch.from_numpy(images),
            torch.from_numpy(parts.text),
            similarity=None if targets is None else torch.from_numpy(targets),
        )
        found = run_trial(trial, TrialData(data, None, gallery), build, _workers())
        return float(np.mean(list(found["recalls"].values())))

    return score


def _workers() -> Workers:
    return Workers(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))

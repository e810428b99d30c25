"""Evaluation: a trial trains one model on one set and measures retrieval; trials are averaged.

The six recalls on the test split and r_mean are means over seeds with population standard
deviations, as the published tables give them; over backbones, the means of the seeds are averaged
first, and the deviation is that of these averages over the seeds (docs/methods.md, Evaluation).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from pds_ray.backbones.base import BackboneInfo
from pds_ray.config import ConfigError, FilesConfig, ProtocolConfig
from pds_ray.encoders.base import EncoderInfo, TextEncoder, TextEncoderInfo
from pds_ray.modalities.image import ImageError, Preprocess, decode_image
from pds_ray.modalities.text import CLEANERS
from pds_ray.sources.base import (
    SHARD_ENDS,
    Fault,
    Sample,
    Shard,
    Source,
    SourceError,
    read_shard,
)
from pds_ray.stages.learned import NOTHING_LEARNED, Use
from pds_ray.store.distilled_set import DistilledSet
from pds_ray.training import loop
from pds_ray.training.data import Gallery, Pixels, TrainingPairs
from pds_ray.training.losses import training_loss
from pds_ray.training.recall import RECALLS
from pds_ray.training.retrieval import (
    RetrievalTraining,
    Step,
    embed_images,
    evaluate,
    make_optimizer,
    train_two_towers,
)
from pds_ray.training.two_towers import TwoTowers
from pds_ray.training.workers import Workers

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
ENCODE_CAPTIONS = 256
VALIDATION_EVERY = 5
"""Without a validation split, every fifth image of the test split chooses the epoch."""
BATCH_NORMS = torch.nn.modules.batchnorm._BatchNorm
MEASURES = (*RECALLS, "r_mean")


@dataclass(frozen=True)
class Candidate:
    """A set to be evaluated, and the protocol."""

    label: str
    path: str
    protocol: ProtocolConfig


@dataclass(frozen=True)
class TextInput:
    """The vectors that stand for captions."""

    of_set: str
    """prototypes, or captions."""
    encoder: str
    """The identity of the text encoder."""
    cleaning: str
    """The rule of cleaning of the captions."""


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
        """Return a mask of the source's images that belong to the split, bool [images].

        Raises ConfigError if none does.
        """
        for_val = np.arange(images) % VALIDATION_EVERY == 0
        mask = {"": np.ones(images, bool), "val": for_val, "test": ~for_val}[self.part]
        if not mask.any():
            raise ConfigError(
                f"{images} image of {self.uri} can be used: too few to choose the epoch by every "
                f"{VALIDATION_EVERY}th and test on the others; give --val SOURCE, or "
                "--protocol.select last"
            )
        return mask


@dataclass(frozen=True)
class Trial:
    """One model to be trained and measured."""

    key: str
    """The fingerprint of all that the result depends on; it names the trial's file."""
    label: str
    """The set."""
    backbone: BackboneInfo
    image_size: int
    seed: int
    protocol: ProtocolConfig
    text: TextInput
    pairs: int
    use: Use = NOTHING_LEARNED
    """The learned parts of the set that it trains on."""

    @property
    def square(self) -> Preprocess:
        """The rule by which its images become squares."""
        modes: dict[str, Literal["squash", "shortest"]] = {"squash": "squash", "crop": "shortest"}
        return Preprocess(self.image_size, resize_mode=modes[self.protocol.fit])

    def __str__(self) -> str:
        return f"{self.backbone.name} on {self.label}, seed {self.seed}"


def read_split(
    source: Source,
    shard: Shard,
    squares: list[Preprocess],
    captions: str,
    limit: Callable[[], AbstractContextManager[Any]] = nullcontext,
    read: FilesConfig | None = None,
    whole: bool = True,
) -> tuple[dict[Preprocess, np.ndarray], list[list[str]], dict[str, int]]:
    """Return a shard's images as squares, their cleaned captions, and bad samples by reason.

    Each of `squares` gives uint8 [n, 3, S, S]. `captions` names the rule of cleaning; `limit` is
    entered for each image that is decoded; `read` has the sizes that images may have. Raises
    SourceError if the shard cannot be read, and if it ends early but must be `whole`, as recalls
    are over all images.
    """
    clean, read = CLEANERS[captions], read or FilesConfig()
    images: dict[Preprocess, list[np.ndarray]] = {square: [] for square in squares}
    texts: list[list[str]] = []
    bad: dict[str, int] = {}
    for item in read_shard(source, shard):
        if whole and isinstance(item, Fault) and item.reason in SHARD_ENDS:
            raise SourceError(
                f"shard {shard.name} ends early ({item.reason}: {item.detail}); "
                "recalls would miss images"
            )
        found = item.reason if isinstance(item, Fault) else _usable(item, clean, limit, read)
        if isinstance(found, str):
            bad[found] = bad.get(found, 0) + 1
            continue
        for square, rows in images.items():
            rows.append(square(found[0]).transpose(2, 0, 1))
        texts.append(found[1])
    return {square: _stacked(rows, square.size) for square, rows in images.items()}, texts, bad


def _usable(
    sample: Sample,
    clean: Callable[[str], str],
    limit: Callable[[], AbstractContextManager[Any]],
    read: FilesConfig,
) -> tuple[Image.Image, list[str]] | str:
    """Return a sample's image and cleaned captions, or the reason why it cannot be used."""
    try:
        with limit():
            image = decode_image(sample.image, max_pixels=read.max_pixels, min_side=read.min_side)
    except ImageError as error:
        return error.reason
    captions = [cleaned for caption in sample.captions if (cleaned := clean(caption))]
    return (image, captions) if captions else "missing_caption"


def set_images(distilled: DistilledSet, square: Preprocess) -> np.ndarray:
    """Return the images of a set as squares, uint8 [B, 3, S, S]."""
    rows = [square(distilled.image(pair)).transpose(2, 0, 1) for pair in range(len(distilled))]
    return _stacked(rows, square.size)


def all_captions(
    distilled: DistilledSet, clean: Callable[[str], str]
) -> tuple[list[str], np.ndarray]:
    """Return the cleaned captions of all images of a set, and the image of each, int64 [m].

    Those of which nothing is left are left out, but for one where an image would have none.
    """
    lists = [[c for c in map(clean, texts) if c] or [""] for texts in distilled.caption_lists]
    owner = np.repeat(np.arange(len(lists)), list(map(len, lists)))
    return [caption for captions in lists for caption in captions], owner


def subjects(captions: list[str], owner: np.ndarray, images: int) -> np.ndarray:
    """Return the subject of each of n images, a number from 0, int64 [n].

    Images whose first of the m `captions` are equal show one subject. `owner`, int64 [m], is the
    image of each caption; every image has one.
    """
    first = np.full(images, len(captions))
    np.minimum.at(first, owner, np.arange(len(captions)))
    return np.unique([captions[row] for row in first], return_inverse=True)[1].reshape(-1)


def _stacked(rows: list[np.ndarray], size: int) -> np.ndarray:
    return np.stack(rows) if rows else np.zeros((0, 3, size, size), np.uint8)


def encode(
    encoder: TextEncoder, captions: list[str], step: Step = lambda _captions: None
) -> np.ndarray:
    """Return the vectors of m captions, not normalised, float32 [m, d].

    `step` is called before each batch with the number of captions done.
    """
    parts = []
    for start in range(0, len(captions), ENCODE_CAPTIONS):
        step(start)
        parts.append(encoder.encode_captions(captions[start : start + ENCODE_CAPTIONS]))
    return np.concatenate(parts)


def pixels_of(trial: Trial) -> Pixels:
    """Return the normalisation that the trial's protocol asks for."""
    if trial.protocol.normalization == "clip":
        return Pixels(CLIP_MEAN, CLIP_STD)
    return Pixels(trial.backbone.mean, trial.backbone.std)


def check_shared(trial: Trial, backbone: torch.nn.Module, workers: int) -> None:
    """Raise ConfigError if several workers would train a backbone differently from one."""
    if workers == 1 or trial.protocol.train not in ("backbone", "all"):
        return
    if any(isinstance(part, BATCH_NORMS) for part in backbone.modules()):
        raise ConfigError(
            f"backbone {trial.backbone.name} normalises over the batch, and {workers} workers "
            "would each do so over their own share; give --workers 1, or train the heads alone"
        )


@dataclass(frozen=True)
class TrialData:
    """The inputs of a trial."""

    pairs: TrainingPairs
    """The distilled set."""
    val: Gallery | None
    """The split that chooses the epoch, if one does."""
    test: Gallery


@dataclass
class Progress:
    """Progress of a trial, and its best epoch so far by the protocol's rule."""

    epochs_done: int = 0
    best: dict[str, Any] | None = None
    """epoch, score (the r_mean that selects), recalls (on test)."""


Report = Callable[[Progress, Callable[[], bytes]], None]
"""Called on every worker after each evaluation; the second argument returns the state then."""
Tell = Callable[[str, float | None], object]
"""Called now and then with what is waited for and, in training, the epochs done."""
Build = Callable[[BackboneInfo, int], torch.nn.Module]
Features = dict[tuple[str, ...], torch.Tensor]


def run_trial(
    trial: Trial,
    data: TrialData,
    build: Build,
    workers: Workers | None = None,
    features: Features | None = None,
    state: bytes = b"",
    report: Report = lambda _progress, _state: None,
    tell: Tell = lambda _what, _epochs: None,
) -> dict[str, Any]:
    """Train and measure; return {"epoch", "score", "recalls"}. `build` makes the backbone.

    A frozen backbone sees each image once; `features` keeps what a pretrained one gave for later
    trials, which do without it. A trial goes on from `state`, and starts afresh if the state is of
    another model or version of the package.
    """
    workers = workers or Workers()

    @cache
    def backbone() -> torch.nn.Module:
        torch.manual_seed(trial.seed)
        built = build(trial.backbone, trial.image_size)
        check_shared(trial, built, workers.count)
        return built

    if trial.protocol.train in ("text_head", "heads"):
        shared = features if features is not None and trial.backbone.pretrained else {}
        data = _with_features(trial, data, backbone, workers, shared, tell)
        trained, width = None, data.pairs.images.shape[1]
    else:
        trained = backbone()
        width = feature_width(trained, trial.image_size)
    torch.manual_seed(trial.seed + (1 << 32))  # the heads start alike whatever the backbone drew
    image_head = trial.protocol.train in ("heads", "all")
    model = TwoTowers(trained, width, data.pairs.text.shape[1], image_head).to(workers.device)
    return train_model(trial, model, data, workers, state, report, tell)


def _with_features(
    trial: Trial,
    data: TrialData,
    backbone: Callable[[], torch.nn.Module],
    workers: Workers,
    known: Features,
    tell: Tell,
) -> TrialData:
    """Return the data with features of the frozen backbone for images; `known` keeps them."""
    pixels = pixels_of(trial)
    of_backbone = (
        trial.backbone.identity,
        str(trial.image_size),
        trial.protocol.normalization,
        trial.protocol.fit,
    )

    def embedded(images: int) -> None:
        tell(f"the features of {trial}, {images:,} images done", None)

    def features(images: torch.Tensor, *name: str) -> torch.Tensor:
        key = (*of_backbone, *name)
        if key not in known:
            frozen = backbone().eval().to(workers.device)
            known[key] = embed_images(frozen, images, pixels, workers, embedded).cpu()
        return known[key]

    def gallery(split: Gallery, name: str) -> Gallery:
        # the rule of cleaning decides which images have a caption
        images = features(split.images, name, trial.text.cleaning)
        return dataclasses.replace(split, images=images)

    pairs = dataclasses.replace(data.pairs, images=features(data.pairs.images, "set", trial.label))
    val = data.val and gallery(data.val, "val")
    return TrialData(pairs, val, gallery(data.test, "test"))


def train_model(
    trial: Trial,
    model: TwoTowers,
    data: TrialData,
    workers: Workers,
    state: bytes = b"",
    report: Report = lambda _progress, _state: None,
    tell: Tell = lambda _what, _epochs: None,
) -> dict[str, Any]:
    """Train a trial's model and return its chosen epoch, as `run_trial` does."""
    protocol, pixels = trial.protocol, pixels_of(trial)
    optimizer = _optimizer(model, protocol, trial.use.rates)
    progress = _restore(state, model, optimizer)

    def measure(gallery: Gallery) -> dict[str, float]:
        return evaluate(model, gallery, pixels, workers, measured)

    def measured(images: int) -> None:
        tell(f"the measuring of {trial}, {images:,} images done", None)

    def trained(epochs: float) -> None:
        tell(f"the training of {trial}", epochs)

    def save() -> bytes:
        return loop.save_state(model, optimizer, dataclasses.asdict(progress))

    def after_epoch(epoch: int, _loss: torch.Tensor) -> None:
        progress.epochs_done = epoch + 1
        if is_evaluated(epoch, protocol):
            update_best(progress, epoch, protocol.select, data, measure)
            report(progress, save)

    loss = training_loss(trial.use.loss)
    training = RetrievalTraining(data.pairs, pixels, protocol, trial.seed, workers, loss)
    epochs = range(progress.epochs_done, protocol.epochs)
    train_two_towers(model, optimizer, training, epochs, after_epoch, trained)
    assert progress.best is not None
    return progress.best


def _optimizer(
    model: TwoTowers, protocol: ProtocolConfig, rates: tuple[float, float] | None
) -> torch.optim.Optimizer:
    """Return the protocol's optimizer, with learned `rates` of the branches where there are any."""
    if rates is None:
        return make_optimizer(model.parameters(), protocol)
    branches = zip(model.branches(), rates, strict=True)
    groups = [{"params": part, "lr": rate} for part, rate in branches if part]
    return make_optimizer(groups, protocol)


def _restore(state: bytes, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Bring model and optimizer to a state and return its progress.

    A state of another model or version, or a damaged one, counts for nothing.
    """
    found = loop.read_progress(state) or {}
    if found.keys() != {field.name for field in dataclasses.fields(Progress)}:
        return Progress()
    return Progress(**found) if loop.load_state(state, model, optimizer) else Progress()


def is_evaluated(epoch: int, protocol: ProtocolConfig) -> bool:
    """Return whether the model is measured after an epoch; after the last one it always is."""
    regular = protocol.select != "last" and epoch % protocol.evaluate_every == 0
    return regular or epoch == protocol.epochs - 1


def update_best(
    progress: Progress,
    epoch: int,
    select: str,
    data: TrialData,
    measure: Callable[[Gallery], dict[str, float]],
) -> None:
    """Keep this epoch as the best only if it scores strictly higher on the split that selects.

    The test split is measured only if it selects, or once an epoch is the best so far.
    """
    found = None
    if select == "val":
        assert data.val is not None
        score = measure(data.val)["r_mean"]
    else:
        found = measure(data.test)
        score = found["r_mean"]
    if progress.best is None or score > progress.best["score"]:
        progress.best = {"epoch": epoch, "score": score, "recalls": found or measure(data.test)}


@torch.no_grad()
def feature_width(backbone: torch.nn.Module, image_size: int) -> int:
    """Return the width of a backbone's features."""
    training = backbone.training
    found = backbone.eval()(torch.zeros(1, 3, image_size, image_size)).shape[1]
    backbone.train(training)
    return found


def summarize(trials: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return mean and population standard deviation of each measure over trials."""
    values = {name: np.array([trial["recalls"][name] for trial in trials]) for name in MEASURES}
    return {
        "mean": {name: float(value.mean()) for name, value in values.items()},
        "std": {name: float(value.std()) for name, value in values.items()},
    }


def average(backbones: list[list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Return mean and deviation of the average backbone.

    `backbones` are the trials of each, with the same seeds in the same order.
    """

    def mean(same_seed: tuple[dict[str, Any], ...]) -> dict[str, float]:
        return {
            name: float(np.mean([trial["recalls"][name] for trial in same_seed]))
            for name in MEASURES
        }

    return summarize([{"recalls": mean(trials)} for trials in zip(*backbones, strict=True)])


def over_sets(sets: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return mean and deviations of sets that were made alike, each a result of `summarize`.

    `std` is the deviation over the seeds of the models, a mean over the sets; `set_std`, only where
    there are several sets, the population standard deviation of their means.
    """

    def values(kind: str, name: str) -> list[float]:
        return [one[kind][name] for one in sets]

    found = {
        kind: {name: float(np.mean(values(kind, name))) for name in MEASURES}
        for kind in ("mean", "std")
    }
    if len(sets) > 1:
        found["set_std"] = {name: float(np.std(values("mean", name))) for name in MEASURES}
    return found

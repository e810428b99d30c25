"""The inputs of trials, made on the cluster: images and caption vectors of sets and of splits."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import ray
import torch

from pds_ray import catalog
from pds_ray.backbones.base import BackboneInfo
from pds_ray.config import ConfigError, EvaluateConfig, FilesConfig
from pds_ray.distributed import TASK_RETRIES, pools, process, session, tasks
from pds_ray.distributed.in_flight import InFlight
from pds_ray.encoders.base import EncoderInfo, TextEncoderInfo
from pds_ray.modalities.image import Preprocess
from pds_ray.modalities.text import CLEANERS
from pds_ray.sources.base import SourceError
from pds_ray.stages import trial as core
from pds_ray.store.distilled_set import DistilledSet
from pds_ray.telemetry.progress import QUIET_S, progress_bar
from pds_ray.training.data import Gallery, TrainingPairs

Encode = Callable[[str, list[str]], ray.ObjectRef]
"""Starts the encoding of captions by the text encoder of an identity."""


@dataclass(frozen=True)
class SplitInputs:
    """A held-out split of n images and m captions; its images are in the object store."""

    images: dict[Preprocess, list[ray.ObjectRef]]
    """Kind of squares -> uint8 [n, 3, S, S] of each shard."""
    captions: list[str]
    owner: np.ndarray
    """int64 [m]: the image of each caption."""
    chosen: np.ndarray
    """bool [n]: the images of the gallery."""
    bad: dict[str, int]

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the captions of the chosen images as rows of all, and their owners. int64 [c].

        The owners are counted among the chosen images.
        """
        rows = np.flatnonzero(self.chosen[self.owner])
        return rows, (np.cumsum(self.chosen) - 1)[self.owner[rows]]

    def subjects(self) -> np.ndarray:
        """Return the subject of each chosen image by its first caption, int64 [chosen]."""
        rows, owner = self.rows()
        captions = [self.captions[row] for row in rows]
        return core.subjects(captions, owner, int(self.chosen.sum()))

    def counts(self) -> dict[str, Any]:
        return {"images": int(self.chosen.sum()), "captions": len(self.rows()[0]), "bad": self.bad}


@dataclass(frozen=True)
class TrialInputs:
    """The inputs of all trials, by reference."""

    images: dict[tuple[str, Preprocess], ray.ObjectRef] = field(default_factory=dict)
    """(set, kind of squares) -> uint8 [B, 3, S, S]."""
    text: dict[str, ray.ObjectRef] = field(default_factory=dict)
    """Set -> float32 [B, t], or [C, t] where images have several captions."""
    owner: dict[str, np.ndarray] = field(default_factory=dict)
    """Set whose images have several captions -> the image of each, int64 [C]."""
    similarity: dict[str, ray.ObjectRef] = field(default_factory=dict)
    """Set with soft targets -> float32 [B, B]."""
    learned: dict[tuple[str, str], ray.ObjectRef] = field(default_factory=dict)
    """(set, learned part) -> images float32 [B, 3, S, S], text [B, t] or similarity [B, B]."""
    splits: dict[tuple[str, str], SplitInputs] = field(default_factory=dict)
    """(test or val, rule of cleaning) -> split."""
    held_out_text: dict[tuple[str, str, str], ray.ObjectRef] = field(default_factory=dict)
    """(test or val, rule of cleaning, encoder) -> float32 [m, t]."""

    def references(self) -> list[ray.ObjectRef]:
        splits = [shards for split in self.splits.values() for shards in split.images.values()]
        sets = (self.images, self.text, self.similarity, self.learned, self.held_out_text)
        return [*chain(*(inputs.values() for inputs in sets)), *chain(*splits)]

    def counts(self, rule: str) -> dict[str, Any]:
        """Return the counts of each split under a rule of cleaning."""
        return {
            name: split.counts()
            for (name, its_rule), split in self.splits.items()
            if its_rule == rule
        }


class Loader:
    """Tensors of one trial after the other in a worker; galleries are kept for later trials."""

    def __init__(self, inputs: TrialInputs) -> None:
        self._inputs = inputs
        self._galleries: dict[tuple[str, Preprocess, str, str], Gallery] = {}

    def load(self, trial: core.Trial) -> core.TrialData:
        """Return the tensors of a trial. Raises GetTimeoutError as `tasks.fetch` does."""
        val, test = (self._gallery(name, trial) for name in ("val", "test"))
        assert test is not None
        return core.TrialData(self._pairs(trial), val, test)

    def _pairs(self, trial: core.Trial) -> TrainingPairs:
        """Return the pairs of a trial's set, with the learned parts that it uses."""
        inputs, label, use = self._inputs, trial.label, trial.use
        references = {
            "images": inputs.images.get((label, trial.square)),
            "text": inputs.text.get(label),
            "similarity": inputs.similarity.get(label),
        }
        references |= {
            part: inputs.learned[label, part] for part in use.parts if part in references
        }
        found = {name: _tensor(tasks.fetch(ref)) for name, ref in references.items() if ref}
        if use.pixels:
            found["images"] = core.pixels_of(trial).of(found["images"], use.pixels)
        owner = None if label not in inputs.owner else torch.tensor(inputs.owner[label])
        return TrainingPairs(found["images"], found["text"], owner, found.get("similarity"))

    def _gallery(self, name: str, trial: core.Trial) -> Gallery | None:
        """Return the gallery of a split as the trial wants it; None if there is no such split."""
        rule, encoder = trial.text.cleaning, trial.text.encoder
        split = self._inputs.splits.get((name, rule))
        if split is None:
            return None
        key = (name, trial.square, rule, encoder)
        if key not in self._galleries:
            shards = [tasks.fetch(shard) for shard in split.images[trial.square]]
            # a single shard is not copied: it stays in memory that all workers share
            images = shards[0] if len(shards) == 1 else np.concatenate(shards)
            if not split.chosen.all():
                images = images[split.chosen]
            rows, owner = split.rows()
            text = tasks.fetch(self._inputs.held_out_text[name, rule, encoder])[rows]
            gallery = Gallery(_tensor(images), _tensor(text), torch.from_numpy(owner))
            self._galleries[key] = gallery
        gallery = self._galleries[key]
        if trial.protocol.subjects == "image":
            return gallery
        return replace(gallery, subject=torch.from_numpy(split.subjects()))


def _tensor(array: np.ndarray) -> torch.Tensor:
    with warnings.catch_warnings():  # arrays of the object store are read-only; so is their use
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)


def prepare(
    trials: list[core.Trial],
    sets: list[core.CheckedSet],
    splits: dict[str, core.Split],
    config: EvaluateConfig,
) -> TrialInputs:
    """Read images and encode captions on the cluster, once every backbone has been built there."""
    _check_backbones(trials, config.workers)
    squares = list(dict.fromkeys(trial.square for trial in trials))
    wanted = {trial.label for trial in trials}
    sets = [checked for checked in sets if checked.candidate.label in wanted]
    encoders = {checked.encoder.identity: checked.encoder for checked in sets}
    actors = pools.pool(config.ray.embed_actors)

    in_flight = InFlight()

    def encode(encoder: str, captions: list[str]) -> ray.ObjectRef:
        return pools.start_model(actors, _encode, encoders[encoder], captions, in_flight)

    inputs = TrialInputs()
    for name, split in splits.items():
        for rule in sorted({checked.text.cleaning for checked in sets}):
            seconds = config.ray.sample_timeout_s
            read = read_split(name, split, squares, rule, seconds, config.read)
            inputs.splits[name, rule] = read
            of_rule = {c.text.encoder for c in sets if c.text.cleaning == rule}
            for encoder in sorted(of_rule):
                inputs.held_out_text[name, rule, encoder] = encode(encoder, read.captions)
    for checked in sets:
        its_own = [trial for trial in trials if trial.label == checked.candidate.label]
        _start_set(inputs, checked, its_own, encode)
    with in_flight:
        _await_inputs(inputs, in_flight)
    return inputs


def _check_backbones(trials: list[core.Trial], workers: int) -> None:
    """Raise ConfigError for weights that are missing or do not fit, or a backbone not to share."""
    kinds = {(t.backbone.name, t.image_size, t.protocol.train): t for t in trials}
    with (
        session.unwrapped_errors(),
        progress_bar("build", len(kinds), "backbones", delay_s=QUIET_S) as bar,
    ):
        for _ in tasks.map_in_order(_try_backbone, kinds.values(), workers):
            bar.update()


def _try_backbone(trial: core.Trial, workers: int) -> None:
    core.check_shared(trial, build_backbone(trial.backbone, trial.image_size), workers)


def build_backbone(info: BackboneInfo, image_size: int) -> torch.nn.Module:
    with process.without_collections():
        return catalog.build_backbone(info, image_size)


def _encode(
    info: EncoderInfo | TextEncoderInfo, captions: list[str], in_flight: InFlight
) -> np.ndarray:
    with in_flight.doing("the text encoder to load") as doing:
        encoder = process.load_model(catalog.load_text_encoder, info, "fp32")

        def tell(done: int) -> None:
            doing.now(f"captions to be encoded, {done:,} of {len(captions):,} done")

        return core.encode(encoder, captions, tell)


def _start_set(
    inputs: TrialInputs, checked: core.CheckedSet, trials: list[core.Trial], encode: Encode
) -> None:
    """Start what the trials of a set need: its learned parts where they use them."""
    label, distilled = checked.candidate.label, checked.distilled
    task = ray.remote(core.set_images).options(num_cpus=pools.SMALL_TASK_CPUS)
    for square in dict.fromkeys(t.square for t in trials if "images" not in t.use.parts):
        inputs.images[label, square] = task.remote(distilled, square)
    _put_learned(inputs, label, distilled, trials)
    if checked.candidate.protocol.targets == "soft":
        inputs.similarity[label] = ray.put(distilled.similarity)
    if all("text" in trial.use.parts for trial in trials):
        return
    if checked.text.of_set == "prototypes":
        inputs.text[label] = ray.put(distilled.text_prototypes)
    else:
        clean = CLEANERS[checked.text.cleaning]
        captions = [clean(caption) for caption in distilled.captions]
        if checked.candidate.protocol.captions_per_image == "all":
            captions, inputs.owner[label] = core.all_captions(distilled, clean)
        inputs.text[label] = encode(checked.text.encoder, captions)


def _put_learned(
    inputs: TrialInputs, label: str, distilled: DistilledSet, trials: list[core.Trial]
) -> None:
    """Put the learned parts of a set that its trials use into the object store."""
    used, learned = {part for trial in trials for part in trial.use.parts}, distilled.learned
    if learned is None:
        return
    if "images" in used:
        inputs.learned[label, "images"] = ray.put(distilled.learned_images())
    if "text" in used:
        inputs.learned[label, "text"] = ray.put(learned.text)
    if "similarity" in used:
        inputs.learned[label, "similarity"] = ray.put(learned.similarity)


def _await_inputs(inputs: TrialInputs, in_flight: InFlight) -> None:
    """Wait for all inputs, and raise the errors of their tasks in one line.

    Queues of trials start later: they would leave no CPU and no GPU to these tasks, and they would
    try again what cannot succeed.
    """
    count = ray.remote(_count).options(num_cpus=pools.SMALL_TASK_CPUS)
    pending: dict[Any, ray.ObjectRef] = {**inputs.images, **inputs.text, **inputs.held_out_text}
    with (
        session.unwrapped_errors(),
        progress_bar("prepare", None, "inputs", delay_s=QUIET_S) as bar,
    ):
        bar.follow(in_flight.reports())
        for key, reference in pending.items():
            tasks.wait_for(count.remote(reference), f"the inputs of {key}")
            bar.update()


def _count(rows: np.ndarray) -> int:
    return len(rows)


def read_split(
    name: str,
    split: core.Split,
    squares: list[Preprocess],
    rule: str,
    seconds: float,
    read: FilesConfig | None = None,
) -> SplitInputs:
    """Read a split on the cluster by the options `read`.

    An image may take so many `seconds` to decode. Raises in one line ConfigError if nothing in it
    can be used, UserError if not all of it can be read.
    """
    task = ray.remote(core.read_split).options(
        num_cpus=pools.SMALL_TASK_CPUS, num_returns=3, max_retries=TASK_RETRIES
    )
    pick = ray.remote(_pick).options(num_cpus=0)
    limit = partial(process.time_limit, seconds)
    pending: list[Any] = [
        task.remote(split.source, shard, squares, rule, limit, read) for shard in split.shards
    ]
    texts: list[list[str]] = []
    bad: Counter[str] = Counter()
    with progress_bar(f"read {name}", len(pending), "shards") as bar:
        for shard, (_, captions, faults) in zip(split.shards, pending, strict=True):
            try:
                with session.unwrapped_errors():
                    texts += tasks.wait_for(captions, f"shard {shard.name}")
                    bad.update(ray.get(faults))
            except tasks.LOST as error:
                raise SourceError(
                    f"an image of shard {shard.name} of {split.uri} ends the process that decodes "
                    f"it, takes too much memory or more than {seconds:g} s "
                    "(--ray.sample-timeout-s), or its machine was lost; recalls would leave it out"
                ) from error
            bar.update()
    if not texts:
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in bad.items())
        raise ConfigError(f"no sample of {split.uri} can be used ({reasons})")
    return SplitInputs(
        images={
            square: [pick.remote(images, square) for images, _, _ in pending] for square in squares
        },
        captions=[caption for captions in texts for caption in captions],
        owner=np.repeat(np.arange(len(texts)), [len(captions) for captions in texts]),
        chosen=split.chosen(len(texts)),
        bad=dict(bad),
    )


def _pick(images: dict[Preprocess, np.ndarray], square: Preprocess) -> np.ndarray:
    return images[square]

"""Evaluation of distilled sets: checks before it starts, the trials, the results as JSON.

evaluation/NAME.json of a run folder, or of a distilled set by itself, holds one evaluation, and
each evaluation/trials/KEY.json one trained model. A trial whose file exists is never trained again;
one under way has its state in evaluation/trials/state/KEY.safetensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pds_ray import catalog
from pds_ray.config import ConfigError, EvaluateConfig, ProtocolConfig
from pds_ray.distributed.lifetime import session_kept
from pds_ray.encoders.base import EncoderInfo, TextEncoderInfo, spaces
from pds_ray.engine.trial_keys import SCHEMA_VERSION, make_trials
from pds_ray.errors import UserError, without_secrets
from pds_ray.modalities.text import CLEANERS
from pds_ray.recipes import protocol_name
from pds_ray.sources.advice import Tally
from pds_ray.sources.base import Sample, Shard, Source
from pds_ray.stages.learned import obstacles
from pds_ray.stages.trial import (
    VALIDATION_EVERY,
    Candidate,
    CheckedSet,
    Split,
    TextInput,
    Trial,
    average,
    summarize,
)
from pds_ray.store.distilled_set import load_distilled
from pds_ray.store.evaluation_folder import (
    EVALUATION,
    TRIALS,
    evaluation_name,
    finished_trials,
    result_name,
)
from pds_ray.store.manifest import fingerprint
from pds_ray.store.storage import Folder, is_remote

CAPTION_PROBE = 1_000  # samples searched for one with image and caption
MIN_PAIRS = 2  # a pair needs another to differ from


@dataclass(frozen=True)
class Evaluation:
    """A validated evaluation."""

    config: EvaluateConfig
    splits: dict[str, Split]
    sets: list[CheckedSet]
    trials: list[Trial]


def evaluate(path: str, config: EvaluateConfig, out: str | None = None) -> dict[str, Any]:
    """Train models on the distilled set at `path` and measure retrieval on `config.test`.

    Returns the results, and writes them to OUT/evaluation/ (default: the run folder or set itself).
    Interrupted and called again, it goes on with the missing trials. Raises UserError in one line
    for what the user can fix.
    """
    label, target = Folder(path).name, Folder(out or path)
    candidate = Candidate(label, path, config.protocol)
    result = evaluate_all([candidate], config, target / EVALUATION)[label]
    return {**result, "file": save(result, target)}


def save(result: dict[str, Any], run: Folder) -> str:
    """Write an evaluation into a run folder; return the file's path."""
    protocol = result["protocol"]["name"].partition(",")[0]
    name = evaluation_name(protocol, result["fingerprint"])
    (run / EVALUATION).write_json(name, result)
    return (run / EVALUATION / name).shown


def check(config: EvaluateConfig, protocols: list[ProtocolConfig], trained_on: list[Shard]) -> None:
    """Validate splits and backbones before any set is made.

    `trained_on` are the shards of the source. Raises ConfigError or SourceError in one line.
    """
    for name, split in _splits(config, protocols).items():
        if overlap(split.shards, trained_on):
            raise ConfigError(
                f"--{name} {split.uri} holds images of the source; give one that was held out"
            )
    for name in config.backbone_names:
        catalog.describe_backbone(name)


@session_kept()
def evaluate_all(
    candidates: Iterable[Candidate], config: EvaluateConfig, folder: Folder
) -> dict[str, dict[str, Any]]:
    """Evaluate several sets side by side; return the results by label.

    Trials are kept in FOLDER/trials/.
    """
    evaluation = make_evaluation(candidates, config)
    results = folder / TRIALS
    results.create()
    with results.lock():
        results.sweep()
        from pds_ray.distributed import session
        from pds_ray.distributed.evaluate import run_trials

        done = finished_trials(results)
        todo = {trial.key: trial for trial in evaluation.trials if trial.key not in done}
        if todo:  # sets that do not differ share their trials
            session.start(config.ray)
            run_trials(list(todo.values()), evaluation.sets, evaluation.splits, results, config)
    return {
        checked.candidate.label: _result(checked, evaluation, results)
        for checked in evaluation.sets
    }


def make_evaluation(candidates: Iterable[Candidate], config: EvaluateConfig) -> Evaluation:
    """Check sets, sources, backbones and text encoders, and list the trials.

    Raises ConfigError, SourceError or DistilledSetError in one line; nothing long has started by
    then.
    """
    candidates = list(candidates)
    splits = _splits(config, [candidate.protocol for candidate in candidates])
    backbones = [catalog.describe_backbone(name) for name in config.backbone_names]
    sets = [_check(candidate) for candidate in candidates]
    _require_held_out(sets, splits)
    of_sets = (make_trials(checked, backbones, splits, config) for checked in sets)
    trials = [trial for of_set in of_sets for trial in of_set]
    return Evaluation(config, splits, sets, trials)


def _splits(config: EvaluateConfig, protocols: list[ProtocolConfig]) -> dict[str, Split]:
    """Return the test split, and the one that chooses the epoch if a protocol wants one."""
    if not config.test:
        raise ConfigError(
            "no test split: give --test SOURCE (such as flickr30k:ROOT:test or scenes:1000:7)"
        )
    test = catalog.make_source(config.test, config.read)
    splits = {"test": _split(config.test, test)}
    if any(protocol.select == "val" for protocol in protocols):
        uri = config.val or test.validation
        if uri:
            splits["val"] = _split(uri, catalog.make_source(uri, config.read))
            if overlap(splits["test"].shards, splits["val"].shards):
                raise ConfigError(
                    f"--val {uri} holds images of --test {config.test}: the epoch would be "
                    "chosen on the test split; give another, or --protocol.select test"
                )
        else:
            splits["val"] = dataclasses.replace(splits["test"], part="val")
            splits["test"] = dataclasses.replace(splits["test"], part="test")
    return splits


def _require_held_out(sets: list[CheckedSet], splits: dict[str, Split]) -> None:
    """Raise ConfigError if a set is known to come from images it would be measured on."""
    for uri in {str(checked.distilled.manifest["about"].get("source", "")) for checked in sets}:
        for name, split in splits.items():
            if _kind(uri) != _kind(split.uri):
                continue
            try:
                source = catalog.make_source(uri).shards()
            except UserError:
                continue  # a source that is no longer there tells nothing
            if overlap(split.shards, source):
                raise ConfigError(
                    f"--{name} {split.uri} holds images of {uri}, which the set was made from"
                )


def _kind(uri: str) -> str:
    """Return the scheme of a source, "" for shards and folders on a disk."""
    scheme = uri.partition(":")[0].replace("folder", "")  # folder:ROOT is ROOT
    return scheme if scheme in catalog.SOURCES or is_remote(uri) else ""


def overlap(some: list[Shard], others: list[Shard]) -> bool:
    """Return whether two sources have a shard in common, as far as their listings tell."""
    return not set(map(_identity, some)).isdisjoint(map(_identity, others))


def _identity(shard: Shard) -> tuple[str, str | int, int]:
    """Return what a shard is known by wherever it lies."""
    # files that were unpacked together may have one time; of drawn images a part is enough
    size = shard.size if shard.version.isdecimal() else 0
    return shard.name, shard.version or shard.size, size


def _split(uri: str, source: Source) -> Split:
    """Return a source as a split. Raises ConfigError if the first samples have no caption."""
    shards = source.shards()
    _require_captions(uri, source, shards)
    return Split(uri, source, shards)


def _require_captions(uri: str, source: Source, shards: list[Shard]) -> None:
    seen, bad = 0, Tally()
    for shard in shards:
        for item in source.read(shard):
            if isinstance(item, Sample):
                return
            bad.add(item.reason, item.key, item.detail)
            seen += 1
            if seen == CAPTION_PROBE:
                raise ConfigError(
                    f"none of the first {seen:,} samples of {uri} has an image and a caption "
                    f"({bad.line()})"
                )
    raise ConfigError(
        f"none of the {seen:,} samples of {uri} has an image and a caption; retrieval needs both"
        + (f" ({bad.line()})" if seen else "")
    )


def _check(candidate: Candidate) -> CheckedSet:
    """Load a set and settle what `auto` stands for.

    Raises ConfigError or DistilledSetError in one line.
    """
    distilled, protocol = load_distilled(candidate.path), candidate.protocol
    about = distilled.manifest["about"]
    if len(distilled) < MIN_PAIRS:
        raise ConfigError(
            f"{candidate.path} has {len(distilled)} pairs; training needs at least {MIN_PAIRS}"
        )
    several = any(len(captions) > 1 for captions in distilled.caption_lists)
    require_extras(protocol, candidate.path, distilled.similarity is not None, several)
    own, space, dim = about.get("encoder"), about.get("space"), distilled.text_prototypes.shape[1]
    encoder = text_encoder(protocol, candidate.path, own, space, dim)
    name = encoder.name
    clean = CLEANERS[protocol.captions]
    blank = sum(not clean(caption) for caption in distilled.captions)
    if protocol.text == "captions" and blank:
        raise ConfigError(
            f"{blank:,} of {len(distilled):,} pairs of {candidate.path} have no caption, "
            f"and {name} needs them"
        )
    text = TextInput(protocol.text, encoder.identity, protocol.captions)
    return CheckedSet(candidate, distilled, encoder, text)


def require_extras(
    protocol: ProtocolConfig, path: str, similarity: bool, several_captions: bool
) -> None:
    """Raise ConfigError unless the set at `path` has the extra parts that its protocol needs."""
    if protocol.targets == "soft" and not similarity:
        raise ConfigError(
            f"{path} has no soft targets; make it with --extras.similarity clip or table, or give "
            "--protocol.targets hard"
        )
    if protocol.captions_per_image == "one":
        return
    if protocol.text == "prototypes":
        raise ConfigError(
            "--protocol.captions-per-image all needs --protocol.text captions: a pair has one text "
            "prototype"
        )
    if not several_captions:
        raise ConfigError(
            f"{path} has one caption per image; make it with --extras.captions, or give "
            "--protocol.captions-per-image one"
        )


def text_encoder(
    protocol: ProtocolConfig, path: str, own: str | None, space: str | None, dim: int
) -> EncoderInfo | TextEncoderInfo:
    """Return the text encoder that a protocol wants for the set at `path`, made by the CLIP `own`.

    Raises ConfigError in one line if there is none, or if the set's text prototypes are wanted and
    do not fit it.
    """
    name = own if protocol.text_encoder == "auto" else protocol.text_encoder
    if not name:
        raise ConfigError(f"{path} does not say which CLIP made it; give --protocol.text-encoder")
    encoder = catalog.describe_text_encoder(name)
    fits = space in spaces(encoder) and encoder.dim == dim
    if protocol.text == "prototypes" and not fits:
        raise ConfigError(
            f"the text prototypes of {path} are of {own} and do not fit the text encoder {name}; "
            "give --protocol.text captions"
        )
    return encoder


def _result(checked: CheckedSet, evaluation: Evaluation, results: Folder) -> dict[str, Any]:
    """Return the finished trials of a set as one JSON value."""
    config, protocol = evaluation.config, checked.candidate.protocol
    mine = [trial for trial in evaluation.trials if trial.label == checked.candidate.label]
    found = {trial.key: results.read_json(result_name(trial.key)) for trial in mine}
    backbones = {
        name: [
            {field: found[trial.key][field] for field in ("seed", "epoch", "recalls", "seconds")}
            for trial in mine
            if trial.backbone.name == name
        ]
        for name in config.backbone_names
    }
    # what training reads, at the side that each backbone takes, whatever side is stored
    cost = {trial.backbone.name: trial.pairs * trial.image_size**2 for trial in mine}
    used = {trial.backbone.name: list(trial.use.parts) for trial in mine}
    has_learned = checked.distilled.learned is not None
    about = checked.distilled.manifest["about"]
    counts = found[mine[0].key]["splits"]
    splits = {
        name: {"source": without_secrets(split.uri), **counts[name]}
        for name, split in evaluation.splits.items()
        if name == "test" or protocol.select == "val"
    }
    return {
        "schema": SCHEMA_VERSION,
        "fingerprint": fingerprint(sorted(found)),
        "set": {
            "path": without_secrets(checked.candidate.path),
            **checked.distilled.size().to_json(),
            **{name: about.get(name) for name in ("method", "source", "encoder", "decoder")},
        },
        "protocol": {
            "name": protocol_name(dataclasses.replace(config, protocol=protocol)),
            **dataclasses.asdict(protocol),
            "text_encoder": checked.encoder.name,
        },
        "test": splits["test"],
        "val": splits.get("val"),
        "backbones": [
            {
                "name": name,
                **({"used": used[name]} if has_learned else {}),
                "pixels_per_epoch": cost[name],
                "trials": trials,
                **summarize(trials),
            }
            for name, trials in backbones.items()
        ],
        "pixels_per_epoch": sum(cost.values()) / len(cost),
        **average(list(backbones.values())),
        "notes": _notes(checked, evaluation),
    }


def _notes(checked: CheckedSet, evaluation: Evaluation) -> list[str]:
    """Return notes for a reader of the figures."""
    protocol, notes = checked.candidate.protocol, []
    if protocol.select == "test":
        notes.append(
            "the epoch was chosen on the test split, as in the published evaluation: "
            "figures are optimistic"
        )
    if evaluation.splits["test"].part:
        test = without_secrets(evaluation.config.test)
        notes.append(
            f"no validation split is known for {test}: every {VALIDATION_EVERY}th image "
            "of it chose the epoch, the others were the test; --val SOURCE gives one"
        )
    pairs = len(checked.distilled)
    if pairs < protocol.batch_size:
        notes.append(
            f"{pairs:,} pairs are fewer than a batch of {protocol.batch_size}: "
            "every step sees them all"
        )
    return [*notes, *_unused(checked, evaluation.trials)]


def _unused(checked: CheckedSet, trials: list[Trial]) -> list[str]:
    """Return a note for each learned part of a set that a backbone's trials do not use."""
    learned, protocol = checked.distilled.learned, checked.candidate.protocol
    if learned is None:
        return []
    if protocol.learned == "off":
        return [f"learned parts are not used: {', '.join(learned.parts)} (--protocol.learned off)"]
    backbones = {t.backbone.name: t.backbone for t in trials if t.label == checked.candidate.label}
    return [
        f"learned {part} not used with {name}: {reason}"
        for name, backbone in backbones.items()
        for part, reason in obstacles(learned, protocol, backbone, checked.encoder.identity).items()
        if reason
    ]

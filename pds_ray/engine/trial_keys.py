"""The trials of a set, each keyed by all that its result depends on."""

from __future__ import annotations

import dataclasses
from typing import Any

from pds_ray.backbones.base import BackboneInfo
from pds_ray.config import EvaluateConfig, ProtocolConfig, changed
from pds_ray.stages.learned import Use, use
from pds_ray.stages.trial import CheckedSet, Split, Trial
from pds_ray.store.distilled_set import PROTOTYPES, DistilledSet, image_path
from pds_ray.store.learned import LEARNED
from pds_ray.store.manifest import fingerprint

SCHEMA_VERSION = 1
LATER = ("fit", "subjects", "targets", "captions_per_image")
"""Options of a protocol that came after trials were keyed without them."""
OF_USE = "learned"
"""The option that counts by what comes of it: the learned parts that a trial uses."""


def make_trials(
    checked: CheckedSet,
    backbones: list[BackboneInfo],
    splits: dict[str, Split],
    config: EvaluateConfig,
) -> list[Trial]:
    """Return the trials of a set: one per backbone and seed, each keyed by all it depends on."""
    candidate, protocol = checked.candidate, checked.candidate.protocol
    held_out = {
        name: [split.part, [(shard.name, shard.size, shard.version) for shard in split.shards]]
        for name, split in splits.items()
        if name == "test" or protocol.select == "val"
    }
    # the encoder by its identity, which holds all that its name says
    about_protocol = {**_of_key(protocol), "text_encoder": checked.encoder.identity}
    content = _content(checked.distilled, protocol)
    depends_on = [SCHEMA_VERSION, content, about_protocol, held_out]
    if reading := changed(config.read):  # at their defaults these options change no earlier key
        depends_on.append(reading)
    encoder, learned = checked.encoder.identity, checked.distilled.learned
    uses = {b.name: use(learned, protocol, b, encoder) for b in backbones}
    return [
        Trial(
            key=fingerprint(
                *depends_on,
                *_of_learned(checked.distilled, uses[backbone.name]),
                backbone.identity,
                seed,
            ),
            label=candidate.label,
            backbone=backbone,
            image_size=protocol.image_size or backbone.image_size,
            seed=seed,
            protocol=protocol,
            text=checked.text,
            pairs=len(checked.distilled),
            use=uses[backbone.name],
        )
        for backbone in backbones
        for seed in range(config.seeds)
    ]


def _of_key(protocol: ProtocolConfig) -> dict[str, Any]:
    """Return the options of a protocol that a trial's key holds.

    Those that came later count where they are not at their default: so earlier trials stand.
    """
    given = changed(protocol)
    fields = dataclasses.asdict(protocol).items()
    counted = ((name, value) for name, value in fields if name != OF_USE)
    return {name: value for name, value in counted if name not in LATER or name in given}


def _of_learned(distilled: DistilledSet, use: Use) -> list[Any]:
    """Return what a key holds of learned parts; nothing where none are used."""
    return [[distilled.manifest["files"][LEARNED]["sha256"], use.parts]] if use.parts else []


def _content(distilled: DistilledSet, protocol: ProtocolConfig) -> list[Any]:
    """Return what training sees of a set: equal for two that differ in their cards alone."""
    files = distilled.manifest["files"]
    trained_on = [*(image_path(row["file_name"]) for row in distilled.records), PROTOTYPES]
    captions: list[Any] = [distilled.captions]
    if protocol.captions_per_image == "all":
        captions.append(distilled.caption_lists)
    return [[files[name]["sha256"] for name in trained_on], *captions]

"""A method is a list of stages; a stage is one row; every stage gets one `Run`.

A method is named in `catalog.METHODS`; `engine.run` runs any of them, stage by stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

from pds_ray.config import RunConfig, flatten, to_dict
from pds_ray.config import replace as configure
from pds_ray.decoders.base import DecoderInfo
from pds_ray.encoders.base import EncoderInfo
from pds_ray.sources.base import Shard, Source
from pds_ray.store.card import CardText
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.manifest import RunManifest
from pds_ray.store.run_folder import RunFolder

Counts = dict[str, Any]
"""Counts of what a stage did, as JSON values: shown in the summary, recorded in run.json."""


@dataclass(frozen=True)
class Stage:
    """One step of a method: all that is to be known about it, in one row."""

    name: str
    run: str
    """The function that does it, as "module:function"; it takes the `Run` and returns `Counts`."""
    depends_on: Callable[[Run], Any]
    """JSON values that its bytes depend on; those of the stages before it are added."""
    files: Callable[[Run], list[str]] | None
    """Names below the run folder of all that it writes, hashed when it ends.

    None for the stage that fills the embedding store, whose commit markers hold the hashes.
    """
    options: tuple[str, ...] = ()
    """Sections of the configuration that it reads, or single options with dots."""
    unit: str = ""
    """The unit of its rate; "" for a stage without a rate."""
    counted: str = ""
    """The entry of its counts that holds the number of units done in the last session."""
    card: tuple[tuple[str, str], ...] = ()
    """Lines of the data-set card: (label, entry of its counts)."""
    plan: str = ""
    """Its row of the cost model, as "module:attribute"; "" where it cannot be planned."""
    settles: Callable[[Run], Mapping[str, Any]] | None = None
    """Options, with dots, that it chose; the stages after it find them in the configuration."""

    def function(self) -> Callable[[Run], Counts]:
        """Import the function that does it, and Ray with it: not before the stage runs."""
        module, _, name = self.run.partition(":")
        return getattr(import_module(module), name)


@dataclass(frozen=True)
class Method:
    """A way to make a distilled set: stages, in order."""

    stages: tuple[Stage, ...]
    card: CardText
    """Its part of the data-set card."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Options, with dots, that it fixes."""
    auto: Mapping[str, str] = field(default_factory=lambda: {"decode.decoder": "unclip"})
    """Options, with dots, and the value that `auto` stands for in this method."""
    chosen: str = ""
    """Description of how it chooses real pairs, for the card; "" if it makes new ones."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the stages, in order."""
        return tuple(stage.name for stage in self.stages)

    @property
    def options(self) -> tuple[str, ...]:
        """The sections and single options that its stages read."""
        return tuple(dict.fromkeys(name for stage in self.stages for name in stage.options))

    def stage(self, name: str) -> Stage:
        """Return the stage called `name`. Raises KeyError."""
        return {stage.name: stage for stage in self.stages}[name]

    def replaced(self, row: Stage) -> Method:
        """Return the method with the stage of the same name replaced by `row`: a variant."""
        stages = tuple(row if stage.name == row.name else stage for stage in self.stages)
        return replace(self, stages=stages)

    def with_stage(self, row: Stage, after: str) -> Method:
        """Return the method with the stage `row` after the one called `after`: a variant."""
        place = self.names.index(after) + 1
        return replace(self, stages=(*self.stages[:place], row, *self.stages[place:]))

    def settled(self, config: RunConfig) -> RunConfig:
        """Return the configuration with what `auto` stands for, and with what it fixes."""
        given = flatten(to_dict(config))
        auto = {name: value for name, value in self.auto.items() if given[name] == "auto"}
        return configure(config, {**auto, **self.settings})

    def before(self, name: str) -> Stage:
        """Return the stage before the one called `name`."""
        return self.stages[self.names.index(name) - 1]

    def after(self, name: str) -> tuple[Stage, ...]:
        """Return the stages after the one called `name`."""
        return self.stages[self.names.index(name) + 1 :]


@dataclass(frozen=True)
class Run:
    """A checked run: what its stages work on. Made by `engine.plan.make_run`."""

    config: RunConfig
    """With all options that the method does not read at their defaults."""
    method: Method
    source: Source
    shards: list[Shard]
    encoder: EncoderInfo
    decoder: DecoderInfo
    folder: RunFolder
    store: EmbeddingStore
    manifest: RunManifest
    fingerprints: Mapping[str, str]
    """Stage -> hash of all that its bytes depend on."""
    changed: Mapping[str, Shard] = field(default_factory=dict)
    """Name -> shard as it is now, of those that changed since the source was begun with."""
    embedded: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    """Shard -> commit marker of the shards that are embedded, in order; empty until they are."""

    @property
    def shard_names(self) -> list[str]:
        """The names of the shards that are embedded, in order."""
        return list(self.embedded)

    def counts(self, stage: str) -> Counts:
        """Return what a finished stage counted."""
        return self.manifest.stages[stage]["counts"]

    def after(self, stage: Stage) -> Run:
        """Return the run as the stages after a finished one find it."""
        if stage.settles is None:
            return self
        config = configure(self.config, stage.settles(self))
        return replace(self, config=config, folder=self.folder.of_format(config.decode.format))

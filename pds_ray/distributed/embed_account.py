"""Counts and problems of the shards that are embedded, held against the limits of the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from pds_ray.config import ConfigError, RayConfig
from pds_ray.distributed import metrics
from pds_ray.sources.advice import Tally, advised
from pds_ray.stages import embed as core
from pds_ray.stages.embed import ShardCounts
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.storage import StorageError
from pds_ray.telemetry import log
from pds_ray.telemetry.progress import Bar, on_terminal

MIN_SAMPLES_TO_JUDGE = 100
EXAMPLE_SHARDS = 20  # shards that are searched for an example of each reason


@dataclass
class Outcome:
    """The shards of a run so far."""

    totals: ShardCounts
    """Counts of all that are committed."""
    damaged: dict[str, str]
    """Committed shard -> how its file is damaged."""
    failed: dict[str, str] = field(default_factory=dict)
    """Shard -> why it could not be read."""

    @property
    def problems(self) -> dict[str, str]:
        """Shard -> what is wrong with it."""
        return {**self.damaged, **self.failed}


@dataclass
class Account:
    """Counts of all shards of a run so far: shown on a bar, held against the run's limits."""

    shards: int
    finished: int
    """Shards that are committed."""
    outcome: Outcome
    limits: RayConfig
    bar: Bar
    store: EmbeddingStore
    committed: list[str] = field(default_factory=list)
    """The shards of this session that are committed."""

    def commit(self, shard: str, counts: ShardCounts, damage: str) -> None:
        """Count a shard that is committed; its `counts` are among the totals already."""
        self.finished += 1
        self.committed.append(shard)
        metrics.count("pds_ray_shards_committed_total", 1)
        metrics.count("pds_ray_images_embedded_total", counts.images)
        metrics.count("pds_ray_pairs_embedded_total", counts.pairs)
        for reason, bad in counts.reasons.items():
            metrics.count("pds_ray_bad_samples_total", bad, reason=reason)
        log.event("shard_committed", shard=shard, **asdict(counts))
        if damage:
            self.outcome.damaged[shard] = damage
            self._warn(shard, damage, "is damaged")

    def fail(self, shard: str, problem: str) -> None:
        """Count a shard that is set aside. Raises ConfigError if these are too many."""
        self.outcome.failed[shard] = problem
        self._warn(shard, problem, "is set aside")
        self.check_failed()

    def stand(self, shard: str, marker: dict[str, Any]) -> None:
        """Count a shard that was tried again in vain as its marker has it."""
        self.outcome.totals += core.marker_counts(marker)
        if damage := core.marker_damage(marker):
            self.outcome.damaged[shard] = damage

    def _warn(self, shard: str, problem: str, what: str) -> None:
        metrics.count("pds_ray_shards_failed_total", 1)
        text = f"pds-ray: shard {shard} {what}: {advised(problem)}"
        log.event("shard_failed", text, "warning", shard=shard, reason=problem)

    def check_failed(self) -> None:
        """Raise ConfigError if too many shards cannot be read."""
        check_failed_share(self.outcome.problems, self.shards, self.limits.max_failed_share)

    def check(self) -> None:
        """Raise ConfigError if too many samples are bad or too many shards cannot be read."""
        totals = self.outcome.totals
        examples = partial(examples_of, self.store, self.committed, totals)
        check_bad_share(totals, self.limits.max_bad_share, False, examples)
        self.check_failed()

    def show(self, state: str = "") -> None:
        """Bring the bar up to date; its length is estimated from the shards so far."""
        totals = self.outcome.totals
        images = totals.images
        if self.finished:
            expected = round(images * self.shards / self.finished)
            self.bar.total = max(images, int(self.bar.n), expected)
        done = f"{self.finished}/{self.shards} shards"
        counts = f"{totals.pairs:,} pairs, {totals.bad:,} bad"
        self.bar.set_postfix_str(f"{done}, {counts}{state}", refresh=bool(state) and on_terminal())
        self.bar.update(images - self.bar.finished)


def examples_of(
    store: EmbeddingStore, shards: list[str], totals: ShardCounts
) -> dict[str, tuple[str, str]]:
    """Return reason -> key and detail of a bad sample of the first EXAMPLE_SHARDS shards."""
    found: dict[str, tuple[str, str]] = {}
    for shard in shards[:EXAMPLE_SHARDS]:
        if totals.reasons.keys() <= found.keys():
            break
        try:
            rows = store.errors(shard).to_pylist()
        except (OSError, StorageError):  # it has no embeddings
            continue
        for row in rows:
            found.setdefault(row["reason"], (row["key"], row["detail"]))
    return found


def check_bad_share(
    totals: ShardCounts,
    limit: float,
    final: bool,
    examples: Callable[[], dict[str, tuple[str, str]]] = dict,
) -> None:
    """Stop a run that would distil garbage.

    Raises ConfigError naming the most frequent reason, with one of the `examples`.
    """
    seen = totals.images + totals.bad
    too_few = seen < MIN_SAMPLES_TO_JUDGE and not final
    if not totals.bad or too_few or totals.bad <= limit * seen:
        return
    reason, count = max(totals.reasons.items(), key=lambda item: item[1])
    example = Tally(Counter(totals.reasons), examples()).example()
    raise ConfigError(
        f"{totals.bad:,} of {seen:,} samples are bad (mostly {reason}: {count:,}), more than the "
        f"allowed share {limit}; {example and f'{example}; '}see the .errors.parquet files of the "
        "embedding store, or raise --ray.max-bad-share"
    )


def check_failed_share(failed: Mapping[str, str], shards: int, limit: float) -> None:
    """Stop a run that cannot read its source. Raises ConfigError; `failed`: shard -> why."""
    if len(failed) <= limit * shards:
        return
    name, problem = next(iter(failed.items()))
    raise ConfigError(
        f"{len(failed):,} of {shards:,} shards cannot be read ({name}: {advised(problem)}), more "
        f"than the allowed share {limit}; mend them and repeat the command, which reads them "
        "again, or raise --ray.max-failed-share"
    )

"""Embedding on Ray Data: read, decode and resize (CPU) -> encode (actor pool) -> commit.

There is one commit per shard. A shard whose rows arrive in one block is committed by the actor that
embedded it; a larger one is put together from its parts by a small task. Commits are what a restart
trusts: a shard without a marker is read again.

Bad samples become error rows; they never raise. A process that dies loses a block; its shard is
embedded again in isolation, where the sample that kills is found and refused. A shard that cannot
be read then either is set aside as failed. So is one whose file is damaged or no tar at all, with
the samples before the damage: it is read again once its file has changed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import ray

from pds_ray import catalog
from pds_ray.config import ConfigError, EmbedConfig, RunConfig
from pds_ray.distributed import isolated, limits, metrics, pools, process, tasks
from pds_ray.distributed.embed_account import (
    Account,
    Outcome,
    check_bad_share,
    check_failed_share,
    examples_of,
)
from pds_ray.distributed.embed_executions import Report, Work, reports
from pds_ray.distributed.embed_workers import (
    FATAL,
    STORE,
    ShardFile,
    commit_info,
    commit_parts,
)
from pds_ray.distributed.in_flight import InFlight
from pds_ray.errors import UserError, first_line
from pds_ray.methods.base import Counts, Run
from pds_ray.sources.advice import Tally
from pds_ray.sources.base import SourceError
from pds_ray.stages import embed as core
from pds_ray.stages.embed import ShardCounts
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.telemetry import log
from pds_ray.telemetry.progress import QUIET_S, progress_bar

_Embedded = tuple[ShardCounts, str]
"""Counts of a shard, and how its file is damaged, "" if it is whole."""
# A process may grow by so much while it decodes one image: half of what is free, within these.
LEAST_GROWTH_BYTES, MOST_GROWTH_BYTES = 512 << 20, 4 << 30
FAILED_SHOWN = 20  # failed shards that run.json names, with the reason


class EmbedError(UserError, OSError):
    """A disk or a store that fails, whatever the data."""


@dataclass
class _Progress:
    """The blocks of a shard that arrived in this session."""

    file: ShardFile
    rows: dict[int, int] = field(default_factory=dict)
    """Ordinal of a part's first row -> its rows."""
    total: int | None = None
    counts: ShardCounts = field(default_factory=ShardCounts)
    closed: bool = False
    """All its rows have arrived."""
    ended: bool = False
    """Committed, or set aside: nobody waits for it any more."""
    problem: str = ""
    """Why it cannot be read."""
    damage: str = ""
    """Reason and detail if its file is damaged."""

    def add(self, row: dict[str, Any]) -> None:
        """Add a summary row of an EmbedWorker."""
        if row["fault"] is not None:
            self.problem = row["problem"]
            return
        self.rows[row["first"]] = row["rows"]
        self.total = row["total"] if self.total is None else self.total
        self.counts += _row_counts(row)
        self.damage = self.damage or row["problem"] or ""
        self.closed = sum(self.rows.values()) == self.total


def _row_counts(row: dict[str, Any]) -> ShardCounts:
    return ShardCounts(**json.loads(row["counts"])) if row["counts"] else ShardCounts()


def embed(run: Run) -> Counts:
    """Embed the shards that are not committed yet; return the counts of all that are then.

    Raises ConfigError when more than `ray.max_bad_share` of the samples or `ray.max_failed_share`
    of the shards is lost, fewer images are good than pairs are asked for, or the store was begun in
    another precision; EmbedError if the store cannot be written.
    """
    with run.store.folder.lock():  # a shared store is filled by one run at a time
        counts = fill_store(run)
    if counts["images"] < run.config.pairs:
        bad = Tally(Counter(counts["reasons"]), counts["examples"]).line()
        raise ConfigError(
            f"{run.config.pairs:,} pairs asked for, but only {counts['images']:,} images of "
            f"{run.config.source} are good ({bad or 'none is bad'}); lower --pairs"
        )
    return counts


def fill_store(run: Run) -> Counts:
    """Do what `embed` does in a store that is locked, however few images are good."""
    config, store = run.config, run.store
    shards = [run.changed.get(shard.name, shard) for shard in run.shards]
    store.folder.sweep()
    with progress_bar("list", None, "shards", delay_s=QUIET_S) as bar:
        done, again = store.committed(bar.update), store.failed()
    todo = [
        shard
        for shard in shards
        if shard.name in again or core.needs_reading(shard, done.get(shard.name, {}))
    ]
    markers = {shard.name: done[shard.name] for shard in shards if shard.name in done}
    before = {shard.name: markers.pop(shard.name) for shard in todo if shard.name in markers}
    damaged = {name: text for name in markers if (text := core.marker_damage(markers[name]))}
    reused = core.sum_counts(markers.values())
    outcome, encoders = Outcome(reused, damaged), metrics.ActorTime("embed")
    if todo:
        embed_config = _resolve_precision(config, done, store)
        store.parts.delete_all()
        files = [ShardFile(shard, shard.name in run.changed) for shard in todo]
        work = Work(run.source, run.encoder, config.read, embed_config, config.ray, store)
        outcome = _embed(files, work, outcome, before, len(shards), encoders)
        store.parts.delete_all()
        store.folder.sweep()  # actors that were killed may have left parts of files
    totals, problems = outcome.totals, outcome.problems
    examples = examples_of(store, [shard.name for shard in shards], totals)
    check_bad_share(totals, config.ray.max_bad_share, True, lambda: examples)
    check_failed_share(problems, len(shards), config.ray.max_failed_share)
    return {
        **asdict(totals),
        "examples": examples,
        "shards": len(shards),
        "shards_embedded": len(shards) - len(outcome.failed),
        "failed_shards": len(problems),
        "failed": {name: problems[name] for name in sorted(problems)[:FAILED_SHOWN]},
        "shards_reused": len(shards) - len(todo),
        "images_reused": reused.images,
        "timed": totals.images - reused.images,
        **encoders.counts("encoder"),
    }


def _resolve_precision(
    config: RunConfig, done: dict[str, dict[str, Any]], store: EmbeddingStore
) -> EmbedConfig:
    """Return the options with the precision that `auto` stands for here.

    Raises ConfigError if shards were embedded in another one; `done` are their markers.
    """
    actors = pools.pool(config.ray.embed_actors)
    precision = pools.precision(config.embed.precision, actors, "bf16")
    begun = {marker["precision"] for marker in done.values()} - {precision}
    if begun:
        raise ConfigError(
            f"the embeddings in {store.folder.shown} were begun in {begun.pop()}, here they would "
            f"go on in {precision}; say --embed.precision, and give another --out or --redo"
        )
    return replace(config.embed, precision=precision)


def _embed(
    todo: list[ShardFile],
    work: Work,
    outcome: Outcome,
    before: dict[str, dict[str, Any]],
    shards: int,
    encoders: metrics.ActorTime,
) -> Outcome:
    """Embed some of `shards` shards; return the outcome of all.

    `outcome` is that of the other shards; `before` are the markers of shards that are tried again,
    which stand if that fails.
    """
    reused = outcome.totals
    arrived = {file.shard.name: _Progress(file) for file in todo}
    with (
        InFlight() as in_flight,
        progress_bar("embed", None, "images", reused.images) as bar,
    ):
        bar.follow(in_flight.reports(partial(_has_arrived, arrived)))
        account = Account(shards, shards - len(todo), outcome, work.ray, bar, work.store)
        account.show()
        coming = reports(todo, work, in_flight, partial(_begun_again, arrived, reused, outcome))
        with closing(coming):
            _follow(coming, arrived, _Commits(work, in_flight), account, encoders)
        lost = [shard.file for shard in arrived.values() if not shard.closed]
        if lost:
            closed = (shard.counts for shard in arrived.values() if shard.closed)
            outcome.totals = sum(closed, reused)
            outcome.failed.clear()
            account.show(f", {len(lost)} shards once more")
            _retry(lost, work, before, arrived, in_flight, account)
    for name in outcome.failed.keys() & before.keys():
        del outcome.failed[name]
    return outcome


def _has_arrived(arrived: Mapping[str, _Progress], item: str) -> bool:
    """Return whether the driver has counted a block, or the shard that an item is."""
    name, _, first = item.partition("/")
    shard = arrived[name]
    return shard.ended or (first != "" and int(first) in shard.rows)


def _begun_again(
    arrived: dict[str, _Progress],
    reused: ShardCounts,
    outcome: Outcome,
    files: list[ShardFile],
) -> list[ShardFile]:
    """Forget those of the shards of which not all rows have arrived; return them."""
    left = [file for file in files if not arrived[file.shard.name].closed]
    for file in left:
        arrived[file.shard.name] = _Progress(file)
        outcome.failed.pop(file.shard.name, None)
    outcome.totals = sum((shard.counts for shard in arrived.values()), reused)
    return left


def _follow(
    coming: Iterator[Report],
    arrived: dict[str, _Progress],
    commits: _Commits,
    account: Account,
    encoders: metrics.ActorTime,
) -> None:
    """Record what is reported in `arrived` and `encoders`, commit and count it."""
    for rows, lost in coming:
        for row in rows:
            _raise_fault(row)
            encoders.add(row)
            name, committed = row["shard"], bool(row["committed"])
            shard = arrived[name]
            shard.add(row)
            if shard.closed and not committed:
                commits.start(shard)
            _count(name, _row_counts(row), committed, shard, account)
        for name in commits.ended():
            _count(name, ShardCounts(), True, arrived[name], account)
        if lost:
            counts = ", ".join(f"{count} by {kind}" for kind, count in lost.items())
            text = f"pds-ray: blocks were lost, {counts}; their shards are read again"
            log.event("blocks_lost", text, "warning", kinds=lost)
    for name in commits.all():
        _count(name, ShardCounts(), True, arrived[name], account)


def _count(
    name: str, counts: ShardCounts, committed: bool, shard: _Progress, account: Account
) -> None:
    """Count a block of the shard `name` that has arrived."""
    account.outcome.totals += counts
    if committed:
        shard.ended = True
        account.commit(name, shard.counts, shard.damage)
    if shard.problem:
        account.outcome.failed[name] = shard.problem
    account.check()
    account.show()


def _retry(
    lost: list[ShardFile],
    work: Work,
    before: dict[str, dict[str, Any]],
    arrived: dict[str, _Progress],
    in_flight: InFlight,
    account: Account,
) -> None:
    """Embed lost shards again and count them, or set them aside."""
    for name, outcome in retry_lost_shards(lost, work, in_flight):
        if isinstance(outcome, str):
            work.store.fail(name, outcome)
            account.fail(name, outcome)
            if name in before:  # what was embedded of it stands
                account.stand(name, before[name])
        else:
            counts, damage = outcome
            account.outcome.totals += counts
            account.commit(name, counts, damage)
        arrived[name].ended = True
        account.show()


def _raise_fault(row: dict[str, Any]) -> None:
    """Raise what ends the run: EmbedError if a store fails, RuntimeError for a bug."""
    if row["fault"] == STORE:
        raise EmbedError(row["problem"])
    if row["fault"] == FATAL:
        raise RuntimeError(row["problem"])


class _Commits:
    """The tasks that commit shards of several parts. A commit that fails raises where it is met."""

    def __init__(self, work: Work, in_flight: InFlight) -> None:
        self._work = work
        self._in_flight = in_flight
        self._task = ray.remote(commit_parts).options(num_cpus=pools.DECODE_CPUS)
        self._shards: dict[ray.ObjectRef, str] = {}

    def start(self, shard: _Progress) -> None:
        """Start to commit a shard whose parts have arrived."""
        name, note, work = shard.file.shard.name, shard.file.note(), self._work
        reference = self._task.remote(
            name, sorted(shard.rows), work.store, note, work.config, self._in_flight
        )
        self._shards[reference] = name

    def ended(self) -> list[str]:
        """Return the shards committed since the last call; does not wait."""
        if not self._shards:
            return []
        ended, _ = ray.wait(list(self._shards), num_returns=len(self._shards), timeout=0)
        ray.get(ended)
        return [self._shards.pop(reference) for reference in ended]

    def all(self) -> Iterator[str]:
        """Yield the other shards as their commits end."""
        for reference, shard in self._shards.items():
            ray.get(reference)
            yield shard


def retry_lost_shards(
    files: list[ShardFile], work: Work, in_flight: InFlight
) -> Iterator[tuple[str, _Embedded | str]]:
    """Re-embed lost shards in isolated subprocesses; yield each, or why it failed."""
    actors = pools.pool(work.ray.embed_actors)
    remote = ray.remote(_embed_in_subprocess).options(**actors.options(), max_retries=0)
    pending = {remote.remote(file, work, in_flight): (file, tasks.RetryBudget()) for file in files}
    while pending:
        (ready,), _ = ray.wait(list(pending))
        file, budget = pending.pop(ready)
        try:
            yield file.shard.name, ray.get(ready)
        except tasks.LOST as error:
            if budget.spend(error):
                pending[remote.remote(file, work, in_flight)] = file, budget
                continue
            last = type(error).__name__
            yield file.shard.name, f"whatever embeds it is lost ({budget}, the last by {last})"


def _embed_in_subprocess(file: ShardFile, work: Work, in_flight: InFlight) -> _Embedded | str:
    """Embed and commit a shard in a child process, or return why it cannot be read."""
    shard = file.shard
    load = partial(process.load_model, catalog.load_encoder, work.info, work.config.precision)
    growth = min(MOST_GROWTH_BYTES, limits.free_memory_bytes() // 2)
    allowed = isolated.Limits(work.ray.sample_timeout_s, max(LEAST_GROWTH_BYTES, growth))
    alone = isolated.Work(work.source, shard, work.info, load, work.read, work.config)
    with in_flight.doing(f"a process for shard {shard.name} to start", shard.name) as doing:

        def tell(step: str, images: float) -> None:
            doing.now(f"shard {shard.name}, alone in its process ({step})")
            doing.reach(images)

        try:
            tables = isolated.embed_isolated(alone, allowed, tell)
        except SourceError as error:
            return first_line(error)
        work.store.commit(shard.name, *tables, commit_info(*tables, file.note(), work.config))
    return core.shard_counts(*tables), core.damage(tables[-1])

"""Embedding on Ray Data: read (CPU) -> decode and resize (CPU) -> encode (actor pool) -> one commit a shard.

A shard whose rows arrive in one block is committed by the actor that embedded it; a larger one is put together from its
parts by a small task. Commits are what a restart trusts: a shard without a marker is read again.

What is wrong with data travels as rows. A process that dies loses a block; its shard is embedded anew in isolation,
where the sample that kills is found out and refused. A shard that cannot be read then either is set aside as failed.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from pds_ray import catalog
from pds_ray.config import ConfigError, EmbedConfig, RayConfig, ReadConfig
from pds_ray.distributed import TASK_RETRIES, metrics, pools, process, tasks, watch
from pds_ray.distributed.isolated import Limits, embed_isolated
from pds_ray.encoders.base import EncoderInfo
from pds_ray.errors import UserError, first_line
from pds_ray.methods.base import Counts, Run
from pds_ray.sources.base import Shard, Source, SourceError
from pds_ray.stages import embed as core
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.storage import side_by_side
from pds_ray.telemetry import log
from pds_ray.telemetry.progress import QUIET_S, progress_bar, waiting_for

MIN_SAMPLES_TO_JUDGE = 100
MAX_GROWTH_BYTES = 4 << 30  # by which a process may grow while it decodes one picture
SHARDS_TOGETHER = (
    2_000  # in one data set: of each block the driver keeps a kilobyte until its data set ends
)
FAILED_SHOWN = 20  # shards that could not be read, of which run.json says why
TABLES = ("images", "captions", "errors")
UNREADABLE = "unreadable"  # reason of the row that ends a shard of which no more can be read
FATAL, STORE = (
    "fatal",
    "store",
)  # reasons of rows that end the run: our fault, or that of a disk or a store


class ShardDatasource(Datasource):
    """One read task a shard: a fault can cost one shard's remainder, never its neighbours."""

    def __init__(self, source: Source, shards: list[Shard], under_way: watch.UnderWay) -> None:
        super().__init__()
        self._source = source
        self._shards = shards
        self._under_way = under_way

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, *_: Any, **__: Any) -> list[ReadTask]:
        """One a shard, whatever parallelism Ray asks for."""
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [
            ReadTask(_Reader(self._source, shard, self._under_way), unknown)
            for shard in self._shards
        ]


@dataclass
class _Reader:
    source: Source
    shard: Shard
    under_way: watch.UnderWay

    def __call__(self) -> Iterable[pa.Table]:
        """The shard's blocks.

        One that cannot be read costs itself, and a disk or a store that is down more shards than may be lost.
        """
        self.under_way.begin(self.shard.name)
        try:
            yield from core.read_blocks(self.source, self.shard)
        except SourceError as error:
            yield _problem(UNREADABLE, error, self.shard.name)
        except Exception as error:
            yield _problem(_fault(error), error)


def _problem(reason: str, error: Exception, shard: str = "") -> pa.Table:
    """A block that says why there is no other."""
    row = {"shard": shard, "ordinal": -1, "key": "", "reason": reason, "detail": _said(error)}
    return pa.Table.from_pylist([row], schema=core.RAW_SCHEMA)


def _fault(error: Exception) -> str:
    """Whose fault it is that something raises where data alone cannot make it."""
    return STORE if isinstance(error, UserError | OSError) else FATAL


def _said(error: Exception) -> str:
    line = first_line(error)
    return line if _fault(error) == STORE else f"{type(error).__name__}: {line}"


def _decode(block: pa.Table, info: EncoderInfo, read: ReadConfig, seconds: float) -> pa.Table:
    """`core.decode_block`; a picture that takes longer than `seconds` ends the process, even stuck in C code."""
    try:
        with process.time_limit(seconds) as begin:
            return core.decode_block(block, info.preprocess, read, lambda _: begin())
    except Exception as error:
        return _problem(_fault(error), error)


class EmbedWorker:
    """Loads the encoder once; embeds blocks and writes what they give.

    It is called by several threads: while one encodes, another writes.
    """

    THREADS = 2

    def __init__(self, info: EncoderInfo, config: EmbedConfig, store: EmbeddingStore) -> None:
        self.size = info.preprocess.size
        self.encoder = process.load_model(catalog.load_encoder, info, config.precision)
        self.config = config
        self.store = store
        self.encoding = threading.Lock()
        self.free_since = time.monotonic()

    def __call__(self, block: pa.Table) -> pa.Table:
        """A decoded block -> one summary row for each shard in it; what is no fault of the data travels as a row, too.

        (Ray Data, told to go on without lost blocks, would go on without those that raise.)
        """
        try:
            rows = [
                self._embed(shard, block)
                for shard in dict.fromkeys(block.column("shard").to_pylist())
            ]
        except Exception as error:
            rows = [{"shard": "", "fault": _fault(error), "problem": _said(error)}]
        return pa.Table.from_pylist(rows, schema=SUMMARY_SCHEMA)

    def _embed(self, shard: str, block: pa.Table) -> dict[str, Any]:
        mine = block.filter(pc.equal(block.column("shard"), shard))
        fault = mine.column("reason")[-1].as_py()
        if fault in (UNREADABLE, FATAL, STORE):
            return {"shard": shard, "fault": fault, "problem": mine.column("detail")[-1].as_py()}
        with self.encoding:
            began = time.monotonic()
            part = core.embed_block(mine, self.encoder, self.size, self.config)
            ended = time.monotonic()
            idle_s, self.free_since = began - self.free_since, ended
        counts = core.shard_counts(part.images, part.captions, part.errors)
        whole = part.first == 0 and part.total == part.rows
        if whole:
            self.store.commit(
                shard, part.images, part.captions, part.errors, commit_info(counts, self.config)
            )
        else:
            names = {
                self.store.part_name(shard, part.first, name): table
                for name, table in core.part_to_tables(part).items()
            }
            list(side_by_side(lambda name: self.store.parts.write_table(name, names[name]), names))
        return {
            "shard": shard,
            "first": part.first,
            "rows": part.rows,
            "total": part.total,
            "committed": whole,
            "counts": json.dumps(counts),
            "busy_s": ended - began,
            "idle_s": idle_s,
        }


SUMMARY_SCHEMA = pa.schema(
    [
        ("shard", pa.string()),  # "" if the problem is not the data's
        ("first", pa.int64()),
        ("rows", pa.int64()),
        ("total", pa.int64()),  # rows of the whole shard; null before its end
        ("committed", pa.bool_()),
        ("counts", pa.string()),  # JSON
        ("fault", pa.string()),  # UNREADABLE, FATAL or STORE; null if something came of it
        ("problem", pa.string()),  # why nothing did
        ("busy_s", pa.float64()),  # the encoder worked on it
        ("idle_s", pa.float64()),  # after it had waited: for input, or for its threads, which write
    ]
)


def commit_info(counts: dict[str, Any], config: EmbedConfig) -> dict[str, Any]:
    """What a marker says besides hashes."""
    return {**counts, "precision": config.precision}


def commit_parts(shard: str, firsts: list[int], store: EmbeddingStore, config: EmbedConfig) -> None:
    """Puts a shard together from its parts and commits it. The parts stay: Ray may run this twice."""
    parts = [
        core.part_from_tables(
            {
                table: store.parts.read_table(store.part_name(shard, first, table))
                for table in TABLES
            }
        )
        for first in firsts
    ]
    tables = core.merge_parts(parts)
    store.commit(shard, *tables, commit_info(core.shard_counts(*tables), config))


class EmbedError(UserError, OSError):
    """A disk or a store fails, whatever the data."""


@dataclass
class _Progress:
    """What has arrived of a shard in this sitting."""

    rows: dict[int, int] = field(default_factory=dict)
    total: int | None = None
    counts: dict[str, Any] = field(default_factory=core.no_counts)
    closed: bool = False
    ended: bool = False
    """Committed, or set aside: nobody waits for it any more."""
    problem: str = ""

    def add(self, row: dict[str, Any]) -> None:
        if row["fault"] is not None:
            self.problem = row["problem"]
            return
        self.rows[row["first"]] = row["rows"]
        self.total = row["total"] if self.total is None else self.total
        core.add_counts(self.counts, json.loads(row["counts"]))
        self.closed = sum(self.rows.values()) == self.total


@dataclass(frozen=True)
class _Work:
    """What every worker is told."""

    source: Source
    info: EncoderInfo
    read: ReadConfig
    config: EmbedConfig
    """With its precision resolved."""
    ray: RayConfig
    store: EmbeddingStore


def embed(run: Run) -> Counts:
    """Embed the shards that are not committed yet; return the counts of all that are then.

    Raises ConfigError when more than `ray.max_bad_share` of the samples or `ray.max_failed_share`
    of the shards is lost, fewer images are good than pairs are asked for, or the store was begun in
    another precision; EmbedError if the store cannot be written.
    """
    with run.store.folder.lock():  # a shared store is filled by one run at a time
        counts = fill_store(run)
    if counts["images"] < run.config.pairs:
        raise ConfigError(
            f"{run.config.pairs:,} pairs asked for, but only {counts['images']:,} images of "
            f"{run.config.source} are good ({counts['bad']:,} bad: {counts['reasons']}); lower "
            "--pairs"
        )
    return counts


def fill_store(run: Run) -> Counts:
    """Do what `embed` does in a store that is locked, however few images are good."""
    source, shards, info = run.source, run.shards, run.encoder
    config, store = run.config, run.store
    store.folder.sweep()
    with progress_bar("list", None, "shards", delay_s=QUIET_S) as bar:
        done, again = store.committed(bar.update), store.failed()
    todo = [shard for shard in shards if shard.name not in done or shard.name in again]
    names = {shard.name for shard in shards} - {shard.name for shard in todo}
    reused = core.sum_counts(done[name] for name in sorted(names))
    totals, failed, encoders = reused, dict[str, str](), metrics.ActorTime("embed")
    if todo:
        precision = pools.precision(
            config.embed.precision, pools.pool(config.ray.embed_actors), "bf16"
        )
        embed_config = replace(config.embed, precision=precision)
        begun = {marker["precision"] for marker in done.values()} - {embed_config.precision}
        if begun:
            raise ConfigError(
                f"the embeddings in {store.folder.shown} were begun in {begun.pop()}, here they would go on in "
                f"{embed_config.precision}; say --embed.precision, and give another --out or --redo"
            )
        store.parts.delete_all()
        work = _Work(source, info, config.read, embed_config, config.ray, store)
        before = {shard.name: done[shard.name] for shard in todo if shard.name in done}
        totals, failed = _embed(todo, work, reused, before, len(shards), encoders)
        store.parts.delete_all()
        store.folder.sweep()  # actors that were killed may have left parts of files
    check_bad_share(totals, config.ray.max_bad_share, final=True)
    check_failed_share(failed, totals, len(shards), config.ray.max_failed_share)
    return {
        **totals,
        "shards": len(shards),
        "failed_shards": len(failed),
        "failed": {name: failed[name] for name in sorted(failed)[:FAILED_SHOWN]},
        "shards_reused": len(shards) - len(todo),
        "images_reused": reused["images"],
        "timed": totals["images"] - reused["images"],
        **encoders.counts("encoder"),
    }


def _embed(
    todo: list[Shard],
    work: _Work,
    reused: dict[str, Any],
    before: dict[str, dict[str, Any]],
    shards: int,
    encoders: metrics.ActorTime,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Embeds some shards of `shards`; returns the counts of all, and of which shards there are none, and why.

    `before`: the markers of those that are tried again; they stand if it fails.
    """
    arrived = {shard.name: _Progress() for shard in todo}
    totals, limits = core.sum_counts([reused]), work.ray
    finished, problems = shards - len(todo), dict[str, str]()
    with (
        watch.UnderWay() as under_way,
        progress_bar("embed", None, "images", reused["images"]) as bar,
    ):
        waiting_for(
            lambda: under_way.describe({name for name, shard in arrived.items() if shard.ended})
        )

        def show(state: str = "") -> None:
            if finished:
                bar.total = max(totals["images"], round(totals["images"] * shards / finished))
            counts = f"{finished}/{shards} shards, {totals['pairs']:,} pairs, {totals['bad']:,} bad"
            bar.set_postfix_str(counts + state, refresh=bool(state) and sys.stderr.isatty())
            bar.update(totals["images"] - bar.n)

        show(", starting")
        groups = (
            todo[start : start + SHARDS_TOGETHER] for start in range(0, len(todo), SHARDS_TOGETHER)
        )
        streams = (_stream(group, work, arrived, under_way, encoders) for group in groups)
        for name, counts, committed in chain.from_iterable(streams):
            core.add_counts(totals, counts)
            if committed:
                finished += 1
                arrived[name].ended = True
                _tell_committed(name, arrived[name].counts)
            if arrived[name].problem:
                problems[name] = arrived[name].problem
            check_bad_share(totals, limits.max_bad_share, final=False)
            check_failed_share(problems, totals, shards, limits.max_failed_share)
            show()
        lost = [shard for shard in todo if not arrived[shard.name].closed]
        if lost:
            totals = core.sum_counts(
                [reused, *(shard.counts for shard in arrived.values() if shard.closed)]
            )
            show(f", {len(lost)} shards once more")
            problems.clear()
            for name, outcome in _again(lost, work, under_way):
                if isinstance(outcome, str):
                    problems[name] = outcome
                    work.store.fail(name, outcome)
                    metrics.count("pds_ray_shards_failed_total", 1)
                    text = f"pds-ray: shard {name} is set aside: {outcome}"
                    log.event("shard_failed", text, "warning", shard=name, reason=outcome)
                    check_failed_share(problems, totals, shards, limits.max_failed_share)
                    core.add_counts(totals, before.get(name, core.no_counts()))
                else:
                    finished += 1
                    core.add_counts(totals, outcome)
                    _tell_committed(name, outcome)
                arrived[name].ended = True
                show()
    return totals, {name: problem for name, problem in problems.items() if name not in before}


def _tell_committed(shard: str, counts: dict[str, Any]) -> None:
    metrics.count("pds_ray_shards_committed_total", 1)
    metrics.count_embedded(counts)
    log.event("shard_committed", shard=shard, **counts)


def _stream(
    shards: list[Shard],
    work: _Work,
    arrived: dict[str, _Progress],
    under_way: watch.UnderWay,
    encoders: metrics.ActorTime,
) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Runs the data set; books in `arrived` and `encoders` what comes.

    Yields shard and counts of each block, and whether the shard is committed; if not, once more when it is.
    """
    with watch.lost_blocks_allowed():
        decoded = ray.data.read_datasource(
            ShardDatasource(work.source, shards, under_way),
            override_num_blocks=len(shards),
            num_cpus=pools.READ_CPUS,
            resources=work.ray.reader_resources,
            ray_remote_args={"max_retries": TASK_RETRIES},
        ).map_batches(
            _decode,
            fn_args=(work.info, work.read, work.ray.sample_timeout_s),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=pools.DECODE_CPUS,
            resources=work.ray.reader_resources,
            max_retries=TASK_RETRIES,
        )
        actors = pools.pool(work.ray.embed_actors)
        arguments = (work.info, work.config, work.store)
        embedded = pools.map_blocks(decoded, EmbedWorker, arguments, actors, EmbedWorker.THREADS)
    commits: dict[ray.ObjectRef, str] = {}
    commit = ray.remote(commit_parts).options(num_cpus=pools.DECODE_CPUS)
    with watch.LostBlocks() as lost:
        for batch in embedded.iter_batches(batch_size=None, batch_format="pyarrow"):
            lost.check_space()
            for row in pa.table(batch).to_pylist():
                encoders.add(row)
                if row["fault"] == STORE:
                    raise EmbedError(row["problem"])
                if row["fault"] == FATAL:
                    raise RuntimeError(row["problem"])
                shard = arrived[row["shard"]]
                shard.add(row)
                if shard.closed and not row["committed"]:
                    commits[
                        commit.remote(row["shard"], sorted(shard.rows), work.store, work.config)
                    ] = row["shard"]
                counts = json.loads(row["counts"]) if row["counts"] else core.no_counts()
                yield row["shard"], counts, bool(row["committed"])
            ended = (
                ray.wait(list(commits), num_returns=len(commits), timeout=0)[0] if commits else []
            )
            ray.get(ended)  # a commit that failed ends the run now, not after the last shard
            for reference in ended:
                yield commits.pop(reference), core.no_counts(), True
    lost.check_space()
    if lost.kinds:
        said = ", ".join(f"{count} by {kind}" for kind, count in lost.kinds.items())
        text = f"pds-ray: blocks were lost, {said}; their shards are read again"
        log.event("blocks_lost", text, "warning", kinds=lost.kinds)
    for reference, name in commits.items():
        ray.get(reference)
        yield name, core.no_counts(), True
    # the error of a lost block is in a reference cycle with the actors' handles: until it is collected they keep CPUs
    gc.collect()


def _again(
    shards: list[Shard], work: _Work, under_way: watch.UnderWay
) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Embeds shards that were lost, each in processes of its own; yields their counts, or why they cannot be read."""
    actors = pools.pool(work.ray.embed_actors)
    remote = ray.remote(_embed_alone).options(**actors.options(), max_retries=0)
    pending = {remote.remote(shard, work, under_way): (shard, tasks.Deaths()) for shard in shards}
    while pending:
        (ready,), _ = ray.wait(list(pending))
        shard, deaths = pending.pop(ready)
        try:
            yield shard.name, ray.get(ready)
        except tasks.LOST as error:
            if deaths.survived(error):
                pending[remote.remote(shard, work, under_way)] = shard, deaths
            else:
                yield (
                    shard.name,
                    f"whatever embeds it is lost ({deaths}, the last by {type(error).__name__})",
                )


def _embed_alone(shard: Shard, work: _Work, under_way: watch.UnderWay) -> dict[str, Any] | str:
    """Embeds and commits a shard in a child process; returns its counts, or why it cannot be read."""
    under_way.begin(shard.name)
    load = partial(process.load_model, catalog.load_encoder, work.info, work.config.precision)
    limits = Limits(
        work.ray.sample_timeout_s, min(MAX_GROWTH_BYTES, psutil.virtual_memory().available // 2)
    )
    try:
        tables = embed_isolated(work.source, shard, work.info, load, work.read, work.config, limits)
    except SourceError as error:
        return first_line(error)
    counts = core.shard_counts(*tables)
    work.store.commit(shard.name, *tables, commit_info(counts, work.config))
    return counts


def check_bad_share(totals: dict[str, Any], limit: float, final: bool) -> None:
    """Stops a run that would distil garbage. Raises ConfigError naming the most frequent reason."""
    seen = totals["images"] + totals["bad"]
    if (
        not totals["bad"]
        or (seen < MIN_SAMPLES_TO_JUDGE and not final)
        or totals["bad"] <= limit * seen
    ):
        return
    reason, count = max(totals["reasons"].items(), key=lambda item: item[1])
    raise ConfigError(
        f"{totals['bad']:,} of {seen:,} samples are bad (mostly {reason}: {count:,}), more than the allowed share "
        f"{limit}; see the .errors.parquet files of the embedding store, or raise --ray.max-bad-share"
    )


def check_failed_share(
    failed: dict[str, str], totals: dict[str, Any], shards: int, limit: float
) -> None:
    """Stops a run that cannot read its source.

    `failed`: shard -> why. Among `totals` are shards that were read and are no tars. Raises ConfigError.
    """
    no_tars = totals["reasons"].get("not_a_tar", 0)
    if len(failed) + no_tars > limit * shards:
        if failed:
            name, problem = next(iter(failed.items()))
            known, advice = f"{name}: {problem}", "the same command tries them again"
        else:
            known = f"not_a_tar: {no_tars:,}; see the .errors.parquet files of the embedding store"
            advice = "a source that was mended needs another --out or --redo"
        raise ConfigError(
            f"{len(failed) + no_tars:,} of {shards:,} shards cannot be read ({known}), more than the allowed share "
            f"{limit}; {advice}, or raise --ray.max-failed-share"
        )

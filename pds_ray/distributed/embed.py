"""Embedding on Ray Data: read (CPU) -> decode and resize (CPU) -> encode (actor pool) -> one commit a shard.

A shard whose rows arrive in one block is committed by the actor that embedded it; a larger one is put together from its
parts by a small task. Commits are what a restart trusts: a shard without a marker is read again.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import pyarrow as pa
import ray
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from pds_ray import catalog
from pds_ray.artifacts import EmbeddingStore
from pds_ray.config import ConfigError, EmbedConfig, RunConfig
from pds_ray.distributed import runtime
from pds_ray.encoders.base import EncoderInfo
from pds_ray.progress import progress_bar
from pds_ray.sources.base import Shard, Source, SourceError
from pds_ray.stages import embed as core

MIN_SAMPLES_TO_JUDGE = 100
READ_RETRY_WAITS_S = (1.0, 5.0, 25.0)
TABLES = ("images", "captions", "errors")


class ShardDatasource(Datasource):
    """One read task a shard: a fault can cost one shard's remainder, never its neighbours."""

    def __init__(self, source: Source, shards: list[Shard]) -> None:
        super().__init__()
        self._source = source
        self._shards = shards

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, *_: Any, **__: Any) -> list[ReadTask]:
        """One a shard, whatever parallelism Ray asks for."""
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(_Reader(self._source, shard), unknown) for shard in self._shards]


@dataclass
class _Reader:
    source: Source
    shard: Shard

    def __call__(self) -> Iterable[pa.Table]:
        """The shard's blocks; a disk that fails is read again, it says nothing about the data.

        Object stores are asked again where they are read (`storage.open_stream`), and have failed for good if that
        raises.
        """
        done = 0
        for wait_s in (*READ_RETRY_WAITS_S, None):
            try:
                for block in islice(core.read_blocks(self.source, self.shard), done, None):
                    yield block
                    done += 1
            except OSError as error:
                if wait_s is None or isinstance(error, SourceError):
                    raise SourceError(
                        f"cannot read {self.shard.location}: {error}; the same command continues"
                    ) from error
                time.sleep(wait_s)
            else:
                return


class EmbedWorker:
    """Loads the encoder once; embeds blocks and writes what they give."""

    def __init__(self, info: EncoderInfo, config: EmbedConfig, store: EmbeddingStore) -> None:
        import torch

        torch.set_num_threads(runtime.MODEL_THREADS)
        self.size = info.preprocess.size
        self.encoder = catalog.load_encoder(info, config.precision)
        self.config = config
        self.store = store

    def __call__(self, block: pa.Table) -> pa.Table:
        """A decoded block -> one summary row for each shard in it."""
        rows = []
        for shard in dict.fromkeys(block.column("shard").to_pylist()):
            mine = block.filter(pa.compute.equal(block.column("shard"), shard))
            part = core.embed_block(mine, self.encoder, self.size, self.config)
            counts = core.shard_counts(part.images, part.captions, part.errors)
            whole = part.first == 0 and part.total == part.rows
            if whole:
                self.store.commit(shard, part.images, part.captions, part.errors, commit_info(counts, self.config))
            else:
                for name, table in core.part_to_tables(part).items():
                    self.store.parts.write_table(part_name(shard, part.first, name), table)
            rows.append(
                {
                    "shard": shard,
                    "first": part.first,
                    "rows": part.rows,
                    "total": -1 if part.total is None else part.total,
                    "committed": whole,
                    "counts": json.dumps(counts),
                }
            )
        return pa.Table.from_pylist(rows)


def part_name(shard: str, first: int, table: str) -> str:
    """File name of one table of one part."""
    return f"{shard}.{first:09d}.{table}.parquet"


def commit_info(counts: dict[str, Any], config: EmbedConfig) -> dict[str, Any]:
    """What a marker says besides hashes."""
    return {**counts, "precision": config.precision}


def commit_parts(shard: str, firsts: list[int], store: EmbeddingStore, config: EmbedConfig) -> None:
    """Puts a shard together from its parts and commits it. The parts stay: Ray may run this twice."""
    parts = [
        core.part_from_tables({table: store.parts.read_table(part_name(shard, first, table)) for table in TABLES})
        for first in firsts
    ]
    tables = core.merge_parts(parts)
    store.commit(shard, *tables, commit_info(core.shard_counts(*tables), config))


@dataclass
class _Open:
    """What has arrived of a shard."""

    rows: dict[int, int] = field(default_factory=dict)
    total: int = -1

    def complete(self) -> bool:
        return self.total >= 0 and sum(self.rows.values()) == self.total


def embed(
    source: Source, shards: list[Shard], info: EncoderInfo, config: RunConfig, store: EmbeddingStore
) -> dict[str, Any]:
    """Embeds the shards that are not committed yet; returns the counts of all.

    Raises ConfigError when more than `ray.max_bad_share` of the samples is bad, or the store was begun in another
    precision.
    """
    done = store.committed()
    totals: dict[str, Any] = {"images": 0, "pairs": 0, "bad": 0, "reasons": {}}
    for shard in shards:
        if shard.name in done:
            core.add_counts(totals, done[shard.name])
    resumed = totals["images"]
    todo = [shard for shard in shards if shard.name not in done]
    if todo:
        embed_config = replace(config.embed, precision=runtime.precision(config.embed.precision, "bf16"))
        begun = {marker["precision"] for marker in done.values()} - {embed_config.precision}
        if begun:
            raise ConfigError(
                f"the embeddings in {store.folder.shown} were begun in {begun.pop()}, here they would go on in "
                f"{embed_config.precision}; say --embed.precision, and give another --out or --redo"
            )
        store.parts.delete_all()
        with progress_bar("embed", None, "images", resumed) as bar:
            finished = len(shards) - len(todo)
            bar.set_postfix_str(f"{finished}/{len(shards)} shards, starting", refresh=sys.stderr.isatty())
            for counts, closed in _stream(source, todo, info, config, embed_config, store):
                core.add_counts(totals, counts)
                finished += closed
                if finished:
                    bar.total = max(totals["images"], round(totals["images"] * len(shards) / finished))
                bar.set_postfix_str(
                    f"{finished}/{len(shards)} shards, {totals['pairs']:,} pairs, {totals['bad']:,} bad", refresh=False
                )
                bar.update(counts["images"])
                check_bad_share(totals, config.ray.max_bad_share, final=False)
        store.parts.delete_all()
    check_bad_share(totals, config.ray.max_bad_share, final=True)
    # images that the seconds booked for this stage were spent on: those of a shared store were another run's
    timed = totals["images"] - (resumed if config.embed.store else 0)
    return {
        **totals,
        "shards": len(shards),
        "shards_reused": len(shards) - len(todo),
        "images_reused": resumed,
        "timed": timed,
    }


def _stream(
    source: Source,
    shards: list[Shard],
    info: EncoderInfo,
    config: RunConfig,
    embed_config: EmbedConfig,
    store: EmbeddingStore,
) -> Iterable[tuple[dict[str, Any], bool]]:
    """Runs the data set; yields the counts of each block, and whether a shard ended with it."""
    actors = runtime.pool(config.ray.embed_workers)
    dataset = (
        ray.data.read_datasource(
            ShardDatasource(source, shards), override_num_blocks=len(shards), num_cpus=runtime.READ_CPUS
        )
        .map_batches(
            core.decode_block,
            fn_args=(info.preprocess, config.read),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=runtime.DECODE_CPUS,
        )
        .map_batches(
            EmbedWorker,
            fn_constructor_args=(info, embed_config, store),
            batch_size=None,
            batch_format="pyarrow",
            **runtime.actor_options(actors),
        )
    )
    arrived: dict[str, _Open] = defaultdict(_Open)
    commits: list[ray.ObjectRef] = []
    commit = ray.remote(commit_parts).options(num_cpus=runtime.DECODE_CPUS)
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in batch.to_pylist():
            closed = row["committed"]
            if not closed:
                shard = arrived[row["shard"]]
                shard.rows[row["first"]] = row["rows"]
                shard.total = max(shard.total, row["total"])
                closed = shard.complete()
                if closed:
                    commits.append(commit.remote(row["shard"], sorted(shard.rows), store, embed_config))
                    del arrived[row["shard"]]
            yield json.loads(row["counts"]), closed
        ended, commits = ray.wait(commits, num_returns=len(commits), timeout=0) if commits else ([], [])
        ray.get(ended)  # a commit that failed ends the run now, not after the last shard
    ray.get(commits)
    if arrived:
        raise RuntimeError(f"{len(arrived)} shards never ended, first {next(iter(arrived))}")


def check_bad_share(totals: dict[str, Any], limit: float, final: bool) -> None:
    """Stops a run that would distil garbage. Raises ConfigError naming the most frequent reason."""
    seen = totals["images"] + totals["bad"]
    if not totals["bad"] or (seen < MIN_SAMPLES_TO_JUDGE and not final) or totals["bad"] <= limit * seen:
        return
    reason, count = max(totals["reasons"].items(), key=lambda item: item[1])
    raise ConfigError(
        f"{totals['bad']:,} of {seen:,} samples are bad (mostly {reason}: {count:,}), more than the allowed share "
        f"{limit}; see the .errors.parquet files of the embedding store, or raise --ray.max-bad-share"
    )

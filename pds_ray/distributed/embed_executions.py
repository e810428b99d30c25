"""Data sets that embed shards, one or several side by side, each scheduled by one process.

A process schedules some hundred of Ray Data's tasks per second, whatever the cluster. Where that is
enough, it is the driver. Elsewhere each data set is run by a task of its own, an execution, on a
share of the cluster. It sends summary rows to the driver, which alone counts, commits and tries
again. An execution is given its shards group by group, so that all end at about the same time.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import pyarrow as pa
import ray

from pds_ray.config import EmbedConfig, RayConfig, ReadConfig
from pds_ray.distributed import TASK_RETRIES, pools, ray_private, session, sizes, tasks, watch
from pds_ray.distributed.embed_workers import (
    Decoder,
    EmbedWorker,
    ShardDatasource,
    ShardFile,
    decode,
)
from pds_ray.distributed.in_flight import InFlight
from pds_ray.encoders.base import EncoderInfo
from pds_ray.sources.base import Source
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.telemetry import log

REPORT_S = 0.5  # between two reports of an execution

Rows = list[dict[str, Any]]
"""Summary rows of `EmbedWorker`."""
Report = tuple[Rows, dict[str, int]]
"""Rows that are new, and blocks that were lost since, by kind."""


@dataclass(frozen=True)
class Work:
    """Settings for every worker."""

    source: Source
    info: EncoderInfo
    read: ReadConfig
    config: EmbedConfig
    """With its precision resolved."""
    ray: RayConfig
    store: EmbeddingStore


@dataclass(frozen=True)
class Layout:
    """The making of a data set."""

    actors: pools.Pool
    whole_shards: bool
    """A task reads and decodes a shard; otherwise blocks of it are decoded side by side."""
    block_bytes: int


@dataclass
class _Group:
    """Shards that an execution was given."""

    files: list[ShardFile]
    slot: int
    """Number of the execution."""
    budget: tasks.RetryBudget = field(default_factory=tasks.RetryBudget)


def reports(
    files: list[ShardFile],
    work: Work,
    in_flight: InFlight,
    again: Callable[[list[ShardFile]], list[ShardFile]],
) -> Generator[Report, None, None]:
    """Embed shards; yield what is reported of them. Raises what a data set raises.

    A process of an execution that is lost is replaced, as often as `RetryBudget` allows: `again`
    returns those of its shards that are not done, and forgets what was reported of them.
    """
    actors = pools.pool(work.ray.embed_actors)
    on_gpu = actors.num_gpus > 0
    cpus = ray.cluster_resources().get("CPU", 1.0)
    whole = sizes.decoded_where_read(len(files), cpus)
    count = sizes.executions(work.ray.executions, cpus, actors.workers, len(files))
    shares = pools.parts(actors, count) if count > 1 else [actors]
    layouts = [Layout(share, whole, sizes.pixel_block_bytes(whole, on_gpu)) for share in shares]
    size = math.ceil(len(files) / (count * sizes.groups_each(len(files), count)))
    groups = [files[start : start + size] for start in range(0, len(files), size)]
    if count == 1:
        for group in groups:
            yield from _embedded(group, work, layouts[0], in_flight)
    else:
        yield from _side_by_side(groups, work, layouts, in_flight, again)


def _side_by_side(
    groups: list[list[ShardFile]],
    work: Work,
    layouts: list[Layout],
    in_flight: InFlight,
    again: Callable[[list[ShardFile]], list[ShardFile]],
) -> Iterator[Report]:
    """Run an execution per layout, each on the next group that is left."""
    remote = ray.remote(num_cpus=0, num_returns="streaming", max_retries=0)(_execution)
    running: dict[Any, _Group] = {}  # by the generators of their reports

    def start(group: _Group) -> None:
        place = remote.options(scheduling_strategy=pools.place(group.slot))
        layout, share = layouts[group.slot], 1 / len(layouts)
        running[place.remote(group.files, work, layout, in_flight, share)] = group

    waiting = iter(groups)
    try:
        for slot, files in zip(range(len(layouts)), waiting):  # noqa: B905
            start(_Group(files, slot))
        while running:
            (ready,), _ = cast(Any, ray.wait(list(running), num_returns=1))
            group = running[ready]
            try:
                yield cast(Report, ray.get(next(ready)))
                running[ready] = running.pop(ready)  # behind the others, which have their turn
                continue
            except StopIteration:
                group.files = []
            except tasks.LOST as error:
                if not group.budget.spend(error):
                    raise
                group.files = again(group.files)
                _warn_of_loss(error, len(group.files))
            del running[ready]
            if group.files:
                start(group)
            elif more := next(waiting, None):
                start(_Group(more, group.slot))
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _warn_of_loss(error: BaseException, shards: int) -> None:
    cause = type(error).__name__
    text = f"pds-ray: an execution was lost ({cause}); {shards} of its shards are read again"
    log.event("execution_lost", text, "warning", cause=cause, shards=shards)


def _execution(
    files: list[ShardFile], work: Work, layout: Layout, in_flight: InFlight, share: float
) -> Iterator[Report]:
    """Embed shards on a share of the cluster; yield a report now and then.

    It sends what has come whenever something comes and the last report is REPORT_S old.
    """
    rows: Rows = []
    told = time.monotonic()
    with ray_private.share_of_cluster(share), session.data_options():
        for more, lost in _embedded(files, work, layout, in_flight):
            rows += more
            if lost or time.monotonic() - told >= REPORT_S:
                yield rows, lost
                rows, told = [], time.monotonic()
    yield rows, {}


def _embedded(
    files: list[ShardFile], work: Work, layout: Layout, in_flight: InFlight
) -> Iterator[Report]:
    """Run a data set in this process; yield what comes, at the end what was lost."""
    with watch.LostBlocks() as lost:
        summaries = dataset(files, work, layout, in_flight)
        for batch in summaries.iter_batches(batch_size=None, batch_format="pyarrow"):
            lost.check_space()
            yield pa.table(batch).to_pylist(), {}
    lost.check_space()
    if lost.kinds:
        yield [], dict(lost.kinds)
    # The error of a lost block is in a reference cycle with the actors' handles: until it is
    # collected they keep CPUs.
    gc.collect()


def dataset(
    files: list[ShardFile], work: Work, layout: Layout, in_flight: InFlight
) -> ray.data.Dataset:
    """Return the data set of the summary rows of shards, embedded when it is read."""
    decoder = Decoder(work.info, work.read, work.ray.sample_timeout_s, in_flight)
    with watch.lost_blocks_allowed() as options:
        options.target_max_block_size = layout.block_bytes
        blocks = ray.data.read_datasource(
            ShardDatasource(
                work.source, files, in_flight, decoder if layout.whole_shards else None
            ),
            override_num_blocks=len(files),
            num_cpus=pools.READ_CPUS,
            resources=work.ray.reader_resources,
            ray_remote_args={"max_retries": TASK_RETRIES},
        )
        if not layout.whole_shards:
            blocks = blocks.map_batches(
                decode,
                fn_args=(decoder,),
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=pools.DECODE_CPUS,
                resources=work.ray.reader_resources,
                max_retries=TASK_RETRIES,
            )
        arguments = (work.info, work.config, work.store, in_flight)
        return pools.map_blocks(blocks, EmbedWorker, arguments, layout.actors, EmbedWorker.THREADS)

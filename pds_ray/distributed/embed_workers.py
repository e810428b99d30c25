"""The work of embedding on the nodes: read a shard, decode its blocks, embed and commit them.

Bad samples become error rows; they never raise. Neither do other errors: each travels as a row that
names whose fault it is, for the driver to raise.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from pds_ray import catalog
from pds_ray.config import EmbedConfig, ReadConfig
from pds_ray.distributed import process
from pds_ray.distributed.in_flight import InFlight
from pds_ray.encoders.base import EncoderInfo
from pds_ray.errors import UserError, first_line
from pds_ray.sources.base import Shard, Source, SourceError
from pds_ray.stages import embed as core
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.storage import side_by_side

TABLES = ("images", "captions", "errors")
UNREADABLE = "unreadable"  # reason of the row that ends a shard of which no more can be read
# Reasons of rows that end the run: a bug, or a disk or a store that fails.
FATAL, STORE = "fatal", "store"


class ShardDatasource(Datasource):
    """One read task per shard: a fault can cost one shard's remainder, never its neighbours."""

    def __init__(
        self,
        source: Source,
        files: list[ShardFile],
        in_flight: InFlight,
        decoder: Decoder | None = None,
    ) -> None:
        super().__init__()
        self._source = source
        self._files = files
        self._in_flight = in_flight
        self._decoder = decoder

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, *_: Any, **__: Any) -> list[ReadTask]:
        """Return one task per shard, whatever parallelism Ray asks for."""
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [
            ReadTask(ShardReader(self._source, file, self._in_flight, self._decoder), unknown)
            for file in self._files
        ]


@dataclass
class ShardReader:
    """A read task: all blocks of one shard, decoded if it has a decoder."""

    source: Source
    file: ShardFile
    in_flight: InFlight
    decoder: Decoder | None = None

    def __call__(self) -> Iterable[pa.Table]:
        """Yield the shard's blocks; an error is the last."""
        blocks = self._read()
        return blocks if self.decoder is None else map(self.decoder, blocks)

    def _read(self) -> Iterator[pa.Table]:
        """Yield the shard's blocks as they are read; an error is the last.

        A shard that cannot be read costs itself; a disk or a store that is down would cost more
        shards than may be lost, and ends the run.
        """
        shard = self.file.shard
        # with the data, not with the actor: what starts an actor again must be small
        blocks = core.read_blocks(self.source, shard, self.file.note())
        try:
            while True:
                # not while the block is handed over: then others are waited for
                with self.in_flight.doing(f"shard {shard.name} to be read"):
                    block = next(blocks, None)
                if block is None:
                    return
                yield block
        except SourceError as error:
            yield _problem(UNREADABLE, error, shard.name)
        except Exception as error:
            yield _problem(_classify(error), error)


def _problem(reason: str, error: Exception, shard: str = "") -> pa.Table:
    """Return a block that says why there is no other."""
    row = {"shard": shard, "ordinal": -1, "key": "", "reason": reason, "detail": _message(error)}
    return pa.Table.from_pylist([row], schema=core.RAW_SCHEMA)


def _classify(error: Exception) -> str:
    """Classify an exception that bad data cannot cause: storage failure or internal bug."""
    return STORE if isinstance(error, UserError | OSError) else FATAL


def _message(error: Exception) -> str:
    line = first_line(error)
    return line if _classify(error) == STORE else f"{type(error).__name__}: {line}"


@dataclass(frozen=True)
class Decoder:
    """The decoding of a block of one shard."""

    info: EncoderInfo
    read: ReadConfig
    seconds: float
    """An image that takes longer ends the process."""
    in_flight: InFlight

    def __call__(self, block: pa.Table) -> pa.Table:
        """Return `core.decode_block`."""
        doing = f"images of shard {block.column('shard')[0]} to be decoded"
        try:
            with self.in_flight.doing(doing), process.time_limit(self.seconds) as begin:
                return core.decode_block(block, self.info.preprocess, self.read, lambda _: begin())
        except Exception as error:
            return _problem(_classify(error), error)


def decode(block: pa.Table, decoder: Decoder) -> pa.Table:
    """Return `decoder(block)`; Ray Data takes functions."""
    return decoder(block)


class EmbedWorker:
    """Actor that loads the encoder once, embeds blocks and writes the results.

    It is called by several threads: while one encodes, another writes.
    """

    THREADS = 2

    def __init__(
        self,
        info: EncoderInfo,
        config: EmbedConfig,
        store: EmbeddingStore,
        in_flight: InFlight,
    ) -> None:
        self.size = info.preprocess.size
        with in_flight.doing("the encoder to load"):
            self.encoder = process.keeping_error(
                process.load_model, catalog.load_encoder, info, config.precision
            )
        self.config = config
        self.store = store
        self.in_flight = in_flight
        self.encoding = threading.Lock()
        self.free_since = time.monotonic()

    def __call__(self, block: pa.Table) -> pa.Table:
        """Embed a decoded block; return one summary row per shard in it.

        Errors travel as rows, too: Ray Data, which may go on without lost blocks, would go on
        without those that raise.
        """
        shards = list(dict.fromkeys(block.column("shard").to_pylist()))
        try:
            rows = [self._embed(shard, _rows_of(shard, shards, block)) for shard in shards]
        except Exception as error:
            rows = [{"shard": "", "fault": _classify(error), "problem": _message(error)}]
        return pa.Table.from_pylist(rows, schema=SUMMARY_SCHEMA)

    def _embed(self, shard: str, rows: pa.Table) -> dict[str, Any]:
        """Embed the rows of one shard, write them and return their summary row."""
        fault = rows.column("reason")[-1].as_py()
        if fault in (UNREADABLE, FATAL, STORE):
            return {"shard": shard, "fault": fault, "problem": rows.column("detail")[-1].as_py()}
        first = rows.column("ordinal")[0].as_py()
        with self.in_flight.doing(
            f"the encoder to be free for shard {shard}", block_name(shard, first)
        ) as doing:
            with self.encoding:
                doing.now(f"shard {shard} to be encoded")
                began = time.monotonic()
                part = core.embed_block(rows, self.encoder(), self.size, self.config, doing.reach)
                ended = time.monotonic()
                idle_s, self.free_since = began - self.free_since, ended
            doing.now(f"shard {shard} to be written")
            whole = part.first == 0 and part.total == part.rows
            tables = (part.images, part.captions, part.errors)
            if whole:
                info = commit_info(*tables, rows.column("detail")[-1].as_py(), self.config)
                self.store.commit(shard, *tables, info)
            else:
                self._write_part(shard, part)
        return {
            "shard": shard,
            "first": part.first,
            "rows": part.rows,
            "total": part.total,
            "committed": whole,
            "counts": json.dumps(asdict(core.shard_counts(*tables))),
            "problem": core.damage(part.errors) or None,
            "busy_s": ended - began,
            "idle_s": idle_s,
        }

    def _write_part(self, shard: str, part: core.Part) -> None:
        files = {
            self.store.part_name(shard, part.first, name): table
            for name, table in core.part_to_tables(part).items()
        }
        list(side_by_side(lambda name: self.store.parts.write_table(name, files[name]), files))


def block_name(shard: str, first: int) -> str:
    """Return the item under which a block is in flight; `first` is the ordinal of its first row."""
    return f"{shard}/{first}"


def _rows_of(shard: str, shards: list[str], block: pa.Table) -> pa.Table:
    """Return the rows of one of the `shards` in a block, without a copy if it is the only one."""
    return block if len(shards) == 1 else block.filter(pc.equal(block.column("shard"), shard))


SUMMARY_SCHEMA = pa.schema(
    [
        ("shard", pa.string()),  # "" if the problem is not the data's
        ("first", pa.int64()),
        ("rows", pa.int64()),
        ("total", pa.int64()),  # rows of the whole shard; null before its end
        ("committed", pa.bool_()),
        ("counts", pa.string()),  # ShardCounts as JSON
        ("fault", pa.string()),  # UNREADABLE, FATAL or STORE; null if the rows are embedded
        ("problem", pa.string()),  # why they are not, or how the shard's file is damaged
        ("busy_s", pa.float64()),  # the encoder worked on it
        ("idle_s", pa.float64()),  # and waited before: for input, or for its threads, which write
    ]
)


@dataclass(frozen=True)
class ShardFile:
    """The file of a shard as this session reads it."""

    shard: Shard
    changed: bool
    """It is not the one that the store began with."""

    def note(self) -> str:
        """Return what a marker may say of the file, as JSON."""
        return json.dumps({"file": core.file_of(self.shard), "changed": self.changed})


def commit_info(
    images: pa.Table, captions: pa.Table, errors: pa.Table, note: str, config: EmbedConfig
) -> dict[str, Any]:
    """Return what the marker of a shard says besides hashes; `note` is that of its ShardFile.

    The file is named where a later session must know which one was read: if it is damaged, or not
    the one that the store began with.
    """
    info = {**asdict(core.shard_counts(images, captions, errors)), "precision": config.precision}
    if damage := core.damage(errors):
        info["damage"] = damage
    file = json.loads(note)
    if damage or file["changed"]:
        info["file"] = file["file"]
    return info


def commit_parts(
    shard: str,
    firsts: list[int],
    store: EmbeddingStore,
    note: str,
    config: EmbedConfig,
    in_flight: InFlight,
) -> None:
    """Put a shard together from its parts and commit it. The parts stay: Ray may run this twice."""
    with in_flight.doing(f"shard {shard} to be put together"):
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
        store.commit(shard, *tables, commit_info(*tables, note, config))

"""Embedding a shard in a child process that may die: the sample that kills it becomes an error row.

This is the second try of shards whose workers died. The child reports which sample it is about to
touch; when it is gone, too slow or too big, that sample is refused and a new child goes on behind
it. The rows of all other samples are those of `stages.embed.embed_shard`; on a CPU to the byte. No
Ray here.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

import psutil
import pyarrow as pa

from pds_ray.config import EmbedConfig, ReadConfig
from pds_ray.encoders.base import Encoder, EncoderInfo
from pds_ray.errors import UserError
from pds_ray.sources.base import Shard, Source, SourceError
from pds_ray.stages import embed as core

POLL_S = 0.1
PR_SET_PDEATHSIG = 1  # an operation of prctl
MAX_REFUSED = 100  # samples of one shard that may kill their process, before the shard is given up
LOAD, READ, DECODE, ENCODE = "loading the encoder", "reading", "decoding", "encoding"
OTHER_STEPS_S = 3600.0  # longer than any of them takes, so that a child that hangs ends at all
Tell = Callable[[str, float], object]
DEATHS = 2  # processes that die on a sample before it is refused: one may have another cause


@dataclass(frozen=True)
class Limits:
    """Time and memory that decoding one sample may take."""

    seconds: float
    memory_bytes: int
    """Growth of its process meanwhile."""


@dataclass(frozen=True)
class Work:
    """The embedding of one shard. Pickles."""

    source: Source
    shard: Shard
    info: EncoderInfo
    load: Callable[[], Encoder]
    """Called in the child."""
    read: ReadConfig
    config: EmbedConfig


@dataclass
class _Known:
    """Results and findings of the children that worked on a shard so far."""

    blocks: dict[int, list[core.Part]] = field(default_factory=dict)
    """Embedded blocks, by the ordinal of their first row."""
    refused: dict[int, tuple[str, str]] = field(default_factory=dict)
    """Ordinal of a sample that kills its process -> reason and detail."""
    one_by_one: set[int] = field(default_factory=set)
    """First ordinals of blocks that killed their process while encoding: next time row by row."""
    deaths: Counter[tuple[str, int]] = field(default_factory=Counter)
    """(step, ordinal) -> number of processes that died there."""

    @property
    def images(self) -> int:
        """The images that are embedded."""
        return sum(part.images.num_rows for parts in self.blocks.values() for part in parts)


def embed_isolated(
    work: Work, limits: Limits, tell: Tell = lambda _step, _images: None
) -> tuple[pa.Table, pa.Table, pa.Table]:
    """Return the image, caption and error tables of a shard.

    `tell` is called with each step, and with the images that are embedded by then.

    Raises SourceError if the shard cannot be read or more than MAX_REFUSED of its samples kill
    their process, RuntimeError if loading the encoder kills it; other errors of the child are
    raised here.
    """
    known = _Known()
    while not _attempt(known, limits, work, tell):
        if len(known.refused) > MAX_REFUSED:
            raise SourceError(
                f"more than {MAX_REFUSED} samples of {work.shard.name} kill the process that "
                "decodes them"
            )
    return core.merge_parts(part for parts in known.blocks.values() for part in parts)


def _attempt(known: _Known, limits: Limits, work: Work, tell: Tell) -> bool:
    """Run one child, which adds to `known`; return whether it got through the shard."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    done = _Done(set(known.blocks), known.refused, known.one_by_one)
    child = context.Process(target=_child, args=(theirs, done, work), daemon=True)
    child.start()
    theirs.close()
    try:
        return _listen(child, ours, known, limits, work.shard, tell)
    finally:
        child.kill()
        child.join()
        ours.close()


@dataclass(frozen=True)
class _Done:
    """The part of `_Known` that a new child needs."""

    blocks: set[int]
    """First ordinals of the embedded blocks."""
    refused: dict[int, tuple[str, str]]
    one_by_one: set[int]


@dataclass
class _Step:
    """The step that a child last reported it is about to take."""

    doing: str
    at: int = 0
    """Ordinal of the first of its rows; while the child reads, of the block that it read before."""
    rows: int = 0
    memory: int = 0
    since: float = field(default_factory=time.monotonic)


def _listen(
    child: SpawnProcess,
    pipe: Connection,
    known: _Known,
    limits: Limits,
    shard: Shard,
    tell: Tell,
) -> bool:
    """Add what a child reports to `known`; return True at its end, False when it dies.

    Raises what the child raised.
    """
    step = _Step(LOAD)
    tell(step.doing, known.images)
    while True:
        message, fault = None, None
        try:
            if pipe.poll(POLL_S):
                message = pipe.recv()
            else:
                fault = _over_limit(child, step, limits)
        except (EOFError, OSError, psutil.NoSuchProcess):  # OSError: it died while it was sending
            child.join()
            fault = (
                "crashed_process",
                f"{step.doing} it ended the process (exit code {child.exitcode})",
            )
        if fault is not None:
            _learn(known, step, fault, shard)
            return False
        match message:
            case ("block", first, parts):
                known.blocks[first] = parts
            case ("end",):
                return True
            case ("error", error):
                raise error
            case ("encoded", images):
                tell(step.doing, known.images + images)
            case (doing, at, rows):
                step = _Step(doing, at, rows, _memory(child))
                tell(doing, known.images)


def _over_limit(child: SpawnProcess, step: _Step, limits: Limits) -> tuple[str, str] | None:
    """Return reason and detail if the step takes too long, or decoding too much memory."""
    seconds = limits.seconds if step.doing == DECODE else OTHER_STEPS_S
    if time.monotonic() - step.since > seconds:
        return "timed_out", f"{step.doing} it took more than {seconds:g} s"
    if step.doing == DECODE and _memory(child) - step.memory > limits.memory_bytes:
        return (
            "out_of_memory",
            f"{step.doing} it took more than {limits.memory_bytes / 2**30:g} GiB",
        )
    return None


def _learn(known: _Known, step: _Step, fault: tuple[str, str], shard: Shard) -> None:
    """Record the death of a child at a step; the next child avoids what caused it.

    Raises RuntimeError or SourceError if it died where no sample can be refused.
    """
    reason, detail = fault
    known.deaths[step.doing, step.at] += 1
    if (
        reason == "crashed_process"
        and step.rows <= 1
        and known.deaths[step.doing, step.at] < DEATHS
    ):
        return
    if step.doing == LOAD:
        raise RuntimeError(f"the process that loads the encoder dies: {detail}")
    if step.doing == READ:
        raise SourceError(
            f"{shard.name} ended the process that was reading it, behind row {step.at}"
        )
    if step.rows > 1:
        known.one_by_one.add(step.at)
    else:
        known.refused[step.at] = fault


def _memory(child: SpawnProcess) -> int:
    """Return the resident bytes of a child."""
    return psutil.Process(child.pid).memory_info().rss


def _child(pipe: Connection, done: _Done, work: Work) -> None:
    """Embed the blocks that are not done; send each, and every step before it is taken."""
    _die_with_parent()
    try:
        encoder = work.load()
        pipe.send((READ, 0, 0))
        for block in core.read_blocks(work.source, work.shard):
            first = block.column("ordinal")[0].as_py()
            if first in done.blocks:
                continue
            marked = _refuse(block, done.refused)
            parts = _embed_block(marked, encoder, pipe, work, first in done.one_by_one)
            pipe.send(("block", first, parts))
            pipe.send((READ, first, 0))
        pipe.send(("end",))
    except UserError as error:
        pipe.send(("error", error))
    except Exception as error:  # as text: it need not pickle
        pipe.send(
            ("error", RuntimeError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
        )


def _embed_block(
    block: pa.Table, encoder: Encoder, pipe: Connection, work: Work, one_by_one: bool
) -> list[core.Part]:
    """Decode and embed a block, as one part or row by row; send each step before it is taken."""
    preprocess = work.info.preprocess
    decoded = core.decode_block(
        block, preprocess, work.read, lambda ordinal: pipe.send((DECODE, ordinal, 1))
    )
    step = 1 if one_by_one else max(1, decoded.num_rows)
    parts = []
    for start in range(0, decoded.num_rows, step):
        rows = decoded.slice(start, step)
        pipe.send((ENCODE, rows.column("ordinal")[0].as_py(), rows.num_rows))
        parts.append(
            core.embed_block(
                rows,
                encoder,
                preprocess.size,
                work.config,
                lambda images: pipe.send(("encoded", images)),
            )
        )
    return parts


def _die_with_parent() -> None:
    """End this process with its parent, where Linux offers it: a child may hang."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _refuse(block: pa.Table, refused: dict[int, tuple[str, str]]) -> pa.Table:
    """Return the block with the refused samples as faults."""
    rows = block.to_pylist()
    for row in rows:
        if row["ordinal"] in refused and row["reason"] is None:
            reason, detail = refused[row["ordinal"]]
            row |= {"image": None, "captions": None, "reason": reason, "detail": detail}
    return pa.Table.from_pylist(rows, schema=core.RAW_SCHEMA)

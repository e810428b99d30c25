"""Run a part of a row in its own process: measure its seconds and the peak memory of its tree."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"  # real images and captions beside the checkout
GIB = 2**30
SAMPLE_EVERY_S = 1.0
SHARED_EVERY = 10  # samples: finding the memory that processes share halts each for a moment
LIMIT_S = 7200.0  # per part: more than twice what the longest should take
ANSWER = "answer.json"
PREPARE, AFTER = "prepare", "after"
BASELINE, OURS = "baseline", "ours"
QUIET = {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}


@dataclass(frozen=True)
class Task:
    """Input of a part of a row."""

    data: Path
    """Folder of the prepared data: the same for all sides."""
    out: Path
    """Folder of its own; for `after`, the folder that holds those of all sides, SIDE-REPEAT."""
    quick: bool
    """True for sizes that only show that it works."""


Found = dict[str, Any]
Part = Callable[[Task], Found]
Runs = Mapping[str, list[Found]]


@dataclass(frozen=True)
class Check:
    """A target and the figure that was measured."""

    wanted: str
    found: str
    reached: bool | None
    """None where there is no target."""


@dataclass(frozen=True)
class Row:
    """A row of the table. Each part runs in its own process, the sides in turn for every repeat."""

    number: int
    what: str
    against: str
    sides: Mapping[str, Part]
    """Name -> part; if it returns no "seconds", those of the whole process count."""
    checks: Callable[[Runs, Found], list[Check]]
    """Called with the findings of the sides and those of `after`."""
    prepare: Part
    after: Part | None = None
    """Inspects once, untimed, the files that the sides of the first repeat left."""
    notes: str = ""
    """States what the seconds include and exclude."""
    lacking: Callable[[], str] = str
    """Returns what this machine lacks for the row, "" if nothing; a row that lacks anything is not
    run."""


class PartError(RuntimeError):
    """A part of a row failed, with its own message, or took too long."""


def median(found: list[Found], name: str = "seconds") -> float:
    return statistics.median(one[name] for one in found)


def median_and_range(found: list[Found], name: str, digits: int) -> str:
    """Return "MEDIAN (MIN to MAX)"."""
    values = [one[name] for one in found]
    middle, low, high = (
        f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values))
    )
    return f"{middle} ({low} to {high})"


def factor(runs: Runs, slow: str = BASELINE, fast: str = OURS, name: str = "seconds") -> float:
    """Return the ratio of the medians of two sides."""
    return median(runs[slow], name) / median(runs[fast], name)


def at_least(runs: Runs, wanted: float, unit: str = "faster", name: str = "seconds") -> Check:
    """Check that ours takes `wanted` times less than the baseline."""
    found = factor(runs, name=name)
    return Check(f"{wanted:g}x {unit}", f"{found:.2f}x", found >= wanted)


def peak_rss(pid: int | str = "self") -> int:
    """Return the peak resident memory of a process in bytes. ru_maxrss begins with the parent's."""
    line = next(
        line
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("VmHWM:")
    )
    return int(line.split()[1]) * 1024


def tree_memory(pid: int, shared: dict[int, int]) -> tuple[int, int]:
    """Return the memory of a process tree, and of its largest Ray worker, in bytes.

    `shared`: pid -> bytes that it shares with others, as far as known; missing ones are added.

    Each process counts with its own peak so far, however short, less the memory that it shares now,
    which counts in equal parts. The sum is an upper bound of the tree's memory at any one time; it
    exceeds that where peaks fall at different times.
    """
    total = worker = 0
    with suppress(psutil.Error):
        top = psutil.Process(pid)
        for process in (top, *top.children(recursive=True)):
            # a process that has ended has no peak any more
            with suppress(psutil.Error, OSError, StopIteration):
                if process.pid not in shared:
                    now = process.memory_full_info()
                    shared[process.pid] = now.rss - now.pss
                mine = peak_rss(process.pid) - shared[process.pid]
                total += mine
                if process.name().startswith("ray::"):
                    worker = max(worker, mine)
    return total, worker


def run_part(row: int, part: str, task: Task, limit_s: float = LIMIT_S) -> Found:
    """Run a part; return its findings with its memory and the seconds of its whole process.

    `peak_gib` is the largest `tree_memory`, sampled every second: an upper bound for several
    processes, except for those that lived less than a second. For one process, as for most
    baselines, it is the exact peak, `driver_peak_gib`.

    Raises PartError if the part fails or takes longer than `limit_s`: then all of its process group
    is killed.
    """
    task.out.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "benchmarks.part",
        str(row),
        part,
        str(task.data),
        str(task.out),
    ]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    began = time.perf_counter()
    environment = {**QUIET, **os.environ, "PYTHONPATH": paths}
    process = subprocess.Popen(
        command + ["--quick"] * task.quick, cwd=ROOT, env=environment, start_new_session=True
    )
    peak = worker = 0
    shared: dict[int, int] = {}
    try:
        for sample in count():
            if process.poll() is not None:
                break
            if sample % SHARED_EVERY == 0:
                shared.clear()
            if time.perf_counter() - began > limit_s:
                raise PartError(f"{part} took more than {limit_s:g} s")
            with suppress(subprocess.TimeoutExpired):
                process.wait(SAMPLE_EVERY_S)
            now, worker_now = tree_memory(process.pid, shared)
            if now > peak or worker_now > worker:  # again, with the memory shared by now
                shared.clear()
                now, worker_now = tree_memory(process.pid, shared)
            peak, worker = max(peak, now), max(worker, worker_now)
    finally:
        if process.returncode is None:  # too late, or interrupted
            os.killpg(process.pid, signal.SIGKILL)  # Ray's processes die with their driver
            process.wait()
    wall = time.perf_counter() - began
    if process.returncode:
        raise PartError(f"{part} ended with {process.returncode}")
    found = json.loads((task.out / ANSWER).read_text())
    driver = found.pop("driver_peak_gib")
    memory = {
        "peak_gib": max(peak / GIB, driver),
        "driver_peak_gib": driver,
        "worker_peak_gib": worker / GIB,
    }
    return {"seconds": wall, **found, **memory, "process_seconds": wall}

"""A part of a row in a process of its own: its seconds, the peak memory of it and its children, and what it found."""

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
SHARED_DATA = ROOT.parent / "shared" / "data"  # real pictures and captions beside the checkout
GIB = 2**30
SAMPLE_EVERY_S = 1.0
SHARED_EVERY = 10  # samples: to find out what processes share stops each of them for a moment
LIMIT_S = 7200.0  # of a part: twice what the longest should take, and more
ANSWER = "answer.json"
PREPARE, AFTER = "prepare", "after"
BASELINE, OURS = "baseline", "ours"
QUIET = {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}


@dataclass(frozen=True)
class Task:
    """What a part of a row is told."""

    data: Path
    """What was prepared: the same for all sides."""
    out: Path
    """A folder of its own; for what comes after, the folder of those of all sides, SIDE-REPEAT."""
    quick: bool
    """A size that shows that it works, and nothing else."""


Found = dict[str, Any]
Part = Callable[[Task], Found]
Runs = Mapping[str, list[Found]]


@dataclass(frozen=True)
class Check:
    """Something to be reached."""

    wanted: str
    found: str
    reached: bool | None
    """None where nothing was asked."""


@dataclass(frozen=True)
class Row:
    """A row of the table. All parts run in processes of their own, the sides in turn, as often as asked."""

    number: int
    what: str
    against: str
    sides: Mapping[str, Part]
    """What each finds; without "seconds" of its own, those of the whole process count."""
    checks: Callable[[Runs, Found], list[Check]]
    """Given what the sides found, and what was found afterwards."""
    prepare: Part
    after: Part | None = None
    """Looks once, untimed, at what the sides of the first repeat left."""
    notes: str = ""
    """What the seconds hold and what they leave out."""
    lacking: Callable[[], str] = str
    """What is not here that the row needs, "" if nothing: then nothing runs, and this is what it tells."""


class PartError(RuntimeError):
    """A part of a row failed, and said itself why, or took too long."""


def median(found: list[Found], name: str = "seconds") -> float:
    return statistics.median(one[name] for one in found)


def median_and_range(found: list[Found], name: str, digits: int) -> str:
    """MEDIAN (MIN to MAX)."""
    values = [one[name] for one in found]
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def factor(runs: Runs, slow: str = BASELINE, fast: str = OURS, name: str = "seconds") -> float:
    """How many times less the one takes than the other, of medians."""
    return median(runs[slow], name) / median(runs[fast], name)


def at_least(runs: Runs, wanted: float, unit: str = "faster", name: str = "seconds") -> Check:
    """That ours takes `wanted` times less than the baseline."""
    found = factor(runs, name=name)
    return Check(f"{wanted:g}x {unit}", f"{found:.2f}x", found >= wanted)


def peak_rss(pid: int | str = "self") -> int:
    """The peak resident memory of a process in bytes. Not ru_maxrss: that begins with the parent's."""
    line = next(
        line
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("VmHWM:")
    )
    return int(line.split()[1]) * 1024


def tree_memory(pid: int, shared: dict[int, int]) -> tuple[int, int]:
    """Memory of a process and all below it, and of the largest Ray worker among them, in bytes.

    `shared`: pid -> what it shares with others, as far as that is known; what is not is found out and added.

    Each counts with its own peak so far, however short, less what it shares now, which is counted in equal parts: the
    sum is no less than what all of them ever had at one time, and more where their peaks fell at different times.
    """
    total = worker = 0
    with suppress(psutil.Error):
        top = psutil.Process(pid)
        for process in (top, *top.children(recursive=True)):
            with suppress(
                psutil.Error, OSError, StopIteration
            ):  # a process that ends has no peak any more
                if process.pid not in shared:
                    now = process.memory_full_info()
                    shared[process.pid] = now.rss - now.pss
                mine = peak_rss(process.pid) - shared[process.pid]
                total += mine
                if process.name().startswith("ray::"):
                    worker = max(worker, mine)
    return total, worker


def run_part(row: int, part: str, task: Task, limit_s: float = LIMIT_S) -> Found:
    """Runs a part; adds its memory, and the seconds of its whole process, to what it found.

    `peak_gib` is the largest `tree_memory`, asked for every second: an upper bound for several processes, but for those
    that lived less than a second. Of one process, as of most baselines, it is the exact peak, `driver_peak_gib`.

    Raises PartError if it fails, or ends after `limit_s`: then all of its process group is killed.
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
            if now > peak or worker_now > worker:  # with what is shared by now
                shared.clear()
                now, worker_now = tree_memory(process.pid, shared)
            peak, worker = max(peak, now), max(worker, worker_now)
    finally:
        if process.returncode is None:  # too late, or interrupted
            os.killpg(process.pid, signal.SIGKILL)  # what Ray started dies with its driver
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

"""Row 11: time until the first output and the first image."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks.measure import Check, Found, Row, Runs, Task, median

COMMAND = [sys.executable, "-m", "pds_ray.cli"]
HEAVY = ("torch", "ray", "numpy", "pyarrow")
POLL_S = 0.01
SCENES, PAIRS = 64, 16


def prepare(task: Task) -> Found:
    """Make the run for `show`."""
    _run(*_distill(task.data / "run"))
    return {}


def _distill(out: Path) -> list[str]:
    flags = [
        "--preset",
        "demo",
        "--source",
        f"scenes:{SCENES}",
        "--pairs",
        str(PAIRS),
        "--out",
        str(out),
    ]
    return [*COMMAND, "distill", *flags, "--only", "embed"]


def _run(*command: str) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


def show_help(_: Task) -> Found:
    traced = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pds_ray.cli", "--help"],
        check=True,
        capture_output=True,
        text=True,
    ).stderr
    imported = {line.rpartition("|")[2].strip() for line in traced.splitlines()}
    return {"seconds": _run(*COMMAND, "--help"), "heavy": sorted(imported & set(HEAVY))}


def show_run(task: Task) -> Found:
    return {"seconds": _run(*COMMAND, "show", str(task.data / "run"))}


def first_image(task: Task) -> Found:
    """Time until the only shard, of 64 images, is embedded and committed."""
    run = task.out / "run"
    began = time.perf_counter()
    with subprocess.Popen(
        _distill(run), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while not list((run / "embeddings").glob("scenes-*.json")):
            if process.poll() is not None:
                raise RuntimeError(f"the run ended with {process.returncode} and no shard")
            time.sleep(POLL_S)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, **_cpu_seconds(process.pid)}


def _cpu_seconds(pid: int) -> Found:
    """Return the CPU seconds of a process and its living descendants."""
    root = psutil.Process(pid)
    spent = []
    for process in (root, *root.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            spent.append(times.user + times.system)
    return {"cpu_s": sum(spent), "processes": len(spent)}


def checks(runs: Runs, _: Found) -> list[Check]:
    helped, shown, first = (median(runs[side]) for side in ("help", "show", "first image"))
    heavy = runs["help"][0]["heavy"]
    spent, processes = (median(runs["first image"], name) for name in ("cpu_s", "processes"))
    return [
        Check("help under 0.5 s", f"{helped:.2f} s", helped < 0.5),
        Check(
            "no torch imported for it",
            f"imported: {', '.join(heavy) or 'nothing heavy'}",
            "torch" not in heavy,
        ),
        Check("", f"show {shown:.2f} s", None),
        Check("first work under 10 s with a local Ray", f"{first:.1f} s", first < 10),
        Check(
            "", f"{spent:.1f} CPU seconds by then, of the {processes:.0f} processes that live", None
        ),
    ]


ROW = Row(
    11,
    "start-up: pds-ray --help, pds-ray show, first image embedded",
    "",
    {"help": show_help, "show": show_run, "first image": first_image},
    checks,
    prepare,
    notes=f"Whole commands; the first image is that of a shard of {SCENES} scenes, whose embedding "
    "is included. The memory of help and show is that of the process that measures: they end "
    "before it is looked at.",
)

"""A small run of the built-in world, and what to look at afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

DEMO = [
    "--preset",
    "demo",
    "--source",
    "scenes:1200",
    "--pairs",
    "24",
    "--decode.steps",
    "3",
    "--decode.batch_size",
    "8",
]

Run = Callable[..., subprocess.CompletedProcess]


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "pds_ray.cli", *args]


def content(run: Path) -> dict[str, bytes]:
    """Every file of a run but its diary and the page that tells it."""
    files = {
        str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()
    }
    files.pop("run.json")
    files.pop("report.html", None)
    return files


def stages(run: Path) -> dict[str, str]:
    return {
        name: entry["status"]
        for name, entry in json.loads((run / "run.json").read_text())["stages"].items()
    }

"""The command line as a user meets it: in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

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


@pytest.fixture(scope="session")
def pds_ray() -> Run:
    """Runs `pds-ray ARGS` to its end, without a network."""

    def run(*args: str, **options) -> subprocess.CompletedProcess:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        return subprocess.run(
            command(*args), capture_output=True, text=True, timeout=400, env=environment, check=False, **options
        )

    return run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, pds_ray: Run) -> tuple[Path, subprocess.CompletedProcess]:
    """A finished run of the built-in world, never interrupted: the reference of the others."""
    out = tmp_path_factory.mktemp("finished") / "run"
    done = pds_ray("distill", *DEMO, "--out", str(out))
    assert done.returncode == 0, done.stderr
    return out, done


def content(run: Path) -> dict[str, bytes]:
    """Every file of a run but its diary."""
    files = {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    files.pop("run.json")
    return files


def stages(run: Path) -> dict[str, str]:
    return {name: entry["status"] for name, entry in json.loads((run / "run.json").read_text())["stages"].items()}

"""`pds-ray` in this process and in one of its own, and what to look at afterwards."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

SOURCE = "scenes:90:0:0:30"
DEMO = ["--preset", "demo", "--source", SOURCE, "--pairs", "24", "--decode.steps", "3",
        "--decode.batch_size", "8"]  # fmt: skip
"""A small run of the built-in world: 450 pairs in three shards."""
EXIT_BUG = 1

Run = Callable[..., subprocess.CompletedProcess[str]]


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "pds_ray.cli", *args]


def process(*args: str, timeout: float = 800, **environment: str) -> subprocess.CompletedProcess:
    """Run `pds-ray ARGS` to its end in a process of its own."""
    env = {**os.environ, **environment}
    return subprocess.run(
        command(*args), capture_output=True, text=True, timeout=timeout, env=env, check=False
    )


def in_process(*args: str) -> subprocess.CompletedProcess[str]:
    """Run `pds-ray ARGS` in this process, on the Ray that runs here.

    An exception (with -v) becomes a traceback and exit code 1, as of a process.
    """
    from pds_ray.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.dict(os.environ),
    ):
        try:
            with pytest.raises(SystemExit) as ended:
                main(list(args))
            code = ended.value.code
        except Exception:
            traceback.print_exc()
            code = EXIT_BUG
    return subprocess.CompletedProcess(list(args), int(code or 0), out.getvalue(), err.getvalue())


def content(run: Path) -> dict[str, bytes]:
    """Return every file of a run but run.json, its copy and the report, which tell times."""
    files = {
        str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()
    }
    for name in ("run.json", "hashes/run.json"):
        files.pop(name)
    files.pop("report.html", None)
    return files


def check_same(run: Path, reference: Path) -> None:
    """Compare two runs byte by byte."""
    mine, expected = content(run), content(reference)
    assert mine.keys() == expected.keys(), mine.keys() ^ expected.keys()
    different = [name for name in expected if mine[name] != expected[name]]
    assert different == [], different


def times(folder: Path, *but: str) -> dict[Path, int]:
    """Return when the files of a folder were written, except those of the given names."""
    return {
        path: path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file() and path.name not in but
    }


def stages(run: Path) -> dict[str, str]:
    """Return stage -> status."""
    return {
        name: entry["status"]
        for name, entry in json.loads((run / "run.json").read_text())["stages"].items()
    }

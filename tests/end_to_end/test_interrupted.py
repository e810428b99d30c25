"""A run in a process of its own, interrupted, killed and continued; tests/faults has many more."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.command_line import DEMO, check_same, command, times

pytestmark = pytest.mark.ray
PATIENCE_S = 600
OWN_RAY = ("--ray.object_store_gib", "0.3")


def start(out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("distill", *DEMO, *OWN_RAY, "--out", str(out)),
        start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finished_work(out: Path) -> dict[Path, int]:
    """Return when each shard was committed and each image written."""
    done = {*out.glob("embeddings/scenes-*.json"), *out.glob("images/*.png")}
    return {path: when for path, when in times(out).items() if path in done}


def stop(out: Path, first: str, how: signal.Signals) -> tuple[int, str]:
    """Start the run, send a signal once a file is there, and return the exit code and stderr.

    The signal reaches Ray's processes too, as from a terminal.
    """
    process = start(out)
    deadline = time.monotonic() + PATIENCE_S
    while not list(out.glob(first)):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"no {first}"
        time.sleep(0.01)
    os.killpg(process.pid, how)
    _, errors = process.communicate(timeout=PATIENCE_S)
    return process.returncode, errors


def test_interrupted_killed_and_continued(
    finished: tuple[Path, subprocess.CompletedProcess], tmp_path: Path
) -> None:
    """It ends with the bytes of a run never disturbed, and finished work is not redone."""
    out = tmp_path / "run"
    code, errors = stop(out, "embeddings/scenes-*.json", signal.SIGINT)
    assert code == 130, errors
    assert "the same command continues" in errors
    embedded = finished_work(out)
    assert embedded
    code, _ = stop(out, "images/*.png", signal.SIGKILL)
    assert code == -signal.SIGKILL
    decoded = finished_work(out)
    assert embedded.items() < decoded.items(), "finished work was redone"
    process = start(out)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, errors
    check_same(out, finished[0])
    assert decoded.items() <= finished_work(out).items(), "finished work was redone"

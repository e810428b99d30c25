"""A run in a process of its own is killed and continued; tests/faults has more signals."""

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


def start(out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("distill", *DEMO, "--ray.object_store_gib", "0.3", "--out", str(out)),
        start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finished_work(out: Path) -> dict[Path, int]:
    """Return when each shard was committed and each image written."""
    done = {*out.glob("embeddings/scenes-*.json"), *out.glob("images/*.png")}
    return {path: when for path, when in times(out).items() if path in done}


def test_a_killed_run_continues_where_it_was(
    finished: tuple[Path, subprocess.CompletedProcess], tmp_path: Path
) -> None:
    """It ends with the bytes of a run never disturbed, and finished work is not redone."""
    out = tmp_path / "run"
    process = start(out)
    deadline = time.monotonic() + PATIENCE_S
    while not list(out.glob("images/*.png")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no image"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)  # Ray's processes too
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode == -signal.SIGKILL
    before = finished_work(out)
    process = start(out)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, errors
    check_same(out, finished[0])
    assert before.items() <= finished_work(out).items(), "finished work was redone"

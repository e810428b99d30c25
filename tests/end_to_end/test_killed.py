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


OTHERWISE = ("--ray.num_cpus", "1", "--embed.batch_size", "16")
"""One CPU; two batches per shard, where the reference has one."""


def start(out: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("distill", *DEMO, "--ray.object_store_gib", "0.3", "--out", str(out), *options),
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finished_work(out: Path) -> dict[Path, int]:
    """Return when each shard was committed and each image written."""
    done = {*out.glob("embeddings/scenes-*.json"), *out.glob("images/*.png")}
    return {path: when for path, when in times(out).items() if path in done}


@pytest.mark.long
def test_a_killed_run_continues_where_it_was(
    finished: tuple[Path, subprocess.CompletedProcess], tmp_path: Path
) -> None:
    """It ends with the bytes of a run never disturbed, and finished work is not redone.

    It began with other workers and batches than it ends with, and than the undisturbed run.
    """
    out = tmp_path / "run"
    process = start(out, *OTHERWISE)
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
    said, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, errors
    assert "24 pairs" in said
    assert errors.splitlines()[-1] == "pds-ray: distill done"
    assert "Traceback" not in said + errors
    assert "Warning" not in errors
    check_same(out, finished[0])
    assert before.items() <= finished_work(out).items(), "finished work was redone"

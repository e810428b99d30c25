"""A run killed at any instant and started again ends with the bytes of one never disturbed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray
ARGS = ["distill", "--preset", "demo", "--source", "scenes:3000", "--pairs", "20", "--decode.steps", "2",
        "--decode.batch_size", "4"]  # fmt: skip
STAGES = ("embed", "prune", "cluster", "match", "prototypes", "decode", "caption", "materialize")


def start(out: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "pds_ray.cli", *ARGS, "--out", str(out)],
        start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def progress(out: Path) -> str:
    """The stage that is under way, with the shards or pictures it has finished."""
    try:
        stages = json.loads((out / "run.json").read_text())["stages"]
    except (FileNotFoundError, ValueError):
        return "starting"
    running = [name for name, entry in stages.items() if entry["status"] == "running"]
    return running[-1] if running else "between"


def content(run: Path) -> dict[str, bytes]:
    files = {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    files.pop("run.json")
    files.pop("report.html", None)
    return files


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    process = start(out)
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    return out


@pytest.mark.parametrize(("how", "expected"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_killed_again_and_again(undisturbed: Path, tmp_path: Path, how: signal.Signals, expected: int) -> None:
    """Killed once in each of two stages, at a random moment of it; finished work is not redone."""
    out = tmp_path / "run"
    moments = random.Random(int(how))
    finished: dict[Path, int] = {}
    for stage in ("embed", "decode"):
        process = start(out)
        deadline = time.monotonic() + 120
        while progress(out) != stage and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert process.poll() is None, f"ended before {stage}"
        time.sleep(moments.uniform(0, 3))
        os.killpg(process.pid, how)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == expected, errors
        if how == signal.SIGINT:
            assert "the same command continues" in errors
        assert {path: path.stat().st_mtime_ns for path in finished} == finished, "finished work was redone"
        done = [*(out / "embeddings").glob("*.json"), *(out / "images").glob("*.png")]
        finished = {path: path.stat().st_mtime_ns for path in done}
    process = start(out)
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "finished work was redone"
    mine, reference = content(out), content(undisturbed)
    assert mine.keys() == reference.keys()
    assert [name for name in reference if mine[name] != reference[name]] == []

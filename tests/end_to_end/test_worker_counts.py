"""The same bytes whether one worker did it, two or four."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.command_line import check_same, process

pytestmark = [pytest.mark.ray, pytest.mark.long]
WORLD = ["--preset", "demo", "--source", "scenes:96:0:0:8", "--pairs", "12"]
DECODED = ["--decoder", "unclip", "--decode.steps", "2", "--decode.batch_size", "2"]
COMMANDS = {
    "pds": ["distill", *WORLD, *DECODED],
    "pds with a k-means over all nodes": [
        "distill", *WORLD, *DECODED, "--cluster.solver", "distributed",
    ],
    "coverage": ["distill", "--method", "coverage", *WORLD, *DECODED],
}  # fmt: skip


def run(method: str, workers: int, out: Path) -> Path:
    count = str(workers)
    done = process(
        *COMMANDS[method], "--out", str(out), "--ray.num-cpus", count, "--ray.object-store-gib",
        "0.2", "--ray.embed-workers", count, "--ray.decode-workers", count,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("method", COMMANDS)
def test_one_two_and_four_workers_make_the_same_bytes(method: str, tmp_path: Path) -> None:
    one = run(method, 1, tmp_path / "1")
    for workers in (2, 4):
        check_same(run(method, workers, tmp_path / str(workers)), one)

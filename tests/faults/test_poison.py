"""Samples that crash or hang cost themselves alone; a full disk ends the run in one line."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.support.command_line import check_same, process
from tests.support.poisoned import HOOK, write_shard

pytestmark = [pytest.mark.ray, pytest.mark.long]
ENCODER = ["--preset", "demo", "--decoder", "nearest", "--pairs", "5"]


def poisoned(*args: str) -> subprocess.CompletedProcess:
    """Run `pds-ray ARGS` where the marked samples do harm."""
    path = os.pathsep.join([str(HOOK), os.environ.get("PYTHONPATH", "")])
    return process(*args, PYTHONPATH=path)


@pytest.mark.parametrize(
    "place",
    [
        (),
        ("--ray.num_cpus", "1"),  # a task decodes a whole shard
        ("--ray.executions", "2", "--ray.embed_workers", "2"),
    ],
    ids=["by blocks", "whole shards", "executions"],
)
def test_poison_costs_itself_and_can_be_tried_again(tmp_path: Path, place: tuple[str, ...]) -> None:
    poison = {"a": {}, "b": {7: "crash", 8: "crash", 30: "hang"}, "c": {39: "crash"}, "d": {}}
    (tmp_path / "data").mkdir()
    for seed, (name, samples) in enumerate(poison.items()):
        write_shard(tmp_path / "data" / f"{name}.tar", samples, seed=seed)
    source = ["--source", str(tmp_path / "data" / "*.tar")]
    healthy, run = tmp_path / "healthy", tmp_path / "run"
    done = process("distill", *ENCODER, *source, "--out", str(healthy))
    assert done.returncode == 0, done.stderr

    limit = ("--ray.sample_timeout_s", "20")  # of a healthy one on a busy machine too
    done = poisoned("distill", *ENCODER, *source, "--out", str(run), *limit, *place)
    assert done.returncode == 0, done.stderr
    counts = json.loads((run / "run.json").read_text())["stages"]["embed"]["counts"]
    assert counts["reasons"] == {"crashed_process": 3, "timed_out": 1}
    assert (counts["images"], counts["failed_shards"]) == (156, 0)
    for name, samples in poison.items():
        for table in ("images", "captions"):
            mine, theirs = (
                pq.read_table(folder / "embeddings" / f"{name}.{table}.parquet").to_pylist()
                for folder in (run, healthy)
            )
            dead = {f"{sample:04d}" for sample in samples}
            kept = [row for row in theirs if row["key"] not in dead]
            for row in [*mine, *kept]:
                row.pop("image_row", None)
            assert mine == kept
        errors = pq.read_table(run / "embeddings" / f"{name}.errors.parquet").to_pylist()
        assert {row["key"]: row["reason"] for row in errors} == {
            f"{sample:04d}": {"crash": "crashed_process", "hang": "timed_out"}[kind]
            for sample, kind in samples.items()
        }

    again = process("retry-failed", str(run))  # on a machine where the images do no harm
    assert again.returncode == 0, again.stderr
    check_same(run, healthy)
    nothing = process("retry-failed", str(run))
    assert nothing.returncode == 2
    assert "nothing to try again" in nothing.stderr


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a disk of 1 MiB, where a test may make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if made.returncode:
        pytest.skip(f"cannot make a small disk: {made.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_one_clear_line(tmp_path: Path, small_disk: Path) -> None:
    (tmp_path / "data").mkdir()
    write_shard(tmp_path / "data" / "a.tar", {}, samples=1500)
    source = str(tmp_path / "data" / "a.tar")
    done = process("distill", *ENCODER, "--source", source, "--out", str(small_disk / "run"))
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "No space left" in last
    assert str(small_disk) in last

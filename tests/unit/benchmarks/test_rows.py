"""What rows measure by themselves, against what is known otherwise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.data import write_shards
from benchmarks.measure import Found
from benchmarks.null_encoder import describe
from benchmarks.rows import startup, workers
from pds_ray.artifacts import EmbeddingStore
from pds_ray.config import RunConfig
from pds_ray.storage import Folder

BURNS = "import time\nwhile time.process_time() < 0.5: pass\nprint(1, flush=True)\ntime.sleep(60)"


def test_cpu_seconds_are_those_of_a_process_and_its_children():
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {BURNS!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = startup._cpu_seconds(process.pid)
        for one in startup.psutil.Process(process.pid).children():
            one.kill()
        process.kill()
    assert found["processes"] == 2
    assert 0.5 <= found["cpu_s"] < 3


def test_shards_without_ray_are_committed(tmp_path: Path):
    from PIL import Image

    Image.new("RGB", (16, 16)).save(tmp_path / "one.jpg")
    sample = {"jpg": (tmp_path / "one.jpg").read_bytes(), "txt": b"a black square"}
    write_shards([sample] * 10, tmp_path / "shards", 4)
    seconds = workers._seconds_without_ray(f"{tmp_path}/shards/*.tar", describe(), RunConfig(), tmp_path / "store")
    markers = EmbeddingStore(Folder(str(tmp_path / "store"))).committed()
    assert [marker["images"] for marker in markers.values()] == [4, 4, 2]
    assert seconds > 0


@pytest.mark.parametrize(
    ("two_s", "shard_ms", "image_ms", "reached"),
    [
        (10.0, 29.0, 0.29, [True, True, True, None]),
        (12.0, 31.0, 0.31, [False, False, False, None]),
    ],
)
def test_workers_are_judged_by_the_ideal(two_s: float, shard_ms: float, image_ms: float, reached: list[bool | None]):
    costs: Found = {"shard_ms": shard_ms, "image_ms": image_ms, "alone_shard_ms": 5.0, "alone_image_ms": 0.1}
    runs = {workers.ONE: [{"seconds": 20.0}], workers.TWO: [{"seconds": two_s}], workers.OVERHEAD: [costs]}
    assert [check.reached for check in workers.checks(runs, {})] == reached


@pytest.mark.parametrize(("seconds", "reached"), [(9.9, True), (10.1, False)])
def test_a_start_is_judged(seconds: float, reached: bool):
    first = {"seconds": seconds, "cpu_s": 15.0, "processes": 14}
    runs = {"help": [{"seconds": 0.2, "heavy": ["numpy"]}], "show": [{"seconds": 0.5}], "first image": [first]}
    assert reached in [check.reached for check in startup.checks(runs, {}) if "first work" in check.wanted]

"""Measurements and verdicts of rows, against independent values."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.data import write_shards
from benchmarks.measure import BASELINE, OURS, Found
from benchmarks.null_encoder import describe
from benchmarks.rows import clip_retrieval, evaluation, startup, workers
from pds_ray.config import RunConfig
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.storage import Folder

pytestmark = pytest.mark.long
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
    seconds = workers._seconds_without_ray(
        f"{tmp_path}/shards/*.tar", describe(), RunConfig(), tmp_path / "store"
    )
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
def test_workers_are_judged_by_the_ideal(
    two_s: float, shard_ms: float, image_ms: float, reached: list[bool | None]
):
    costs: Found = {
        "shard_ms": shard_ms,
        "image_ms": image_ms,
        "alone_shard_ms": 5.0,
        "alone_image_ms": 0.1,
    }
    runs = {
        workers.ONE: [{"seconds": 20.0}],
        workers.TWO: [{"seconds": two_s}],
        workers.OVERHEAD: [costs],
    }
    assert [check.reached for check in workers.checks(runs, {})] == reached


@pytest.mark.parametrize(("seconds", "reached"), [(9.9, True), (10.1, False)])
def test_a_start_is_judged(seconds: float, reached: bool):
    first = {"seconds": seconds, "cpu_s": 15.0, "processes": 14}
    runs = {
        "help": [{"seconds": 0.2, "heavy": ["numpy"]}],
        "show": [{"seconds": 0.5}],
        "first image": [first],
    }
    assert reached in [
        check.reached for check in startup.checks(runs, {}) if "first work" in check.wanted
    ]


@pytest.mark.parametrize(
    ("reading_s", "apart", "reached"),
    [(1.9, 1e-4, [True, None, None, True]), (2.1, 1.0, [False, None, None, False])],
)
def test_reading_counts_against_us(reading_s: float, apart: float, reached: list[bool | None]):
    runs = {BASELINE: [{"seconds": 30.0, "versions": {}}], OURS: [{"seconds": 18.0}]}
    found = clip_retrieval.checks(runs, {"img": apart, "text": 0.0, "reading_s": reading_s})
    assert [check.reached for check in found] == reached


@pytest.mark.parametrize(
    ("seconds", "r_mean", "gap", "reached"),
    [(9.9, 2.7, 0.1, [True, True, True, None]), (10.1, 2.6, 0.3, [False, False, False, None])],
)
def test_an_evaluation_is_judged(
    seconds: float, r_mean: float, gap: float, reached: list[bool | None]
):
    """Chance finds (0.1 + 0.5 + 1) / 3 percent of 1,000 images."""
    ours = {"seconds": seconds, "recalls": [{"r_mean": r_mean}], "images": 1000, "trials_s": 5.0}
    runs = {BASELINE: [{"seconds": 100.0, "recalls": [{"r_mean": r_mean + gap}]}], OURS: [ours]}
    assert [check.reached for check in evaluation.checks(runs, {})] == reached

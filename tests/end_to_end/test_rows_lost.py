"""Commits of a stage are lost, few to all: the same command redoes exactly those, and no more.

A run is left as a driver leaves it that is killed within the stage; what was done after it before,
as when the stage was being repaired, stands unless its result comes out otherwise.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pds_ray import catalog
from pds_ray.store.manifest import RunManifest
from tests.support.command_line import Run, check_same, content
from tests.support.finished_runs import COMMANDS, PAIRS

pytestmark = [pytest.mark.ray, pytest.mark.long]
SHARES = (0.10, 0.25, 0.50, 0.75, 0.90, 1.00)
SHARDS, IMAGES_PER_SHARD = 20, 8
TABLES = "images.parquet", "captions.parquet", "errors.parquet"
COMMITS = {
    "embed": [
        [f"embeddings/scenes-{shard:05d}.{kind}" for kind in ("json", *TABLES)]
        for shard in range(SHARDS)
    ],
    "prune": [[f"pruning/scenes-{shard:05d}.keep.parquet"] for shard in range(SHARDS)],
    "cluster": [[f"clusters/scenes-{shard:05d}.labels.parquet"] for shard in range(SHARDS)],
    "decode": [[f"images/{pair:06d}.png"] for pair in range(PAIRS)],
}
"""Stage that commits item by item -> the files of each commit; `SINGLE` has the others."""
SINGLE = {
    "match": "matching/couples.parquet",
    "prototypes": "prototypes.parquet",
    "caption": "captions.parquet",
    "whiten": "whitening.safetensors",
    "cover": "prototypes.parquet",
}
METHODS = ("pds", "coverage")
BY_ITEM = [
    (method, stage) for method in METHODS for stage in catalog.method(method).names
    if stage in COMMITS
]  # fmt: skip
BY_FILE = [
    (method, stage) for method in METHODS for stage in catalog.method(method).names
    if stage in SINGLE
]  # fmt: skip


def written(run: Path) -> dict[str, tuple[int, int]]:
    """Return which file each name stands for, and when it was written; a new one is another."""
    found = {}
    for name in content(run):
        stat = (run / name).stat()
        found[name] = (stat.st_ino, stat.st_mtime_ns)
    return found


def kill_within(run: Path, stage: str) -> None:
    """Leave run.json as a driver does that is killed within a stage."""
    manifest = RunManifest.open(str(run))
    manifest.start(stage, manifest.stages[stage]["fingerprint"])


def entries(run: Path) -> dict[str, dict[str, Any]]:
    return json.loads((run / "run.json").read_text())["stages"]


def repeat(run: Path, reference: Path, stage: str, lost: set[str], pds_ray: Run) -> set[str]:
    """Lose files of a stage, repeat the command; return the other files that it wrote anew."""
    before, then = written(run), entries(run)
    for name in lost:
        (run / name).unlink()
    kill_within(run, stage)
    done = pds_ray(*COMMANDS[reference.name], "--out", str(run))
    assert done.returncode == 0, done.stderr
    check_same(run, reference)
    now, after = entries(run), written(run)
    del then[stage]
    assert {name: now[name] for name in then} == then, "another stage ran"
    redone = {name for name in after if after[name] != before[name]}
    assert lost <= redone
    return redone - lost - {f"hashes/{stage}.json"}


@pytest.mark.parametrize(("method", "stage"), BY_ITEM)
def test_exactly_the_commits_that_are_lost_are_made_again(
    method: str, stage: str, finished_by: Callable[[str], Path], tmp_path: Path, pds_ray: Run
) -> None:
    reference, run = finished_by(method), tmp_path / "run"
    shutil.copytree(reference, run)
    chance = random.Random(f"{method} {stage}")
    counts = entries(run)[stage]["counts"]
    for share in SHARES:
        commits = COMMITS[stage]
        lost = chance.sample(commits, round(share * len(commits)))
        others = repeat(run, reference, stage, {name for files in lost for name in files}, pds_ray)
        now = entries(run)[stage]["counts"]
        if stage == "embed":
            kept = SHARDS - len(lost)
            assert now["shards_reused"] == kept
            assert now["images_reused"] == kept * IMAGES_PER_SHARD
            assert now["timed"] == len(lost) * IMAGES_PER_SHARD
            assert others == set()
        elif stage == "decode":
            assert (now["made"], now["found"]) == (len(lost), PAIRS - len(lost))
            # an image is chosen anew with the record of it, and all records are gathered
            chosen = {name.replace(".png", ".choice") for (name,) in lost} | {"choices.parquet"}
            assert others == (chosen if method == "pds" else set())
        else:
            assert now == counts
            assert others == set()


@pytest.mark.parametrize(("method", "stage"), BY_FILE)
def test_the_one_file_of_a_stage_is_made_again_alone(
    method: str, stage: str, finished_by: Callable[[str], Path], tmp_path: Path, pds_ray: Run
) -> None:
    reference, run = finished_by(method), tmp_path / "run"
    shutil.copytree(reference, run)
    counts = entries(run)[stage]["counts"]
    assert repeat(run, reference, stage, {SINGLE[stage]}, pds_ray) == set()
    assert entries(run)[stage]["counts"] == counts


@pytest.mark.parametrize("space", ["image", "text"])
def test_lost_centroids_cost_their_fit_and_the_labels(
    space: str, finished_by: Callable[[str], Path], tmp_path: Path, pds_ray: Run
) -> None:
    """Labels would belong to others, should these differ in their last bits."""
    reference, run = finished_by("pds"), tmp_path / "run"
    shutil.copytree(reference, run)
    others = repeat(run, reference, "cluster", {f"clusters/{space}.safetensors"}, pds_ray)
    assert others == {name for (name,) in COMMITS["cluster"]} | {"clusters/fits.json"}


@pytest.mark.parametrize("method", METHODS)
def test_the_set_is_written_as_a_whole(
    method: str, finished_by: Callable[[str], Path], tmp_path: Path, pds_ray: Run
) -> None:
    """Its manifest, which comes last, is its commit: what is lost with it is the set."""
    reference, run = finished_by(method), tmp_path / "run"
    shutil.copytree(reference, run)
    others = repeat(run, reference, "materialize", {"distilled/manifest.json"}, pds_ray)
    assert {name.partition("/")[0] for name in others} == {"distilled"}


def test_every_stage_is_here() -> None:
    names = {name for method in METHODS for name in catalog.method(method).names}
    assert names == {*COMMITS, *SINGLE, "materialize"}

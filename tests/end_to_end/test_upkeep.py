"""`verify` names files that are missing or corrupt; `verify --repair` makes those again."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from pds_ray.engine.upkeep import verify
from tests.support.command_line import Run, check_same, content

pytestmark = pytest.mark.ray
Finished = tuple[Path, subprocess.CompletedProcess]


@pytest.fixture
def copy(finished: Finished, tmp_path: Path) -> Path:
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


def promised(run: Path) -> list[str]:
    """Return the files of a finished run that `verify` must know."""
    return ["run.json", "hashes/run.json", *(name for name in content(run) if ".lock" not in name)]


def test_verify_finds_no_problem_in_a_good_run(finished: Finished) -> None:
    run, _ = finished
    files, problems = verify(str(run), {})
    assert problems == []
    markers = sorted(path.name for path in (run / "embeddings").glob("*.json"))
    # those that hold hashes are looked at too, and count as none
    records = ["run.json", "embeddings/store", *(run / "hashes").iterdir()]
    assert files == len(promised(run)) - len(markers) - len(records)


def test_verify_names_every_missing_file_and_every_flipped_bit(copy: Path) -> None:
    chance = random.Random(4)
    for name in promised(copy):
        path = copy / name
        whole = path.read_bytes()
        place = chance.randrange(len(whole))
        for broken in (
            None,
            whole[:place] + bytes([whole[place] ^ 1 << chance.randrange(8)]) + whole[place + 1 :],
        ):
            path.unlink()
            if broken is not None:
                path.write_bytes(broken)
            _, problems = verify(str(copy), {})
            # a marker whose hash of a file was changed cannot be told from a changed file
            named = {problem.name for problem in problems} | {
                f"{problem.shard}.json" for problem in problems if problem.shard and broken
            }
            assert any(name.endswith(each) for each in named), f"{name}: {problems}"
            path.write_bytes(whole)
    assert verify(str(copy), {})[1] == []


def test_repair_makes_the_broken_files_alone(copy: Path, finished: Finished, pds_ray: Run) -> None:
    broken = [
        "shards.parquet", "embeddings/store.parquet", "pruning/scenes-00000.keep.parquet",
        "clusters/text.safetensors",
        "images/000003.png", "prototypes.parquet", "distilled/webdataset/000000.tar",
    ]  # fmt: skip
    for name in broken:
        (copy / name).write_bytes(b"not what it was")
    marker = copy / "embeddings" / "scenes-00001.json"
    marker.write_text(marker.read_text().replace('"images": 30', '"images": 31'))
    broken.append("embeddings/scenes-00001.json")
    untouched = {
        path: path.stat().st_mtime_ns
        for path in [*copy.glob("embeddings/scenes-00000.*"), *copy.glob("images/00001*.png")]
    }
    assert len(untouched) > 5
    found = pds_ray("verify", str(copy))
    assert found.returncode == 2
    assert [name for name in broken if Path(name).name not in found.stdout] == []
    mended = pds_ray("verify", str(copy), "--repair")
    assert mended.returncode == 0, mended.stderr
    check_same(copy, finished[0])
    assert {path: path.stat().st_mtime_ns for path in untouched} == untouched
    assert json.loads((copy / "run.json").read_text())["stages"].keys() >= {
        "embed",
        "caption",
        "materialize",
    }


def test_a_folder_without_a_run_is_refused(tmp_path: Path, pds_ray: Run) -> None:
    for name in ("verify", "retry-failed"):
        done = pds_ray(name, str(tmp_path))
        assert (done.returncode, "no run folder" in done.stderr) == (2, True)

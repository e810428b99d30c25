"""A flipped bit in a file of a run is named by `verify` and mended by `--repair`, every kind."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pds_ray.engine.upkeep import Problem, verify
from pds_ray.store.storage import LOCK
from tests.support.command_line import Run, check_same
from tests.support.finished_runs import COMMANDS

pytestmark = [pytest.mark.ray, pytest.mark.long]
METHODS = ("pds", "coverage")
UNPROMISED = {LOCK, "report.html"}
"""Names of files without content, and of one that `pds-ray report` writes at any time."""


def files(run: Path) -> list[str]:
    """Return every file of a run that has content which something depends on."""
    found = [path for path in run.rglob("*") if path.is_file() and path.name not in UNPROMISED]
    return sorted(str(path.relative_to(run)) for path in found)


def kind(name: str) -> str:
    """Return a name without the numbers of shards and pairs."""
    return re.sub(r"\d+", "N", name)


def flip(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def is_named(name: str, problems: list[Problem]) -> bool:
    """Return whether a file is named, as its marker or table where those are of one shard."""
    shard = re.fullmatch(r"embeddings/(scenes-\d+)\..*", name)
    if shard and any(problem.shard == shard[1] for problem in problems):
        return True
    return any(name in (each.name, f"embeddings/{each.name}", f"distilled/{each.name}")
               for each in problems)  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_every_file_is_named(
    method: str, finished_by: Callable[[str], Path], tmp_path: Path
) -> None:
    run, chance = tmp_path / "run", random.Random(method)
    shutil.copytree(finished_by(method), run)
    assert verify(str(run), {})[1] == []
    missed = []
    for name in files(run):
        whole = (run / name).read_bytes()
        flip(run / name, chance)
        if not is_named(name, verify(str(run), {})[1]):
            missed.append(name)
        (run / name).write_bytes(whole)
    assert missed == []
    assert verify(str(run), {})[1] == []


def kinds(method: str) -> list[str]:
    """Return the kinds of files of a run by a method; `test_no_kind_is_left_out` checks them."""
    common = [
        "run.json", "hashes/run.json", "shards.parquet", "embeddings/store",
        "embeddings/store.parquet", "embeddings/scenes-N.json",
        "embeddings/scenes-N.images.parquet", "embeddings/scenes-N.captions.parquet",
        "embeddings/scenes-N.errors.parquet",
        "pruning/scenes-N.keep.parquet", "prototypes.parquet", "images/N.png", "hashes/prune.json",
        "hashes/decode.json", "hashes/materialize.json", "distilled/README.md",
        "distilled/manifest.json", "distilled/prototypes.safetensors",
        "distilled/imagefolder/N.png", "distilled/imagefolder/metadata.jsonl",
        "distilled/webdataset/N.tar",
    ]  # fmt: skip
    own = {
        "pds": [
            "clusters/fits.json", "clusters/image.safetensors", "clusters/text.safetensors",
            "clusters/scenes-N.labels.parquet", "matching/couples.parquet", "images/N.choice",
            "choices.parquet", "captions.parquet", "hashes/cluster.json", "hashes/match.json",
            "hashes/prototypes.json", "hashes/caption.json",
        ],
        "coverage": ["whitening.safetensors", "hashes/whiten.json", "hashes/cover.json"],
    }  # fmt: skip
    return sorted([*common, *own[method]])


@pytest.mark.parametrize("method", METHODS)
def test_no_kind_is_left_out(method: str, finished_by: Callable[[str], Path]) -> None:
    assert sorted(set(map(kind, files(finished_by(method))))) == kinds(method)


MENDED = [("pds", each) for each in kinds("pds")] + [
    ("coverage", each) for each in sorted({*kinds("coverage")} - {*kinds("pds")})
]
"""A method and a kind of file."""


@pytest.mark.parametrize(("method", "broken"), MENDED)
def test_repair_brings_the_bytes_back(
    method: str, broken: str, finished_by: Callable[[str], Path], tmp_path: Path, pds_ray: Run
) -> None:
    reference, run = finished_by(method), tmp_path / "run"
    chance = random.Random(f"{method} {broken}")
    shutil.copytree(reference, run)
    name = chance.choice([each for each in files(run) if kind(each) == broken])
    flip(run / name, chance)
    found = pds_ray("verify", str(run))
    assert found.returncode == 2, found.stdout
    mended = pds_ray("verify", str(run), "--repair")
    assert mended.returncode == 0, mended.stdout + mended.stderr
    assert mended.stdout.splitlines()[-1].endswith("files checked, all as written")
    check_same(run, reference)
    again = pds_ray(*COMMANDS[method], "--out", str(run))
    assert again.returncode == 0, again.stderr
    check_same(run, reference)
    assert verify(str(run), {})[1] == []


@pytest.mark.parametrize("list_of_hashes", ["missing", "no JSON"])
def test_a_file_is_not_believed_without_its_hash(
    list_of_hashes: str, finished_by: Callable[[str], Path], tmp_path: Path, pds_ray: Run
) -> None:
    """The files of a list of hashes that is lost stand only if they are those of the list."""
    reference, run = finished_by("pds"), tmp_path / "run"
    shutil.copytree(reference, run)
    flip(run / "clusters" / "scenes-00003.labels.parquet", random.Random(3))
    hashes = run / "hashes" / "cluster.json"
    if list_of_hashes == "missing":
        hashes.unlink()
    else:
        hashes.write_text("{")
    mended = pds_ray("verify", str(run), "--repair")
    assert mended.returncode == 0, mended.stdout + mended.stderr
    check_same(run, reference)

"""`verify` on damage of every kind, without Ray: it names what is wrong, and trips over nothing."""

from __future__ import annotations

import errno
import json
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pds_ray.config import RunConfig, to_dict
from pds_ray.engine.upkeep import Problem, verify
from pds_ray.stages.embed import sum_counts
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.manifest import RunManifest
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.storage import Folder
from tests.support.synthetic_store import make_store

SHARD = "00001"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EmbeddingStore]:
    """A run that has embedded three shards."""
    path = tmp_path_factory.mktemp("made") / "run"
    store, _ = make_store(path / "embeddings", [9, 5, 7])
    store.begin({}, [])
    manifest = RunManifest(RunFolder(Folder(str(path))))
    manifest.update(config=to_dict(RunConfig(source="x", pairs=2)))
    manifest.start("embed", "")
    manifest.stop("embed", "done", {**asdict(sum_counts(store.committed().values())), "shards": 3})
    return path, store


def problems(path: Path) -> list[Problem]:
    return verify(str(path), {})[1]


def test_a_good_store_has_none(made: tuple[Path, EmbeddingStore]) -> None:
    assert verify(str(made[0]), {}) == (10, [])


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0, 1, exclude_max=True), st.integers(0, 7))
@example(0.5, 0)
def test_every_flipped_bit_of_a_marker_is_named_with_its_shard(
    made: tuple[Path, EmbeddingStore], where: float, bit: int
) -> None:
    path, store = made
    marker = path / "embeddings" / f"{SHARD}.json"
    whole = marker.read_bytes()
    place = int(where * len(whole))
    marker.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
    try:
        found = problems(path)
        sum_counts(store.committed().values())  # nor does a run trip over it
    finally:
        marker.write_bytes(whole)
    assert SHARD in {problem.shard for problem in found}
    assert {problem.shard for problem in found} <= {SHARD, ""}


@pytest.mark.parametrize("count", ["images", "pairs", "bad"])
def test_a_count_that_is_not_that_of_the_files_is_named(
    made: tuple[Path, EmbeddingStore], count: str
) -> None:
    """Even where run.json has been made to agree with it."""
    path, _ = made
    marker, manifest = path / "embeddings" / f"{SHARD}.json", RunManifest.open(str(path))
    before = marker.read_bytes()
    wrong, told = json.loads(before), manifest.stages["embed"]["counts"]
    wrong[count] += 1
    marker.write_text(json.dumps(wrong))
    told[count] += 1
    manifest.update()
    found = problems(path)
    marker.write_bytes(before)
    told[count] -= 1
    manifest.update()
    assert [(problem.name, problem.shard) for problem in found] == [(f"{SHARD}.json", SHARD)]
    assert f"'{count}': {wrong[count]}" in found[0].what


def test_a_file_that_cannot_be_read_is_named(
    made: tuple[Path, EmbeddingStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = Folder.sha256

    def fail(folder: Folder, name: str) -> str:
        if name == f"{SHARD}.captions.parquet":
            raise OSError(errno.EIO, "Input/output error")
        return sha256(folder, name)

    monkeypatch.setattr(Folder, "sha256", fail)
    (found,) = problems(made[0])
    assert (found.name, found.shard) == (f"{SHARD}.captions.parquet", SHARD)
    assert "unreadable" in found.what
    assert "Input/output error" in found.what


@pytest.mark.parametrize("note", [b"", b"{", b"[]", b"{}", b'{"problem": 5}', b"\xff"])
def test_a_damaged_note_of_failure_is_none(made: tuple[Path, EmbeddingStore], note: bytes) -> None:
    path, store = made
    (path / "embeddings" / "gone.failed").write_bytes(note)
    store.fail("really", "is away")
    assert store.failed() == {"really": "is away"}
    for name in ("gone", "really"):
        (path / "embeddings" / f"{name}.failed").unlink()


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "no such file"), OSError(errno.EIO, "Input/output error")]
)
def test_a_marker_that_goes_while_it_is_read_is_none(
    made: tuple[Path, EmbeddingStore], monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    read = Folder.read_bytes

    def fail(folder: Folder, name: str) -> bytes:
        if name == f"{SHARD}.json":
            raise error
        return read(folder, name)

    monkeypatch.setattr(Folder, "read_bytes", fail)
    assert made[1].committed().keys() == {"00000", "00002"}
    assert SHARD in {problem.shard for problem in problems(made[0])}

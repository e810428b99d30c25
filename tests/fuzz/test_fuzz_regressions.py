"""The fuzz targets over the inputs that fuzzing starts from, and over every one that it found."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS, seeds
from tests.support.hostile import CAPTIONS, JSON, SHARDS

FOUND = sorted(Path(__file__).parent.joinpath("found").glob("*/*"))


@pytest.mark.parametrize("target", TARGETS)
def test_seeds(target: str) -> None:
    for data in seeds(target):
        TARGETS[target](data)


@pytest.mark.parametrize("path", FOUND, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_found(path: Path) -> None:
    TARGETS[path.parent.name](path.read_bytes())


@pytest.mark.parametrize("name", SHARDS)
def test_whole_shards(name: str) -> None:
    TARGETS["tar"](SHARDS[name] + bytes(1024))


@pytest.mark.parametrize("name", JSON)
def test_whole_records(name: str) -> None:
    TARGETS["record"](JSON[name])


@pytest.mark.parametrize("text", CAPTIONS)
def test_whole_captions(text: str) -> None:
    TARGETS["caption"](text.encode())

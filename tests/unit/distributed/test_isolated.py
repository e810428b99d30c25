"""Isolated embedding: a sample that kills the process costs itself, and nothing else changes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from pds_ray.config import EmbedConfig, ReadConfig
from pds_ray.distributed.isolated import MAX_REFUSED, Limits, Work, embed_isolated
from pds_ray.encoders.base import EncoderInfo
from pds_ray.modalities.image import Preprocess
from pds_ray.sources.base import Sample, Shard, SourceError
from pds_ray.sources.webdataset import WebDatasetSource
from pds_ray.stages import embed as core
from pds_ray.store.storage import StorageError
from tests.support.poisoned import HOOK, write_shard

READ, EMBED = ReadConfig(), EmbedConfig()
SAMPLES = 300
PATIENT = Limits(seconds=20, memory_bytes=4 << 30)


class Sums:
    """A fake encoder: eight sums of the pixels, eight of the letters; some captions kill."""

    dim = 8

    def __init__(self, deadly: str = "") -> None:
        self.deadly = deadly

    def encode_images(self, pixels: np.ndarray) -> np.ndarray:
        return pixels.reshape(len(pixels), self.dim, -1).sum(axis=2).astype(np.float32) / 1e4

    def encode_captions(self, captions: list[str]) -> np.ndarray:
        if self.deadly and self.deadly in captions:
            os._exit(9)
        return np.array(
            [[sum(c.encode()[i :: self.dim]) for i in range(self.dim)] for c in captions],
            np.float32,
        )


def broken() -> Sums:
    raise ValueError("no such weights")


@pytest.fixture
def info() -> EncoderInfo:
    return EncoderInfo(
        name="sums",
        space="sums",
        dim=8,
        identity="sums",
        preprocess=Preprocess(size=16),
        load_args=(),
    )


@pytest.fixture(autouse=True)
def _poison_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HOOK), os.environ.get("PYTHONPATH", "")]))


def run(folder: Path, info: EncoderInfo, load=Sums, limits: Limits = PATIENT):
    source = WebDatasetSource(str(folder / "*.tar"))
    (shard,) = source.shards()
    return embed_isolated(Work(source, shard, info, load, READ, EMBED), limits), (source, shard)


def good_ones(folder: Path, info: EncoderInfo, without: set[int]):
    """Return the rows that one healthy process gives for the same shard, less some samples."""
    write_shard(folder / "twin" / "shard.tar", {}, SAMPLES)
    source = WebDatasetSource(str(folder / "twin" / "*.tar"))
    (shard,) = source.shards()
    images, captions, _ = core.embed_shard(source, shard, Sums(), info.preprocess, READ, EMBED)
    keys = {f"{sample:04d}" for sample in without}
    return (
        [row for row in images.to_pylist() if row["key"] not in keys],
        [row for row in captions.drop_columns("image_row").to_pylist() if row["key"] not in keys],
    )


def check(tables, folder: Path, info: EncoderInfo, bad: dict[str, str]) -> None:
    images, captions, errors = tables
    expected_images, expected_captions = good_ones(folder, info, {int(key) for key in bad})
    assert images.to_pylist() == expected_images
    assert captions.drop_columns("image_row").to_pylist() == expected_captions
    owners = [images.column("key")[row].as_py() for row in captions.column("image_row").to_pylist()]
    assert owners == captions.column("key").to_pylist()
    assert {row["key"]: row["reason"] for row in errors.to_pylist()} == bad


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "twin").mkdir()
    return tmp_path


def test_a_healthy_shard_is_as_ever(folder: Path, info: EncoderInfo) -> None:
    write_shard(folder / "shard.tar", {})
    tables, (source, shard) = run(folder, info)
    for mine, theirs in zip(
        tables, core.embed_shard(source, shard, Sums(), info.preprocess, READ, EMBED), strict=True
    ):
        assert mine.equals(theirs, check_metadata=True)


def test_crash_hang_and_hunger_cost_themselves(folder: Path, info: EncoderInfo) -> None:
    assert SAMPLES > core.BLOCK_SAMPLES, (
        "one block only: nothing is taken over from a child that died"
    )
    write_shard(folder / "shard.tar", {3: "crash", 4: "crash", 270: "hang", 299: "eat"}, SAMPLES)
    tables, _ = run(folder, info, limits=Limits(seconds=4, memory_bytes=256 << 20))
    bad = {
        "0003": "crashed_process",
        "0004": "crashed_process",
        "0270": "timed_out",
        "0299": "out_of_memory",
    }
    check(tables, folder, info, bad)


def test_a_sample_that_kills_the_encoder_is_found(folder: Path, info: EncoderInfo) -> None:
    write_shard(folder / "shard.tar", {}, SAMPLES)
    tables, _ = run(folder, info, load=partial(Sums, "picture 21 of shard"))
    check(tables, folder, info, {"0021": "crashed_process"})


def test_what_is_not_the_data_is_raised(folder: Path, info: EncoderInfo) -> None:
    write_shard(folder / "shard.tar", {})
    with pytest.raises(RuntimeError, match="no such weights"):
        run(folder, info, load=broken)


def test_a_shard_that_is_gone(folder: Path, info: EncoderInfo) -> None:
    write_shard(folder / "shard.tar", {})
    source = WebDatasetSource(str(folder / "shard.tar"))
    (shard,) = source.shards()
    (folder / "shard.tar").unlink()
    with pytest.raises(SourceError, match="shard was listed but cannot be opened"):
        embed_isolated(Work(source, shard, info, Sums, READ, EMBED), PATIENT)


class Refused:
    """A source whose store refuses an object for good."""

    uri, validation = "refused", None

    def shards(self) -> list[Shard]:
        return [Shard("s", "s3://b/s.tar")]

    def read(self, shard: Shard) -> Iterator[Sample]:
        why = f"the object store fails at {shard.location} (HTTP status 403)"
        raise StorageError(f"{why}; the same command continues")


def test_a_shard_that_its_store_refuses(info: EncoderInfo) -> None:
    with pytest.raises(SourceError, match=r"cannot read shard s: the object store fails.*403\)$"):
        embed_isolated(Work(Refused(), Refused().shards()[0], info, Sums, READ, EMBED), PATIENT)


def test_a_shard_full_of_poison_is_given_up(folder: Path, info: EncoderInfo, monkeypatch) -> None:
    monkeypatch.setattr("pds_ray.distributed.isolated.MAX_REFUSED", 2)
    assert MAX_REFUSED >= 10
    write_shard(folder / "shard.tar", dict.fromkeys(range(5), "crash"), samples=6)
    with pytest.raises(SourceError, match="more than 2 samples of shard kill the process"):
        run(folder, info)

"""A shard whose disk fails while it is read; no Ray is started."""

from __future__ import annotations

import errno
import io
import tarfile
from collections.abc import Iterator

import pyarrow as pa
import pytest
from PIL import Image

from pds_ray.config import ReadConfig
from pds_ray.distributed import embed_workers
from pds_ray.distributed.embed_workers import ShardFile
from pds_ray.distributed.in_flight import InFlight
from pds_ray.encoders.base import EncoderInfo
from pds_ray.modalities.image import Preprocess
from pds_ray.sources import base
from pds_ray.sources.base import READ_RETRY_WAITS_S, Fault, Sample, Shard
from pds_ray.sources.webdataset import WebDatasetSource
from pds_ray.stages import embed as core
from pds_ray.store import calls
from pds_ray.store.storage import StorageError
from tests.support.object_store import BUCKET, Faults, client, proxy, uri


def shard_file(location: str) -> ShardFile:
    return ShardFile(Shard("s", location), changed=False)


class FailingSource:
    """Ten samples; the first reads fail, each after the given number of samples."""

    uri, validation = "failing", None

    def __init__(self, *failures: int) -> None:
        self.failures = list(failures)

    def shards(self) -> list[Shard]:
        return [Shard("s", "s")]

    def read(self, shard: Shard) -> Iterator[Sample | Fault]:
        fails_after = self.failures.pop(0) if self.failures else None
        for number in range(10):
            if number == fails_after:
                raise OSError(errno.EIO, "Input/output error")
            yield Sample(f"{shard.name}{number}", b"image", (f"caption {number}",))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Make blocks of three samples; return the waits between reads, which take no time here."""
    found: list[float] = []
    monkeypatch.setattr(core, "BLOCK_SAMPLES", 3)
    monkeypatch.setattr(base.time, "sleep", found.append)
    return found


def test_a_shard_is_read_again_and_no_sample_comes_twice(waits: list[float]) -> None:
    reader = embed_workers.ShardReader(FailingSource(4, 0, 8), shard_file("s"), InFlight())
    table = pa.concat_tables(list(reader()))
    assert table.column("key").to_pylist() == [*(f"s{number}" for number in range(10)), ""]
    assert table.column("ordinal").to_pylist() == list(range(11))
    assert len(waits) == 3


def test_a_disk_that_goes_on_failing_ends_the_shard(waits: list[float]) -> None:
    reader = embed_workers.ShardReader(
        FailingSource(*[5] * 99), shard_file("/data/s.tar"), InFlight()
    )
    rows = pa.concat_tables(list(reader())).to_pylist()
    assert [row["key"] for row in rows[:-1]] == ["s0", "s1", "s2"]
    assert (rows[-1]["shard"], rows[-1]["reason"]) == ("s", embed_workers.UNREADABLE)
    assert "Input/output error" in rows[-1]["detail"]
    assert len(waits) == len(READ_RETRY_WAITS_S)


def test_a_shard_is_decoded_where_it_is_read(waits: list[float]) -> None:
    """Block by block, as tasks of their own would; an error is the last row here, too."""
    info = EncoderInfo("none", 4, "none", "none", Preprocess(8), ())
    decoder = embed_workers.Decoder(info, ReadConfig(), 60.0, InFlight())
    for failures in ([], [5] * 99):
        raw, decoded = (
            list(reader())
            for reader in (
                embed_workers.ShardReader(
                    PictureSource(*failures), shard_file("s"), InFlight(), each
                )
                for each in (None, decoder)
            )
        )
        assert [embed_workers.decode(block, decoder) for block in raw] == decoded
        assert [block.num_rows for block in decoded][:1] == [3]
        assert len(decoded[0].column("image")[0].as_py()) == 8 * 8 * 3
    assert raw[-1].column("reason")[-1].as_py() == embed_workers.UNREADABLE
    assert waits


class PictureSource(FailingSource):
    """The samples with an image that can be decoded."""

    def read(self, shard: Shard) -> Iterator[Sample | Fault]:
        encoded = io.BytesIO()
        Image.new("RGB", (12, 12), "red").save(encoded, "PNG")
        for sample in super().read(shard):
            yield Sample(sample.key, encoded.getvalue(), sample.captions)


class BrokenSource(FailingSource):
    """A source with a bug."""

    def read(self, shard: Shard) -> Iterator[Sample | Fault]:
        raise ZeroDivisionError(f"{shard.name} by nothing")


def test_what_is_no_fault_of_the_shard_ends_the_run() -> None:
    (row,) = pa.concat_tables(
        list(embed_workers.ShardReader(BrokenSource(), shard_file("s"), InFlight())())
    ).to_pylist()
    assert (row["shard"], row["reason"], row["detail"]) == (
        "",
        embed_workers.FATAL,
        "ZeroDivisionError: s by nothing",
    )


class RefusedSource(FailingSource):
    """A source whose store refuses an object for good."""

    def read(self, shard: Shard) -> Iterator[Sample | Fault]:
        raise StorageError(f"the object store fails at {shard.location} (HTTP status 403)")


def test_an_object_that_is_refused_for_good_costs_its_shard(waits: list[float]) -> None:
    (row,) = pa.concat_tables(
        list(embed_workers.ShardReader(RefusedSource(), shard_file("s3://b/s.tar"), InFlight())())
    ).to_pylist()
    assert (row["shard"], row["reason"]) == ("s", embed_workers.UNREADABLE)
    assert "403" in row["detail"]
    assert waits == [], "the store was asked again where it is read"


@pytest.mark.usefixtures("s3_login")
def test_one_bad_object_of_a_store_costs_its_shard(
    s3_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "WAITS_S", ())
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name in ("k.jpg", "k.txt"):
            member = tarfile.TarInfo(name)
            member.size = 4
            tar.addfile(member, io.BytesIO(b"data"))
    for name in ("good", "bad"):
        client(s3_port).put_object(Bucket=BUCKET, Key=f"again/{name}.tar", Body=stream.getvalue())
    with proxy(s3_port, Faults(errors=1.0, only=r"bad\.tar")) as port:
        source = WebDatasetSource(uri(port, "again/*.tar"))
        read = {}
        for shard in source.shards():
            reader = embed_workers.ShardReader(source, ShardFile(shard, changed=False), InFlight())
            read[shard.name] = pa.concat_tables(list(reader())).to_pylist()
    assert [(row["key"], row["image"], row["reason"]) for row in read["good"]] == [
        ("k", b"data", None),
        ("", None, core.END),
    ]
    assert [(row["shard"], row["reason"]) for row in read["bad"]] == [
        ("bad", embed_workers.UNREADABLE)
    ]

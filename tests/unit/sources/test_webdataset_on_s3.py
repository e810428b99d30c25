"""Tar shards on an S3 server, through a network that fails: samples are as tarfile wrote them."""

from __future__ import annotations

import gzip
import io
import random
import tarfile
import traceback

import pytest

from pds_ray.sources.base import Fault, Sample, SourceError
from pds_ray.sources.webdataset import WebDatasetSource
from pds_ray.store import calls, storage
from tests.support.object_store import BUCKET, Faults, client, proxy, uri

pytestmark = pytest.mark.usefixtures("s3_login")


def make_shard(seed: int, samples: int) -> tuple[bytes, list[Sample]]:
    """A tar of pictures that are noise, a few megabytes, and what is in it."""
    draw, stream, written = random.Random(seed), io.BytesIO(), []
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for number in range(samples):
            sample = Sample(
                f"{seed}-{number:03d}",
                draw.randbytes(draw.randrange(1, 400_000)),
                (f"caption {number}",),
            )
            for suffix, data in (("jpg", sample.image), ("txt", sample.captions[0].encode())):
                member = tarfile.TarInfo(f"{sample.key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            written.append(sample)
    return stream.getvalue(), written


@pytest.fixture(scope="module")
def shards(s3_port: int) -> dict[str, list[Sample]]:
    """Samples by shard of what lies in the bucket, one shard compressed."""
    found = {}
    for seed in range(3):
        data, found[f"{seed:05d}"] = make_shard(seed, 15)
        name = f"tars/{seed:05d}.tar" + (".gz" if seed == 2 else "")
        client(s3_port).put_object(
            Bucket=BUCKET, Key=name, Body=gzip.compress(data) if seed == 2 else data
        )
    return found


@pytest.mark.long
def test_a_network_that_fails_costs_no_sample(
    s3_port: int, shards: dict[str, list[Sample]]
) -> None:
    faults = Faults(seed=3, errors=0.2, cut_downloads=0.4, delayed=0.1)
    with proxy(s3_port, faults) as port:
        source = WebDatasetSource(uri(port, "tars/**/*.tar*"))
        read = {shard.name: list(source.read(shard)) for shard in source.shards()}
    assert faults.struck > 5
    assert read == shards


def test_a_transfer_that_never_ends_well_is_no_truncated_shard(
    s3_port: int, shards: dict[str, list[Sample]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first half of each answer arrives, over and over: an error, not an end."""
    monkeypatch.setattr(calls, "WAITS_S", ())
    with proxy(s3_port, Faults(cut_downloads=1.0, only=r"\.tar")) as port:
        source = WebDatasetSource(uri(port, "tars/00000.tar"))
        (shard,) = source.shards()
        with pytest.raises(storage.StorageError, match=r"fails at s3://bucket/tars/00000\.tar"):
            list(source.read(shard))
    assert shards["00000"]


def test_a_shard_that_was_stored_cut_is_truncated(
    s3_port: int, shards: dict[str, list[Sample]]
) -> None:
    data, samples = make_shard(9, 4)
    client(s3_port).put_object(Bucket=BUCKET, Key="cut/0.tar", Body=data[: len(data) // 2])
    source = WebDatasetSource(uri(s3_port, "cut/0.tar"))
    (shard,) = source.shards()
    *whole, last = source.read(shard)
    assert whole == samples[: len(whole)]
    assert isinstance(last, Fault)
    assert last.reason == "truncated_shard"
    assert shards


def test_a_shard_that_goes_after_it_was_listed(
    s3_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "WAITS_S", (0.01,))
    client(s3_port).put_object(Bucket=BUCKET, Key="gone/0.tar", Body=b"x")
    source = WebDatasetSource(uri(s3_port, "gone/*.tar"))
    (shard,) = source.shards()
    client(s3_port).delete_object(Bucket=BUCKET, Key="gone/0.tar")
    assert [fault.reason for fault in source.read(shard) if isinstance(fault, Fault)] == [
        "missing_shard"
    ]


@pytest.mark.parametrize("place", ["nothing/*.tar", "gone", "a/{0..", "a b"])
def test_secrets_are_not_in_what_is_said_of_a_source(s3_port: int, place: str) -> None:
    location = uri(s3_port, place, "AKID:SE/CR3T@")
    with pytest.raises(SourceError) as caught:
        WebDatasetSource(location).shards()
    told = "".join(traceback.format_exception(caught.value)) + repr(WebDatasetSource(location))
    assert "AKID" not in told
    assert "CR3T" not in told

"""The end of an archive: zeros that close it, zeros that are a hole, and archives behind it."""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from pds_ray.sources.base import Fault
from pds_ray.sources.unpack import MAX_EXPANSION
from tests.support.hostile import END_MARK, brief, header, member, memory, read, read_bytes, sample

ONE, TWO = sample("a"), sample("b")
RECORD = tarfile.RECORDSIZE
MIB = 1 << 20


def zstd(data: bytes) -> bytes:
    return pa.compress(data, "zstd", asbytes=True)


PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}


def filled(data: bytes, record: int) -> bytes:
    """An archive with its end mark, filled up to a multiple of `record` bytes as tar does."""
    data += END_MARK
    return data + bytes(-len(data) % record)


@pytest.mark.parametrize("record", [512, RECORD, 64 * 512, 1 << 16, MIB])
def test_an_end_filled_up_to_a_record(tmp_path: Path, record: int) -> None:
    assert brief(read_bytes(tmp_path, filled(ONE, record))) == [("a", "")]


@pytest.mark.parametrize("end", [512, 1024, RECORD, RECORD + 512])
def test_archives_that_are_joined(tmp_path: Path, end: int) -> None:
    found = read_bytes(tmp_path, ONE + bytes(end) + TWO + END_MARK)
    assert brief(found) == [("a", ""), ("b", "")]
    again = read_bytes(tmp_path, ONE + bytes(end) + TWO + bytes(end) + ONE + END_MARK)
    assert brief(again) == [("a", ""), ("b", ""), ("a", "duplicate_key")]


@pytest.mark.parametrize("record", [512, RECORD, 64 * 512, 1 << 16, MIB])
def test_archives_of_any_record_that_are_joined(tmp_path: Path, record: int) -> None:
    found = read_bytes(tmp_path, filled(ONE, record) + filled(TWO, record))
    assert brief(found) == [("a", ""), ("b", "")]


@pytest.mark.parametrize("records", [2, 7, 1000])
def test_a_tail_of_zeros_is_a_hole(tmp_path: Path, records: int) -> None:
    whole = filled(ONE, RECORD)
    first, fault = read_bytes(tmp_path, whole + bytes(records * RECORD))
    assert (first.key, fault.key) == ("a", "")
    assert isinstance(fault, Fault)
    assert fault.reason == "truncated_shard"
    assert "bytes of zeros after the last file: a download that was not finished?" in fault.detail


def test_a_hole_between_samples(tmp_path: Path) -> None:
    found = read_bytes(tmp_path, ONE + bytes(3 * MIB) + TWO + END_MARK)
    assert brief(found) == [("a", ""), ("", "truncated_shard")]


def test_data_behind_an_end_that_is_no_archive(tmp_path: Path) -> None:
    first, fault = read_bytes(tmp_path, ONE + END_MARK + b"\xff" * 600)
    assert isinstance(fault, Fault)
    assert (first.key, fault.reason) == ("a", "truncated_shard")
    assert fault.detail == "1,024 bytes of zeros, and data behind them that begin no archive"


@pytest.mark.parametrize(
    ("zeros", "reasons"), [(RECORD, []), (2 * RECORD, ["not_a_tar"]), (64 * MIB, ["not_a_tar"])]
)
def test_files_of_zeros(tmp_path: Path, zeros: int, reasons: list[str]) -> None:
    """An empty tar is one record; a larger file was to hold something."""
    path = tmp_path / "x.tar"
    with path.open("wb") as file:
        file.truncate(zeros)
    with memory(8 * MIB):
        found = read(path)
    assert [reason for _, reason in brief(found)] == reasons


@pytest.mark.parametrize("pack", PACKERS.values(), ids=PACKERS)
def test_compressed_archives(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    packed = pack(filled(ONE, RECORD))
    assert brief(read_bytes(tmp_path, packed)) == [("a", "")]
    joined = packed + pack(filled(TWO, RECORD))
    assert brief(read_bytes(tmp_path, joined)) == [("a", ""), ("b", "")]
    for cut in (packed[:-3], packed[: len(packed) // 2]):
        assert [item for item in read_bytes(tmp_path, cut) if isinstance(item, Fault)]
    for damaged in (b"X" + joined[len(packed) + 1 :], b"<html>", pack(TWO)[:-3]):
        first, *_, last = brief(read_bytes(tmp_path, packed + damaged))
        assert (first, last[1]) == (("a", ""), "truncated_shard")


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
@pytest.mark.parametrize("zeros", [4, 10_000, 1 << 20])
def test_zeros_behind_a_compressed_stream(tmp_path: Path, kind: str, zeros: int) -> None:
    packed, joined = PACKERS[kind](filled(ONE, RECORD)), PACKERS[kind](filled(TWO, RECORD))
    assert brief(read_bytes(tmp_path, packed + bytes(zeros))) == [("a", "")]
    both = read_bytes(tmp_path, packed + bytes(zeros) + joined)
    assert brief(both) == [("a", ""), ("b", "")]


@pytest.mark.parametrize("pack", PACKERS.values(), ids=PACKERS)
def test_every_compression_is_cut_where_it_expands(
    tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    packed = pack(ONE + header("bad.bin", 1 << 40) + bytes(96 * MIB))
    with memory(24 * MIB):
        found = read_bytes(tmp_path, packed)
    assert isinstance(found[-1], Fault)
    assert found[-1].detail == f"expands to more than {MAX_EXPANSION} times its compressed size"


@pytest.mark.parametrize(
    ("begins", "kind"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html><h1>404</h1>", "an HTML or XML page"),
        (b"\n<?xml version='1.0'?><Error><Code>AccessDenied", "an HTML or XML page"),
        (b'{"error": "rate limit"}', "JSON"),
        (b"PK\3\4" + bytes(600), "a zip archive"),
    ],
)
def test_other_files_are_named(tmp_path: Path, begins: bytes, kind: str) -> None:
    (fault,) = read_bytes(tmp_path, begins)
    assert isinstance(fault, Fault)
    assert fault.reason == "not_a_tar"
    assert fault.detail.startswith(kind)


def test_a_member_of_zeros_is_no_end(tmp_path: Path) -> None:
    data = ONE + member("zeros.bin", bytes(2 * MIB)) + TWO + END_MARK
    assert [key for key, reason in brief(read_bytes(tmp_path, data)) if not reason] == ["a", "b"]

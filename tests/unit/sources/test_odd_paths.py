"""Shards under names that shells, URLs and editors of other systems make odd."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pds_ray.errors import UserError
from pds_ray.sources.base import SourceError
from pds_ray.sources.webdataset import WebDatasetSource
from pds_ray.store.storage import Folder, StorageError


@pytest.fixture
def drive(tmp_path: Path) -> Path:
    """Two folders with spaces in their names, and one whose name begins as theirs."""
    for name in ("My Drive/000.tar", "My Drive/001.tar", "My Drive/a b/002.tar", "x y/3 4.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "plain.tar").write_bytes(b"")
    return tmp_path


def found(drive: Path, uri: str) -> list[str]:
    shards = WebDatasetSource(uri.replace("ROOT", str(drive))).shards()
    return [os.path.relpath(shard.location, drive) for shard in shards]


@pytest.mark.parametrize(
    ("uri", "names"),
    [
        ("ROOT/My Drive/000.tar", ["My Drive/000.tar"]),
        ("ROOT/My Drive/*.tar", ["My Drive/000.tar", "My Drive/001.tar"]),
        ("ROOT/My Drive/{000..001}.tar", ["My Drive/000.tar", "My Drive/001.tar"]),
        ("ROOT/My Drive/a b/0*.tar", ["My Drive/a b/002.tar"]),
        ("ROOT/{My Drive,x y}/*.tar", ["My Drive/000.tar", "My Drive/001.tar", "x y/3 4.tar"]),
        ("file://ROOT/My Drive/*.tar", ["My Drive/000.tar", "My Drive/001.tar"]),
        ("ROOT/My Drive/000.tar::ROOT/x y/*.tar", ["My Drive/000.tar", "x y/3 4.tar"]),
        (" ROOT/x y/*.tar :: ROOT/plain.tar ", ["plain.tar", "x y/3 4.tar"]),
        # white space separates what matches nothing as a whole
        ("ROOT/plain.tar ROOT/x*/*.tar", ["plain.tar", "x y/3 4.tar"]),
        ("ROOT/plain.tar\n  ROOT/My*/0*1.tar\n", ["My Drive/001.tar", "plain.tar"]),
        (
            "ROOT/plain.tar ROOT/My*/0*0.tar::ROOT/x y/*",
            ["My Drive/000.tar", "plain.tar", "x y/3 4.tar"],
        ),
    ],
)
def test_spaces(drive: Path, uri: str, names: list[str]) -> None:
    assert found(drive, uri) == names


def test_many_patterns_by_spaces_are_no_name(drive: Path) -> None:
    """Together they are longer than any path may be."""
    assert found(drive, " ".join(["ROOT/plain.tar"] * 500)) == ["plain.tar"]


@pytest.mark.parametrize(
    ("uri", "is_split"),
    [("ROOT/No Drive/*.tar", True), ("ROOT/no/{0..1}.tar", False), ("ROOT/a::ROOT/b c", False)],
)
def test_a_name_that_was_split_at_its_spaces_is_not_there(
    drive: Path, uri: str, is_split: bool
) -> None:
    with pytest.raises(SourceError, match="shard patterns match nothing") as caught:
        found(drive, uri)
    said = str(caught.value).endswith("; spaces separate patterns, as no file matches the whole")
    assert said == is_split


@pytest.mark.parametrize(
    ("url", "names"),
    [
        ("file://ROOT/My%20Drive/000.tar", ["My Drive/000.tar"]),
        ("file://localhostROOT/x%20y/3%204.tar", ["x y/3 4.tar"]),
        ("file://ROOT/M%79%20Drive/*.tar", ["My Drive/000.tar", "My Drive/001.tar"]),
    ],
)
def test_file_urls_are_decoded(drive: Path, url: str, names: list[str]) -> None:
    assert found(drive, url) == names


def test_a_run_folder_by_a_file_url(tmp_path: Path) -> None:
    assert Folder(f"file://{tmp_path}/a%20b/%C3%BC").path == f"{tmp_path}/a b/ü"
    assert Folder(f"{tmp_path}/a%20b").path == f"{tmp_path}/a%20b", "a path is no URL"
    with pytest.raises(StorageError, match="names the host elsewhere"):
        Folder("file://elsewhere/run")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_lists_of_other_systems(drive: Path, encoding: str, newline: str) -> None:
    lines = ["# shards", "", "My Drive/000.tar  ", "x y/3 4.tar", "plain.tar", ""]
    (drive / "my list.txt").write_bytes(newline.join(lines).encode(encoding))
    assert found(drive, "@ROOT/my list.txt") == ["My Drive/000.tar", "plain.tar", "x y/3 4.tar"]


def test_names_that_are_not_utf_8(drive: Path) -> None:
    """Beside others they are no matter; among those asked for they are named."""
    odd = os.fsencode(drive) + b"/\xff.tar"
    Path(os.fsdecode(odd)).write_bytes(b"")
    assert found(drive, "ROOT/pl*.tar") == ["plain.tar"]
    with pytest.raises(SourceError, match=r"\\xff\.tar' is not UTF-8; rename it$") as raised:
        found(drive, "ROOT/*.tar")
    assert str(raised.value).isascii()
    with pytest.raises(UserError, match="is not UTF-8; rename it"):
        found(drive, os.fsdecode(odd))
    with pytest.raises(StorageError, match="is not UTF-8; rename it"):
        Folder(os.fsdecode(odd))

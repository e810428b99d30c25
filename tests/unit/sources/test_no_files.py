"""Names that a pattern takes for shards and that are no files: shards that cannot be read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pds_ray.config import FilesConfig
from pds_ray.sources.base import Fault, SourceError, read_shard
from pds_ray.sources.parquet_rows import RowReader
from pds_ray.sources.webdataset import WebDatasetSource
from tests.support.poisoned import write_shard


@pytest.mark.parametrize("pattern", ["*.tar", "**/*.tar"])
def test_dangling_links_and_folders_are_shards_that_cannot_be_read(
    tmp_path: Path, pattern: str
) -> None:
    write_shard(tmp_path / "good.tar", {}, samples=1)
    (tmp_path / "link.tar").symlink_to("nowhere.tar")
    (tmp_path / "folder.tar").mkdir()
    (tmp_path / "circle.tar").symlink_to("circle.tar")
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "link.txt").symlink_to("nowhere.txt")
    source = WebDatasetSource(f"{tmp_path}/{pattern}")
    shards = {shard.name: shard for shard in source.shards()}
    assert shards.keys() == {"good", "link", "folder", "circle", "pipe"}
    assert not any(isinstance(item, Fault) for item in source.read(shards["good"]))
    for name, why in (
        ("link", "No such file"),
        ("folder", "it is a folder"),
        ("circle", "Too many levels of symbolic links"),
        ("pipe", "it is a pipe or a device, not a file"),
    ):
        with pytest.raises(SourceError, match=f"shard {name} was listed but .*{why}"):
            list(read_shard(source, shards[name]))


def test_a_link_in_a_brace_range_is_a_shard_and_a_link_to_a_file_is_that_file(
    tmp_path: Path,
) -> None:
    write_shard(tmp_path / "0.tar", {}, samples=1)
    (tmp_path / "1.tar").symlink_to("nowhere.tar")
    (tmp_path / "2.tar").symlink_to("0.tar")
    zero, one, two = WebDatasetSource(f"{tmp_path}/{{0..2}}.tar").shards()
    assert (zero.size, one.size, two.size) == (zero.size, 0, zero.size)


def test_a_pipe_is_no_parquet_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.parquet")
    (fault,) = RowReader(FilesConfig(), 1).read(f"{tmp_path}/a.parquet")
    assert fault == Fault("", "missing_shard", "it is a pipe or a device, not a file")


def test_a_pipe_that_is_named_itself_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(SourceError, match=r"pipe\.tar is not a tar shard \(\.tar, "):
        WebDatasetSource(f"{tmp_path}/pipe.tar").shards()


def test_a_list_is_no_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "list")
    with pytest.raises(SourceError, match=r"cannot read the shard list .*: .*it is a pipe"):
        WebDatasetSource(f"@{tmp_path}/list").shards()


def test_a_folder_that_is_named_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.tar").mkdir()
    with pytest.raises(SourceError, match=r"is a folder; name the shards in it"):
        WebDatasetSource(f"{tmp_path}/folder.tar").shards()

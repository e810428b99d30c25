"""Stores that fsspec knows: folders on them, what they lack, and who names the missing package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs
import pytest
from huggingface_hub import HfFileSystem, constants

from pds_ray.sources.base import MissingShardsError, SourceError
from pds_ray.sources.listing import open_shard
from pds_ray.sources.shard_patterns import find_shards
from pds_ray.sources.webdataset import WebDatasetSource
from pds_ray.store import calls, filesystems
from pds_ray.store.filesystems import open_filesystem
from pds_ray.store.storage import Folder, StorageError
from tests.support.hub import TOKEN, running_hub

FILES = {"data/00000.tar": bytes(range(256)) * 9000, "data/00001.tar": b"b", "README.md": b"r"}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(calls, "WAITS_S", (0.01,) * 3)
    filesystems._open_root.cache_clear()
    yield
    filesystems._open_root.cache_clear()


@pytest.mark.parametrize("scheme", ["memory", "local"])
def test_a_folder_on_a_store_of_fsspec(tmp_path: Path, scheme: str) -> None:
    folder = Folder(f"{scheme}://{tmp_path}/my run")
    folder.create()
    assert folder.names() == []
    folder.write_bytes("a/one", b"1")
    folder.write_table("t.parquet", pa.table({"n": [1, 2]}))
    with fsspec.open(f"{scheme}://{tmp_path}/my run/a/one") as file:  # as fsspec itself sees it
        assert file.read() == b"1"
    assert folder.names() == ["t.parquet"]
    assert (folder / "a").names() == ["one"]
    assert folder.exists("a/one")
    assert not folder.exists("a/two")
    assert folder.read_table("t.parquet", ["n"]).to_pydict() == {"n": [1, 2]}
    folder.write_bytes("a/one", b"22")
    assert folder.read_bytes("a/one") == b"22"
    with pytest.raises(FileNotFoundError):
        folder.read_bytes("a/two")
    folder.delete("a/one")
    folder.delete("a/one")
    assert (folder / "a").names() == []
    folder.delete_all()
    folder.delete_all()
    assert folder.names() == []


def test_versions_tell_files_of_one_size_apart(tmp_path: Path) -> None:
    def version() -> Any:
        found, _ = find_shards(f"local://{tmp_path}/*.tar")
        return [info.mtime_ns for info in found.values()]

    (tmp_path / "a.tar").write_bytes(b"1")
    before = version()
    assert before == version()
    (tmp_path / "a.tar").write_bytes(b"2")
    assert before != version()


class Failing:
    """A file system of fsspec whose client has errors of its own."""

    protocol = "failing"

    def __init__(self, error: Exception) -> None:
        self.error = error

    def invalidate_cache(self, path: str) -> None:
        pass

    def _fail(self, *_: Any, **__: Any) -> None:
        raise self.error

    info = ls = open = isfile = isdir = exists = find = _fail


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("the client's own"), r"the object store fails at x://b/y \(the client's own"),
        (ValueError("no such option"), "no such option"),
        (OSError("reset by peer"), r"the object store fails at x://b/y \(reset by peer\)"),
    ],
)
def test_a_store_that_fails_is_no_empty_store(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    handler = filesystems._Handler(filesystems._OneKindOfError(Failing(error)))
    monkeypatch.setattr(filesystems, "_open_fsspec", lambda *_: (pafs.PyFileSystem(handler), "b"))
    folder = Folder("x://b/y")
    for ask in (folder.names, lambda: folder.exists("z"), lambda: folder.read_bytes("z")):
        with pytest.raises(StorageError, match=message):
            ask()


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("az://container/x.tar", "cannot open az://container/: Install adlfs"),
        ("oci://bucket@space/x.tar", "cannot open oci://bucket@space/: Install ocifs"),
        ("sftp://host/x.tar", "paramiko"),
        ("nosuch://bucket/x.tar", "cannot open nosuch://bucket/: Protocol not known: nosuch"),
    ],
)
def test_what_is_not_installed_is_named(uri: str, message: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        WebDatasetSource(uri).shards()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("uri", ["https://host/run", "http://host/run", "hf://datasets/o/n/run"])
def test_where_no_run_can_be_kept(uri: str) -> None:
    with pytest.raises(StorageError, match=f"^{uri} cannot be a folder of results: "):
        Folder(uri)


def test_settings_of_a_store_stay_and_limits_are_added() -> None:
    filesystem, path = open_filesystem("s3://K:S%2Fx@b/a b%20?region=eu-west-1&scheme=http")
    assert path == "b/a b%20"
    options = filesystem.__reduce__()[1][0]
    assert (options["region"], options["scheme"]) == ("eu-west-1", "http")
    assert (options["access_key"], options["secret_key"]) == ("K", "S/x")
    assert (options["connect_timeout"], options["request_timeout"]) == (5, 10)
    filesystem, path = open_filesystem("gs://b/x?endpoint_override=h:1")
    options = filesystem.__reduce__()[1][0]
    assert options["endpoint_override"] == "h:1"
    assert options["retry_time_limit"].total_seconds() == filesystems.GCS_RETRY_S


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A hub with a private data set; yields the setting that leads there."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    HfFileSystem.clear_instance_cache()
    with running_hub() as hub:
        hub.create("org/name", private=True, **FILES)
        yield f"?endpoint={hub.url}"
    HfFileSystem.clear_instance_cache()


@pytest.mark.parametrize("revision", ["", "@main"])
def test_shards_of_a_data_set_of_the_hub(endpoint: str, revision: str) -> None:
    found, _ = find_shards(f"hf://datasets/org/name{revision}/**{endpoint}")
    names = [f"hf://datasets/org/name{revision}/data/0000{n}.tar{endpoint}" for n in (0, 1)]
    assert list(found) == names
    for place, name in zip(names, FILES, strict=False):
        assert found[place].size == len(FILES[name])
        assert found[place].mtime_ns
        with open_shard(place) as stream:
            assert stream.read() == FILES[name]


def test_gaps_of_a_data_set_of_the_hub(endpoint: str) -> None:
    with pytest.raises(MissingShardsError, match=r"^1 of 3 .* the first is \S+/00002\.tar"):
        WebDatasetSource(f"hf://datasets/org/name/data/{{00000..00002}}.tar{endpoint}").shards()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("org/none/*.tar", r"^no tar shard matches .*; a private data set needs HF_TOKEN\)$"),
        ("name/*.tar", "^cannot look for .* Repository id must be 'namespace/name'"),
    ],
)
def test_a_data_set_that_is_not_there(endpoint: str, path: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        WebDatasetSource(f"hf://datasets/{path}{endpoint}").shards()


def test_without_the_token_it_is_said_at_once(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "wrong")
    monkeypatch.setattr(calls.time, "sleep", lambda _: pytest.fail("asked again"))
    with pytest.raises(SourceError, match=r"401 Unauthorized.* check its address and state and"):
        WebDatasetSource(f"hf://datasets/org/name/*.tar{endpoint}").shards()

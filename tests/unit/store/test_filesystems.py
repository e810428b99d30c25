"""Stores that fsspec knows: folders on them, what they lack, and who names the missing package."""

from __future__ import annotations

import gc
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem
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
    handler = filesystems._Handler(filesystems._OnlyOSErrors(Failing(error)))
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


class Upload(AbstractBufferedFile):
    """An upload in pieces of a mebibyte; a second piece fails while its store says so."""

    def _initiate_upload(self) -> None:
        self.pieces: list[bytes] = []
        self.fs.begun += 1

    def _upload_chunk(self, final: bool = False) -> None:
        if self.fs.failing and len(self.pieces) == 1:
            raise OSError("reset by peer")
        self.pieces.append(self.buffer.getvalue())
        if final:
            self.fs.objects[self.path] = b"".join(self.pieces)

    def discard(self) -> None:
        self.fs.discarded += 1


class Objects(AbstractFileSystem):
    """A store whose objects appear when their upload is completed."""

    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.objects: dict[str, bytes] = {}
        self.failing, self.begun, self.discarded = False, 0, 0

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Upload:
        size = len(self.objects.get(path, b""))
        return Upload(self, path, mode, block_size=2**20, size=size)

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        if path not in self.objects:
            raise FileNotFoundError(path)
        return {"name": path, "size": len(self.objects[path]), "type": "file"}

    def _rm(self, path: str) -> None:
        del self.objects[path]


def use(monkeypatch: pytest.MonkeyPatch, store: AbstractFileSystem, root: str) -> None:
    """Have the file system of fsspec be the one of all addresses."""
    handler = filesystems._Handler(filesystems._OnlyOSErrors(store))
    monkeypatch.setattr(filesystems, "_open_fsspec", lambda *_: (pafs.PyFileSystem(handler), root))


def test_an_upload_that_fails_publishes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffered file of fsspec completes its upload when it is closed, whatever has failed."""
    store = Objects()
    use(monkeypatch, store, "b")
    old, new = os.urandom(3 * 2**20), os.urandom(5 * 2**20)
    folder = Folder("az://b/run")
    folder.write_bytes("old.bin", old)
    store.failing = True
    for name in ("old.bin", "new.bin"):
        with pytest.raises(StorageError, match="the object store fails at az://b/run"):
            folder.write_bytes(name, new)
    gc.collect()  # such a file is closed when nobody holds it any more
    assert store.objects == {"b/run/old.bin": old}
    assert store.begun == 1 + store.discarded == 1 + 2 * 4
    store.failing = False
    folder.write_bytes("old.bin", new)
    assert store.objects == {"b/run/old.bin": new}


class Disk(LocalFileSystem):
    """A server's disk: a file is there from when it is opened. `mv` is called as SFTP's is."""

    cachable = False
    replaces = "yes"

    def mv(self, old: str, new: str) -> None:
        if os.path.exists(new) and self.replaces != "yes":
            if self.replaces == "error":  # smb
                raise FileExistsError(new)
            return  # webhdfs
        os.replace(old, new)


@pytest.mark.parametrize("scheme", ["sftp", "webhdfs", "smb", "ftp", "dbfs", "oss", "unheard-of"])
def test_a_file_is_seen_when_it_is_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, scheme: str
) -> None:
    use(monkeypatch, Disk(), str(tmp_path))
    folder = Folder(f"{scheme}://host/run")
    folder.create()
    seen = []
    copy = shutil.copyfileobj

    def watched(source: Any, target: Any, length: int) -> None:
        copy(source, target, length)
        target.flush()
        seen.append(sorted(os.listdir(tmp_path / "run")))

    monkeypatch.setattr(shutil, "copyfileobj", watched)
    folder.write_bytes("x", b"1")
    assert [[re.sub(r"[0-9a-f]{8}", "#", name) for name in names] for names in seen] == [
        ["x.#.part"]
    ]
    assert os.listdir(tmp_path / "run") == ["x"]


@pytest.mark.parametrize("replaces", ["yes", "error", "silence"])
def test_a_file_is_replaced_by_a_move(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, replaces: str
) -> None:
    store = Disk()
    store.replaces = replaces
    use(monkeypatch, store, str(tmp_path))
    folder = Folder("sftp://host/run")
    for data in (b"one", b"two", b"three"):
        folder.write_bytes("deep/x", data)
        assert (tmp_path / "run/deep/x").read_bytes() == data
    assert os.listdir(tmp_path / "run/deep") == ["x"]


@pytest.mark.parametrize("error", [OSError("reset"), PermissionError("no"), TimeoutError()])
@pytest.mark.parametrize("moves", [0, 1])
def test_a_move_that_fails_leaves_what_was_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: OSError, moves: int
) -> None:
    """Neither the move onto the old file nor the one in its place succeeds, in any try."""
    use(monkeypatch, Disk(), str(tmp_path))
    folder = Folder("sftp://host/run")
    folder.write_bytes("x", b"old")
    move, done = Disk.mv, []

    def failing(self: Disk, old: str, new: str) -> None:
        if old.endswith(".part"):
            raise error
        done.append(new)
        if len(done) > moves and not old.endswith(".old"):
            raise error
        move(self, old, new)

    monkeypatch.setattr(Disk, "mv", failing)
    for name in ("x", "y"):
        with pytest.raises((StorageError, PermissionError)):
            folder.write_bytes(name, b"new")
    assert len(done) > moves
    assert os.listdir(tmp_path / "run") == ["x"]
    assert folder.read_bytes("x") == b"old"


def test_a_move_that_silently_does_nothing_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use(monkeypatch, Disk(), str(tmp_path))
    monkeypatch.setattr(Disk, "mv", lambda *_: None)
    with pytest.raises(StorageError, match="run/x was not moved to its place"):
        Folder("webhdfs://host/run").write_bytes("x", b"new")
    assert os.listdir(tmp_path / "run") == []


def test_a_move_that_silently_loses_the_file_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use(monkeypatch, Disk(), str(tmp_path))
    folder = Folder("webhdfs://host/run")
    folder.write_bytes("x", b"old")
    monkeypatch.setattr(Disk, "mv", lambda _self, old, _new: os.unlink(old))
    for name in ("x", "y"):
        with pytest.raises(StorageError, match=f"{name}: 10 bytes were written, [03] are there"):
            folder.write_bytes(name, bytes(10))
    assert folder.read_bytes("x") == b"old"


@pytest.mark.parametrize("error", [NotImplementedError, NotImplementedError("Move()")])
def test_a_store_that_moves_nothing_is_written_in_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: type | Exception
) -> None:
    def refused(*_: Any) -> None:
        raise error

    monkeypatch.setattr(Disk, "mv", refused)
    use(monkeypatch, Disk(), str(tmp_path))
    folder = Folder("unheard-of://host/run")
    for data in (b"one", b"three"):
        folder.write_bytes("x", data)
        assert (tmp_path / "run/x").read_bytes() == data
    assert os.listdir(tmp_path / "run") == ["x"]


KILLED = """
import os, shutil
from pds_ray.store.storage import Folder

def killed(source, target, length):
    target.write(source.read(2**20))
    target.flush()
    os._exit(9)

folder = Folder("local://{place}")
folder.write_bytes("images/old", b"old")
shutil.copyfileobj = killed
folder.write_bytes("images/{name}", bytes(2**21))
"""


@pytest.mark.parametrize("name", ["old", "new"])
def test_a_writer_that_is_killed_leaves_no_part_of_a_file(tmp_path: Path, name: str) -> None:
    script = KILLED.format(place=tmp_path, name=name)
    ended = subprocess.run([sys.executable, "-c", script], check=False)
    assert ended.returncode == 9
    images = tmp_path / "images"
    assert (images / "old").read_bytes() == b"old"
    assert not (images / "new").exists()
    left = set(os.listdir(images)) - {"old"}
    assert [len((images / each).read_bytes()) for each in left] == [2**20]


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

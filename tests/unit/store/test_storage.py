"""Folders, whose writes are atomic."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import os
import pickle
import signal
import subprocess
import threading
import time

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from pds_ray.cli import main as cli
from pds_ray.store import calls, heartbeat, storage
from pds_ray.store.calls import CALLS_AT_ONCE
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.storage import (
    PART_SUFFIX,
    Folder,
    StorageError,
    is_remote,
    open_filesystem,
    side_by_side,
    with_retries,
)

LEFT = f"x.0123abcd{PART_SUFFIX}"
"""The name of a temporary file that a killed writer left."""


@pytest.fixture(params=["local", "object store"])
def folder(request, tmp_path, monkeypatch):
    """A folder on disk, and one on an object store, for which a sub-tree of the disk stands in."""
    if request.param == "local":
        return Folder(str(tmp_path))
    monkeypatch.setattr(calls, "WAITS_S", (0.01,))
    bucket = pafs.SubTreeFileSystem(str(tmp_path.parent), pafs.LocalFileSystem())
    monkeypatch.setattr(
        storage, "open_filesystem", lambda path: (bucket, path.removeprefix("s3://bucket/"))
    )
    return Folder(f"s3://bucket/{tmp_path.name}")


def write_and_fail(folder, name, error):
    with folder.writer(name) as stream:
        stream.write(b"half")
        raise error


def files(path):
    return sorted(str(item.relative_to(path)) for item in path.rglob("*") if item.is_file())


def test_a_file_is_written_read_and_deleted(folder, tmp_path):
    sub = folder / "a" / "b"
    sub.create()
    sub.write_bytes("x.bin", b"\x00one")
    assert files(tmp_path) == ["a/b/x.bin"]
    assert sub.exists("x.bin")
    assert sub.read_bytes("x.bin") == b"\x00one"
    sub.write_bytes("x.bin", b"two")
    assert sub.read_bytes("x.bin") == b"two"
    sub.delete("x.bin")
    sub.delete("x.bin")
    assert not sub.exists("x.bin")
    (folder / "a").delete_all()
    (folder / "a").delete_all()
    assert files(tmp_path) == []


def test_a_writer_that_fails_leaves_nothing(folder, tmp_path):
    folder.create()
    with pytest.raises(ZeroDivisionError):
        write_and_fail(folder, "x", ZeroDivisionError())
    assert files(tmp_path) == []


def test_a_writer_that_fails_keeps_what_was_there(folder, tmp_path):
    folder.create()
    folder.write_bytes("x", b"old")
    with pytest.raises(KeyboardInterrupt):
        write_and_fail(folder, "x", KeyboardInterrupt())
    assert folder.read_bytes("x") == b"old"
    assert files(tmp_path) == ["x"]


def test_nothing_is_seen_before_the_end(folder):
    folder.create()
    with folder.writer("x.json") as stream:
        stream.write(b"{}")
        stream.flush()
        assert not folder.exists("x.json")
        assert folder.names(".json") == []
    assert folder.names(".json") == ["x.json"]


def test_sweep_removes_what_a_killed_writer_left(tmp_path):
    folder = Folder(str(tmp_path))
    folder.write_bytes("good", b"1")
    stuck = folder.writer("bad")
    stuck.__enter__().write(b"never finished")
    assert [name for name in folder.names() if name.endswith(PART_SUFFIX)]
    folder.sweep()
    assert folder.names() == ["good"]


def test_sweep_takes_only_what_is_ours(tmp_path):
    """Browsers, curl and torrent programs call unfinished downloads so as well."""
    folder = Folder(str(tmp_path))
    foreign = ["film.mkv.part", "00012.tar.part", "x.0123ABCD.part", "y.0123abcde.part", ".part"]
    for name in (*foreign, LEFT):
        (folder / "sub").write_bytes(name, b"")
    folder.sweep()
    assert files(tmp_path) == sorted(f"sub/{name}" for name in foreign)


@pytest.mark.parametrize(
    ("number", "said"), [(errno.EAGAIN, "another run"), (errno.ENOLCK, "cannot be locked")]
)
def test_a_lock_that_is_taken_is_not_one_that_cannot_be_had(tmp_path, monkeypatch, number, said):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(StorageError, match=said), Folder(str(tmp_path)).lock():
        pass


def test_the_lock_of_another_user_is_one_line(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(StorageError, match="another user"), Folder(str(tmp_path)).lock():
        pass


@pytest.mark.parametrize(
    "number", [errno.EFBIG, errno.ESTALE, errno.ENOTCONN, errno.ENOTSUP, errno.EINVAL]
)
def test_what_a_mounted_disk_refuses_is_one_line(tmp_path, monkeypatch, number):
    """FAT has no file of 4 GiB, some FUSE file systems no flush, a server may be gone."""

    def refuse(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError, match=f"^cannot write .*x: {os.strerror(number)}$"):
        Folder(str(tmp_path)).write_bytes("x", b"1")
    assert files(tmp_path) == []


def test_sweep_spares_a_folder_that_has_a_lock_of_its_own(tmp_path):
    folder = Folder(str(tmp_path))
    for place in ("embeddings", "embeddings/parts", "images", "images/embeddings"):
        (folder / place).write_bytes(LEFT, b"")
    folder.sweep(spare="embeddings")
    assert files(tmp_path) == [f"embeddings/parts/{LEFT}", f"embeddings/{LEFT}"]
    folder.sweep()
    assert files(tmp_path) == []


def test_sweep_and_writers_that_finish_meanwhile(tmp_path):
    """Orphans of a killed driver rename their parts meanwhile; no finished file is lost."""
    folder, finished, ended = Folder(str(tmp_path)), set(), threading.Event()

    def write():
        for number in itertools.count():
            with contextlib.suppress(FileNotFoundError):  # their part was taken
                folder.write_bytes(f"{number % 50}", b"whole")
                finished.add(f"{number % 50}")
            if ended.is_set():
                return

    writer = threading.Thread(target=write)
    writer.start()
    deadline = time.monotonic() + 1
    try:
        while time.monotonic() < deadline:
            folder.sweep()
            time.sleep(0.001)
    finally:
        ended.set()
        writer.join()
    assert {name for name in folder.names() if not name.endswith(PART_SUFFIX)} == finished
    assert all((tmp_path / name).read_bytes() == b"whole" for name in finished)


@pytest.fixture
def disk(tmp_path):
    """A disk of its own, and what makes it read-only."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"cannot mount a disk: {made.stderr.strip()}")
    yield disk, lambda: subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_read_only_disk_is_one_line_whatever_is_done(disk):
    path, close = disk
    folder = Folder(str(path))
    (folder / "sub").write_bytes("x", b"1")
    folder.write_bytes(LEFT, b"")
    close()

    def locked():
        with folder.lock():
            pass

    for action in (
        lambda: folder.write_bytes("x", b"2"),
        lambda: folder.write_json("new/y", {}),
        folder.create,
        folder.sweep,
        locked,
        (folder / "sub").delete_all,
        lambda: (folder / "sub").delete("x"),
        (folder / "new").create,
    ):
        with pytest.raises(
            StorageError, match=f"^cannot .*{path}.*: Read-only file system$"
        ) as caught:
            action()
        assert "write-test" not in str(caught.value), "a file that nobody knows"
    assert (folder / "sub").read_bytes("x") == b"1"


def test_a_run_whose_disk_becomes_read_only_ends_in_the_line_that_says_so(disk, capsys):
    path, close = disk
    run = RunFolder(Folder(str(path)))

    def work():
        with heartbeat.beating(run):
            while heartbeat.read(run) is None:
                time.sleep(0.01)
            close()
            run.folder.write_json("result", {})

    with pytest.raises(StorageError, match=r"cannot write .*result: Read-only file system"):
        work()
    assert "cannot follow this run" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["distill"], ["distill", "--redo"]])
def test_a_read_only_run_folder_ends_the_command_in_one_line(disk, command, capsys):
    path, close = disk
    (path / "run").mkdir()
    close()
    small = ["--source", "scenes:20", "--pairs", "2", "--decoder", "nearest", "--preset", "demo"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, *small, "--out", str(path / "run")])
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip()
    assert said == f"pds-ray: cannot write to {path / 'run'}: Read-only file system"


@pytest.mark.usefixtures("interruptible")
def test_a_trial_that_was_killed_is_taken_away_by_the_next(folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "delete", lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            folder.create()
    assert len(files(tmp_path)) == 1
    folder.create()
    assert files(tmp_path) == []


def test_a_folder_that_is_a_link_is_emptied_and_stays_one(tmp_path):
    """People link the large folders of a run to another disk."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    folder = Folder(str(tmp_path / "link"))
    (folder / "sub").write_bytes("x", b"1")
    folder.delete_all()
    assert (tmp_path / "link").is_symlink()
    assert list((tmp_path / "disk").iterdir()) == []


def test_an_empty_folder(folder):
    assert (folder / "not there").is_empty()
    (folder / "sub").create()
    assert (folder / "sub").is_empty()
    (folder / "sub" / "deep").create()
    assert not (folder / "sub").is_empty()


def test_names_are_sorted_files_of_this_folder(folder):
    folder.create()
    for name in ("b.json", "a.json", "c.txt"):
        folder.write_bytes(name, b"")
    (folder / "sub.json").create()
    (folder / "sub.json").write_bytes("deep.json", b"")
    assert folder.names(".json") == ["a.json", "b.json"]
    assert folder.names() == ["a.json", "b.json", "c.txt"]
    assert (folder / "not there").names() == []


def test_a_missing_file(folder):
    folder.create()
    assert not folder.exists("x")
    with pytest.raises(FileNotFoundError):
        folder.read_bytes("x")


@pytest.mark.parametrize("below", ["file", "file/deeper"])
def test_an_unwritable_place_is_one_line(tmp_path, below):
    """Below a regular file nothing can be made, whoever asks (root may write anywhere else)."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError) as caught:
        Folder(str(tmp_path / below)).create()
    message = str(caught.value)
    assert str(tmp_path / below) in message
    assert "\n" not in message


def test_create_leaves_no_trace_and_may_be_repeated(folder, tmp_path):
    (folder / "run").create()
    (folder / "run").create()
    assert files(tmp_path) == []


def test_json_keeps_text(folder):
    folder.create()
    value = {"b": [1, 2.5, None, True], "a": "Zoë\u2028 ☃"}
    folder.write_json("x.json", value)
    assert folder.read_json("x.json") == value
    assert "Zoë".encode() in folder.read_bytes("x.json")


def test_tables(folder):
    folder.create()
    table = pa.table(
        {"n": pa.array([3, None, 1], pa.int32()), "s": ["a", "b", "ü"], "f": [1.5, 2.5, -0.0]}
    )
    digest = folder.write_table("t.parquet", table)
    data = folder.read_bytes("t.parquet")
    assert digest == hashlib.sha256(data).hexdigest()
    assert folder.read_table("t.parquet").equals(table)
    assert folder.read_table("t.parquet", ["s"]).equals(table.select(["s"]))
    assert pq.read_table(pa.BufferReader(data)).equals(table)
    assert folder.write_table("u.parquet", table) == digest  # the same rows are the same bytes


def test_a_folder_named_like_a_partition_adds_no_column(tmp_path):
    folder = Folder(str(tmp_path)) / "k=100"
    folder.write_table("t.parquet", pa.table({"n": [1]}))
    assert folder.read_table("t.parquet").column_names == ["n"]


def test_names_in_full():
    here = os.getcwd()
    assert (
        Folder("runs/x/").full("a") == Folder("runs/x").full("a") == f"{here}/runs/x/a"
    )  # workers run elsewhere
    assert (Folder("s3://b/x") / "y").full("a") == "s3://b/x/y/a"


@pytest.mark.parametrize(
    ("path", "remote"),
    [("s3://b/x", True), ("gs://b", True), ("/x", False), ("x/y", False), ("file:///x", False)],
)
def test_what_is_remote(path, remote):
    assert is_remote(path) == remote


def test_file_uris_and_home(tmp_path, monkeypatch):
    Folder(f"file://{tmp_path}").write_bytes("x", b"1")
    assert (tmp_path / "x").read_bytes() == b"1"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Folder("~").exists("x")


def test_an_unknown_scheme_is_one_line():
    with pytest.raises(StorageError) as caught:
        open_filesystem("nosuch://host/x")
    assert "\n" not in str(caught.value)
    with pytest.raises(StorageError):
        Folder("nosuch://host/x").create()


class Flaky:
    """Raises the given errors, then works."""

    def __init__(self, *errors):
        self.errors, self.calls = list(errors), 0

    def __call__(self):
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


@pytest.fixture
def waits(monkeypatch):
    """The waits between tries, which take no time here."""
    found = []
    monkeypatch.setattr(calls.time, "sleep", found.append)
    return found


def test_a_store_that_fails_is_asked_again(waits):
    action = Flaky(
        OSError("AWS Error SLOW_DOWN"), OSError("broken pipe"), OSError("HTTP status 503")
    )
    assert with_retries(action, "s3://b/x") == "done"
    assert len(waits) == 3
    assert all(
        mean / 2 <= wait <= mean * 3 / 2 for wait, mean in zip(waits, calls.WAITS_S, strict=True)
    )


def test_a_store_that_goes_on_failing_is_left(waits):
    action = Flaky(*[OSError("AWS Error SLOW_DOWN\nmore")] * 99)
    with pytest.raises(StorageError) as caught:
        with_retries(action, "s3://KEY:SE/CRET@b/x?region=r&token=TOKEN")
    assert action.calls == len(waits) + 1 == len(calls.WAITS_S) + 1
    message = str(caught.value)
    assert message.startswith(
        "the object store fails at s3://b/x?region=r (AWS Error SLOW_DOWN); check "
    )
    assert (
        caught.value.__suppress_context__
    )  # a trace back shows nothing that is not in the message


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError("AWS Error ACCESS_DENIED during PutObject operation"), StorageError),
        (OSError("AWS Error UNKNOWN (HTTP status 400) during HeadObject operation"), StorageError),
        (PermissionError(13, "closed"), PermissionError),
        (FileNotFoundError(2, "gone"), FileNotFoundError),
        (ZeroDivisionError(), ZeroDivisionError),
    ],
)
def test_what_another_try_will_not_change(waits, error, raised):
    with pytest.raises(raised):
        with_retries(Flaky(error), "s3://b/x")
    assert waits == []


def test_a_disk_is_asked_once(waits):
    with pytest.raises(OSError, match="broken"):
        with_retries(Flaky(OSError("broken")), "/x")
    with pytest.raises(FileNotFoundError):
        Folder("/x").read_bytes("y")
    assert waits == []


@pytest.fixture
def interruptible():
    """Whatever a test before has made of SIGINT, it raises KeyboardInterrupt."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Lossy:
    """An object store on disk that keeps half of its first uploads, or is interrupted in them."""

    def __init__(self, root, losses=0, interrupts=False):
        self.inner = pafs.SubTreeFileSystem(str(root), pafs.LocalFileSystem())
        self.losses, self.interrupts = losses, interrupts

    def open_output_stream(self, path):
        if self.interrupts:
            signal.raise_signal(signal.SIGINT)
        stream = self.inner.open_output_stream(path)
        self.losses -= 1
        return HalfStream(stream) if self.losses >= 0 else stream

    def get_file_info(self, path):
        return self.inner.get_file_info(path)

    def delete_file(self, path):
        self.inner.delete_file(path)


class HalfStream:
    def __init__(self, stream):
        self.stream = stream

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stream.close()

    def write(self, data):
        self.stream.write(data[: len(data) // 2])


def test_an_object_of_another_size_is_written_again(tmp_path, monkeypatch, waits):
    store = Lossy(tmp_path, losses=2)
    monkeypatch.setattr(storage, "open_filesystem", lambda _: (store, ""))
    Folder("s3://b").write_bytes("x", b"0123456789")
    assert (tmp_path / "x").read_bytes() == b"0123456789"
    assert len(waits) == 2
    store.losses = 99
    with pytest.raises(StorageError, match="x: 10 bytes were written, 5 are there"):
        Folder("s3://b").write_bytes("x", b"0123456789")


def test_azure_accounts_that_cannot_move_files_are_written_in_place(tmp_path, monkeypatch):
    class Flat(Lossy):
        def move(self, *_):
            raise pa.ArrowNotImplementedError("FileSystem::Move() is not implemented for Azure")

    monkeypatch.setattr(storage, "open_filesystem", lambda _: (Flat(tmp_path), ""))
    Folder("abfs://c@a/").write_bytes("x", b"1")
    assert files(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == b"1"


@pytest.mark.usefixtures("interruptible")
def test_an_upload_is_not_cut_by_an_interrupt(tmp_path, monkeypatch):
    monkeypatch.setattr(
        storage, "open_filesystem", lambda _: (Lossy(tmp_path, interrupts=True), "")
    )
    with pytest.raises(KeyboardInterrupt):
        Folder("s3://b").write_bytes("x", b"whole")
    deadline = (
        time.monotonic() + 10
    )  # the interrupt may come before anybody waits for the thread, which goes on alone
    written = tmp_path / "x"
    while (
        not (written.exists() and written.read_bytes() == b"whole") and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    assert written.read_bytes() == b"whole"


@pytest.mark.usefixtures("interruptible")
def test_an_upload_that_nobody_waits_for_is_whole(tmp_path, monkeypatch):
    """An interrupt during the start of the thread hides it from whoever waits for threads."""
    start = threading.Thread.start

    def interrupted(thread):
        start(thread)
        raise KeyboardInterrupt

    store = Lossy(tmp_path)
    slow = store.open_output_stream
    store.open_output_stream = lambda path: time.sleep(0.3) or slow(path)
    monkeypatch.setattr(storage, "open_filesystem", lambda _: (store, ""))
    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Folder("s3://b").write_bytes("x", b"whole")
    monkeypatch.undo()
    deadline = time.monotonic() + 10
    while not (tmp_path / "x").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert (tmp_path / "x").read_bytes() == b"whole"


def test_folders_travel():
    assert pickle.loads(pickle.dumps(Folder("/x"))) == Folder("/x")  # noqa: S301 - our own bytes


def test_calls_side_by_side_keep_their_order_and_run_no_further_than_their_number():
    begun = []

    def call(item):
        begun.append(item)
        time.sleep(0.002 * (item % 3))
        return item * item

    for item, result in enumerate(side_by_side(call, range(200))):
        assert result == item * item
        assert len(begun) <= item + 1 + CALLS_AT_ONCE
    assert sorted(begun) == list(range(200))


def test_what_a_call_raises_comes_at_its_place():
    results = side_by_side(lambda item: 1 // item, [1, 1, 0, 1])
    assert [next(results), next(results)] == [1, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)

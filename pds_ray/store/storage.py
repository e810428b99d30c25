"""Files on a local disk or a store elsewhere: one handle on a folder, with atomic writes.

On a local disk a file is written under a temporary name, flushed and renamed. On an object store
(OBJECT_STORES) an object becomes visible when its upload is complete, so a plain write is atomic.
On any other store, as SFTP or HDFS, a file may be visible from when it is opened, so it is written
under a temporary name there too, and moved. Some of them move no file onto another: the old one is
moved aside just before, and a writer killed at that moment leaves it under another name. Sizes are
checked after each upload. Stores fail and time out: every call is retried with growing waits
(`with_retries`). A store must be strongly consistent, as S3, GCS, Azure, MinIO and Ceph are: what
is written is found and listed at once.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Concatenate, ParamSpec, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pds_ray.errors import first_line, without_secrets
from pds_ray.store.calls import (
    UNLIMITED,
    StorageError,
    is_remote,
    side_by_side,
    with_retries,
)
from pds_ray.store.filesystems import local_path, open_filesystem
from pds_ray.store.streams import STREAM_BUFFER_BYTES, Hashed, open_stream, read_at

ROW_GROUP = 16_384  # rows of a Parquet file that are read together
PART_SUFFIX = ".part"
# what `writer` calls its temporary files: browsers and others end theirs in .part as well
_PART = re.compile(r".+\.[0-9a-f]{8}" + re.escape(PART_SUFFIX))
DISK_FAULTS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EIO,
    # of disks that are mounted: a file larger than FAT holds, a server that is gone, a name or a
    # flush that they do not know
    errno.EFBIG,
    errno.ESTALE,
    errno.ENOTCONN,
    errno.ENAMETOOLONG,
    errno.ENOTSUP,
    errno.EINVAL,
)
LOCK = ".lock"
# always the same name, so that the next run removes the file that a killed run left
WRITE_TEST = f".write-test{PART_SUFFIX}"
SPOOL_BYTES = 16 * 1024**2
"""Bytes of an object held in memory before its upload; a larger one waits on the local disk."""
NO_FOLDERS = {
    "http": "a web server takes no files",
    "https": "a web server takes no files",
    "hf": "every file written there is a commit; `pds-ray push` puts a finished set there",
}
"""Schemes of stores in which no folder can be made, and why."""
OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "oci", "tos", "tosfs", "memory"})
"""Schemes of stores on which a file appears when its upload completes; a move would copy it there.

abfs is none of them, as pyarrow opens a file by making an empty one, nor is oss, whose package
appends to what it has begun. On one that is not known here files are moved, or, where it moves
none, written in place.
"""

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def _retried(
    method: Callable[Concatenate[Folder, Arguments], Result],
) -> Callable[Concatenate[Folder, Arguments], Result]:
    """Decorate a method of `Folder`, which is one question, so that it is called `with_retries`."""

    @functools.wraps(method)
    def call(folder: Folder, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        return with_retries(lambda: method(folder, *args, **kwargs), folder.path)

    return call


def _retried_at_length(
    method: Callable[Concatenate[Folder, Arguments], Result],
) -> Callable[Concatenate[Folder, Arguments], Result]:
    """Decorate a method of `Folder` that may take long, as it lists or moves much data."""

    @functools.wraps(method)
    def call(folder: Folder, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        return with_retries(lambda: method(folder, *args, **kwargs), folder.path, UNLIMITED)

    return call


@dataclass(frozen=True)
class Folder:
    """A folder given by its path or URI.

    It pickles small, as workers open their own connections. A local path is made absolute at once,
    as workers have other working directories. Raises StorageError for one of NO_FOLDERS.
    """

    path: str

    def __post_init__(self) -> None:
        if not is_remote(self.path):
            object.__setattr__(self, "path", local_path(self.path))
        elif refusal := NO_FOLDERS.get(self._scheme):
            raise StorageError(
                f"{self.path} cannot be a folder of results: {refusal}; give a local path or an "
                "object store"
            )

    def __repr__(self) -> str:
        return f"Folder({self.shown!r})"

    @property
    def shown(self) -> str:
        """The path or URI without secrets, fit to be shown and published."""
        return without_secrets(self.path) if is_remote(self.path) else self.path

    @property
    def _scheme(self) -> str:
        return self.path.partition(":")[0]

    @property
    def _fs(self) -> tuple[pafs.FileSystem, str]:
        return open_filesystem(self.path)

    def __truediv__(self, name: str) -> Folder:
        return Folder(self.full(name))

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self._split()[0].rpartition("/")[2]

    @property
    def place(self) -> str:
        """The path or URI without the settings of a store, which do not identify a folder."""
        return self._split()[0]

    def full(self, name: str) -> str:
        """Return the path or URI of a file here, with the store's settings (`?region=...`) last."""
        base, settings = self._split()
        return f"{base}/{name}{settings}"

    def _split(self) -> tuple[str, str]:
        """Return the path proper, and the settings of a store or ""."""
        base, mark, settings = (
            self.path.partition("?") if is_remote(self.path) else (self.path, "", "")
        )
        return base.rstrip("/"), mark + settings

    def create(self) -> None:
        """Make the folder and prove that it is writable. Raises StorageError in one line."""
        try:
            self._make()
            # if another run, which holds the folder, sweeps the file, that shows it as well
            with contextlib.suppress(FileNotFoundError):
                self.write_bytes(WRITE_TEST, b"")
                self.delete(WRITE_TEST)
        except (OSError, StorageError) as error:
            cause = error.__cause__ if isinstance(error, StorageError) else error
            if cause is None:  # an error of an object store names its place itself
                raise
            raise StorageError(f"cannot write to {self.shown}: {_reason(cause)}") from error

    @_retried
    def _make(self) -> None:
        fs, root = self._fs
        fs.create_dir(root, recursive=True)

    @_retried
    def exists(self, name: str) -> bool:
        fs, root = self._fs
        return fs.get_file_info(f"{root}/{name}").type == pafs.FileType.File

    @_retried_at_length
    def names(self, suffix: str = "") -> list[str]:
        """Return the sorted names of the files directly in this folder that end in `suffix`.

        A folder that does not exist has none.
        """
        return sorted(
            info.base_name
            for info in self._listed()
            if info.is_file and info.base_name.endswith(suffix)
        )

    def _listed(self) -> list[pafs.FileInfo]:
        """Return what lies directly in this folder; nothing if it does not exist."""
        fs, root = self._fs
        return fs.get_file_info(pafs.FileSelector(root, allow_not_found=True))

    @_retried
    def is_empty(self) -> bool:
        """Return whether nothing lies in this folder, or it is not there."""
        return not self._listed()

    @_retried
    def delete(self, name: str) -> None:
        """Remove a file; a missing one is no error. Raises what `writer` raises."""
        fs, root = self._fs
        with _in_one_line(f"delete {self.full(name)}"), contextlib.suppress(FileNotFoundError):
            fs.delete_file(f"{root}/{name}")

    def delete_each(self, names: Iterable[str]) -> None:
        """Remove several files at a time. Raises what `delete` raises."""
        for _ in side_by_side(self.delete, names):
            pass

    @_retried_at_length
    def delete_all(self) -> None:
        """Remove the folder with all it holds; a missing one is no error.

        One that is a symbolic link, as to a larger disk, is emptied and stays. Raises what `writer`
        raises.
        """
        fs, root = self._fs
        linked = not is_remote(self.path) and os.path.islink(root)
        with _in_one_line(f"delete {self.shown}"), contextlib.suppress(FileNotFoundError):
            if linked:
                fs.delete_dir_contents(os.path.realpath(root))
            else:
                fs.delete_dir(root)

    def sweep(self, spare: str = "") -> None:
        """Remove the temporary files of interrupted writers, here and below, and no other file.

        Only the holder of the lock may call it. The folder named `spare` directly in this one is
        left alone. On an object store nothing is visible: a lifecycle rule of the bucket removes
        incomplete uploads. On any other store elsewhere they stay, as another run may be writing
        them: there is no lock. Raises what `writer` raises.
        """
        if is_remote(self.path):
            return
        for place, folders, files in os.walk(self.path):
            if place == self.path and spare in folders:
                folders.remove(spare)
            for name in files:
                if _PART.fullmatch(name) or name == WRITE_TEST:
                    part = Path(place, name)
                    with _in_one_line(f"delete {part}"):
                        # orphaned workers of a killed driver may still rename it
                        part.unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process; the lock is released however the process ends.

        Object stores have no locks: there a run looks for the heartbeat of another driver
        (`heartbeat.beating`). Should two runs of one configuration work in one folder nevertheless,
        they do the same work twice and may delete each other's unfinished parts, which ends one of
        them. The result is right all the same: every object is complete, both runs write the same
        bytes under the same name, and markers come last.

        Raises StorageError in one line if another process holds the lock, and what `writer` raises.
        """
        if is_remote(self.path):
            yield
            return
        with _in_one_line(f"write to {self.shown}"):
            try:
                handle = open(self.full(LOCK), "a")  # noqa: SIM115 - closed below
            except PermissionError as error:
                raise StorageError(
                    f"{self.shown} belongs to another user's run, whose files may not be changed; "
                    "give another --out, or have its group write to it (umask 002)"
                ) from error
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StorageError(
                    f"another run is at work in {self.shown}; wait for it or give another --out"
                ) from error
            except OSError as error:
                raise StorageError(
                    f"{self.shown} cannot be locked ({error.strerror}); give an --out that can"
                ) from error
            yield

    @contextlib.contextmanager
    def writer(self, name: str) -> Iterator[IO[bytes]]:
        """Open a binary stream for an atomic write.

        File `name` appears, or is replaced, when the block ends without an exception; otherwise
        nothing changes. Raises StorageError in one line if the disk is full, read-only or broken.
        """
        if is_remote(self.path):
            # spooled first: an upload closed by an error would publish half an object
            spooled = tempfile.SpooledTemporaryFile(SPOOL_BYTES)  # noqa: SIM115 - closed below
            try:
                yield spooled
            except OSError as error:
                if error.errno in DISK_FAULTS:
                    raise StorageError(
                        f"cannot write {tempfile.gettempdir()}: {_reason(error)}"
                    ) from error
                raise
            self._upload(name, spooled)
            spooled.close()
            return
        final = self.full(name)
        part = Path(_part_of(final))
        with _in_one_line(f"write {final}"):
            try:
                part.parent.mkdir(parents=True, exist_ok=True)
                with part.open("wb") as stream:
                    yield stream
                    stream.flush()
                    os.fsync(stream.fileno())
                part.replace(final)
            except BaseException:
                # a broken disk may keep the file; the first error is the one to report
                with contextlib.suppress(OSError):
                    part.unlink(missing_ok=True)
                raise

    @_retried_at_length
    def _upload(self, name: str, data: IO[bytes]) -> None:
        # `with_retries` runs this in a thread, which gets no signals: an interrupt in it would
        # publish half an object
        fs, root = self._fs
        final = f"{root}/{name}"
        if self._scheme in OBJECT_STORES:
            _send(fs, final, data)
            return
        part = _part_of(final)
        try:
            _send(fs, part, data)
            _put_in_place(fs, part, final)
        except BaseException as error:
            with contextlib.suppress(Exception):  # the first error is the one to report
                fs.delete_file(part)
            if not any(isinstance(one, NotImplementedError) for one in (error, error.__cause__)):
                raise
            _send(fs, final, data)  # it moves nothing

    def write_bytes(self, name: str, data: bytes) -> None:
        with self.writer(name) as stream:
            stream.write(data)

    @_retried_at_length
    def read_bytes(self, name: str) -> bytes:
        fs, root = self._fs
        with fs.open_input_file(f"{root}/{name}") as file:
            return read_at(file, 0, file.size())

    def reader(self, name: str) -> io.BufferedReader:
        """Open a file for reading forwards. Raises what `open_stream` raises."""
        fs, root = self._fs
        return open_stream(fs, f"{root}/{name}", self.full(name))

    def sha256(self, name: str) -> str:
        """Return the hex SHA-256 of a file. Raises what `open_stream` raises."""
        with self.reader(name) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def write_json(self, name: str, value: Any) -> None:
        self.write_bytes(name, json_bytes(value))

    def read_json(self, name: str) -> Any:
        return json.loads(self.read_bytes(name))

    def write_table(self, name: str, table: pa.Table) -> str:
        """Write Parquet and return the hex SHA-256 of its bytes.

        The codec is lz4: embeddings do not compress, and it is fast and good enough for text.
        """
        with self.writer(name) as stream:
            hashed = Hashed(stream)
            pq.write_table(
                table, hashed, compression="lz4", use_dictionary=False, row_group_size=ROW_GROUP
            )
        return hashed.sha256

    @_retried_at_length
    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        fs, root = self._fs
        return pq.read_table(f"{root}/{name}", columns=columns, filesystem=fs, partitioning=None)

    @_retried_at_length
    def table_schema(self, name: str) -> pa.Schema:
        """Return the columns of a Parquet file."""
        fs, root = self._fs
        return pq.read_schema(f"{root}/{name}", filesystem=fs)

    @_retried_at_length
    def row_group_lengths(self, name: str) -> list[int]:
        """Return the number of rows of each row group of a Parquet file."""
        fs, root = self._fs
        found = pq.read_metadata(f"{root}/{name}", filesystem=fs)
        return [found.row_group(group).num_rows for group in range(found.num_row_groups)]

    @_retried_at_length
    def read_row_group(self, name: str, group: int, columns: list[str]) -> pa.Table:
        """Return a row group of a Parquet file."""
        fs, root = self._fs
        with pq.ParquetFile(f"{root}/{name}", filesystem=fs) as file:
            return file.read_row_group(group, columns, use_threads=False)

    def read_parts(self, name: str, columns: list[str]) -> Iterator[pa.Table]:
        """Yield the row groups of a Parquet file, one in memory at a time."""
        for group in range(len(self.row_group_lengths(name))):
            yield self.read_row_group(name, group, columns)


def _part_of(path: str) -> str:
    """Return a new name for a temporary file beside `path`."""
    return f"{path}.{uuid.uuid4().hex[:8]}{PART_SUFFIX}"


def _send(fs: pafs.FileSystem, path: str, data: IO[bytes]) -> None:
    """Write a whole file elsewhere. Raises OSError if it has not arrived."""
    size = data.seek(0, os.SEEK_END)
    data.seek(0)
    with fs.open_output_stream(path) as stream:
        shutil.copyfileobj(data, stream, STREAM_BUFFER_BYTES)
    _check_size(fs, path, size)


def _check_size(fs: pafs.FileSystem, path: str, size: int) -> None:
    seen = fs.get_file_info(path).size
    if seen != size:
        name = path.rpartition("/")[2]
        raise OSError(f"{name}: {size} bytes were written, {seen or 0} are there")


def _put_in_place(fs: pafs.FileSystem, part: str, final: str) -> None:
    """Move a temporary file elsewhere onto `final`. Raises OSError if it is not there then.

    Where a store replaces no file, the old one is moved aside, and back if the new one cannot come.
    """
    size = fs.get_file_info(part).size
    failure = None
    try:
        fs.move(part, final)
    except OSError as error:
        failure = error
    if not fs.get_file_info(part).is_file:
        _check_size(fs, final, size)
        return
    if not fs.get_file_info(final).is_file:
        raise failure or OSError(f"{final} was not moved to its place")
    aside = f"{_part_of(final)}.old"  # it replaces no file; webhdfs does not even say so
    fs.move(final, aside)
    try:
        fs.move(part, final)
        _check_size(fs, final, size)
    except BaseException:
        if not fs.get_file_info(final).is_file:
            fs.move(aside, final)
        raise
    with contextlib.suppress(OSError):  # the new one is there
        fs.delete_file(aside)


def json_bytes(value: Any) -> bytes:
    """Return JSON values as `Folder.write_json` writes them."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def json_sha256(value: Any) -> str:
    """Return the hex SHA-256 of the file that `Folder.write_json` writes."""
    return hashlib.sha256(json_bytes(value)).hexdigest()


@contextlib.contextmanager
def _in_one_line(what: str) -> Iterator[None]:
    """Turn errors of a full, read-only or broken disk into a StorageError that names `what`."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FAULTS:
            raise
        raise StorageError(f"cannot {what}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)  # pyarrow's own text repeats the file's name
    return first_line(error)


@functools.lru_cache(maxsize=256)  # size and time are a part of its key
def _sha256(path: str, size: int, mtime_ns: int) -> str:  # noqa: ARG001
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def folder_sha256(folder: Path, patterns: tuple[str, ...]) -> str:
    """Return the hex SHA-256 over names and contents of the files below `folder`.

    Only files that match one of the glob `patterns` count.
    """
    digest = hashlib.sha256()
    for path in sorted(
        {path for pattern in patterns for path in folder.rglob(pattern) if path.is_file()}
    ):
        digest.update(f"{path.relative_to(folder).as_posix()} {file_sha256(path)}\n".encode())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Return the hex SHA-256 of a file, cached while its size and time stay the same."""
    stat = path.stat()
    return _sha256(str(path), stat.st_size, stat.st_mtime_ns)

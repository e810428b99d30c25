"""Files, local or on an object store: one handle on a folder, writes that are whole or not there.

On a local disk a file is written aside, flushed and renamed. On an object store an object becomes visible when its
upload is completed, so a plain write is all-or-nothing; it is looked at afterwards nevertheless. Stores fail, time out
and show an object late: every call of one is repeated with growing waits (`patiently`).
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
import random
import re
import shutil
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Concatenate, ParamSpec, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pds_ray.errors import UserError, first_line, without_secrets

PART_SUFFIX = ".part"
DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
LOCK = ".lock"
WRITE_TEST = (
    f".write-test{PART_SUFFIX}"  # of one name, so that the next run removes what a killed one left
)
WAITS_S = (1.0, 4.0, 16.0)
"""Before a call that failed is repeated, on average; a store's client has by then tried for some seconds itself."""
STREAM_BUFFER_BYTES = 1024**2
SPOOL_BYTES = 16 * 1024**2
"""Of an object to be written that are held in memory; a larger one waits on the local disk."""
CALLS_AT_ONCE = (
    32  # one after the other, the round trips to an object store would take half an hour for 40,000
)

_FACTS = (PermissionError, IsADirectoryError, NotADirectoryError)
_REFUSED = re.compile(  # what another try will not change
    r"AWS Error (ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH)"
    r"|HTTP status (3|4(?!08|29))\d\d|Bucket '.*' not found"
)

Arguments = ParamSpec("Arguments")
Item = TypeVar("Item")
Result = TypeVar("Result")


class StorageError(UserError):
    """A folder or an object store cannot be used. No OSError: what could be tried again has been."""


def is_remote(path: str) -> bool:
    """Whether `path` names an object store (s3://, gs://, hdfs://) rather than a local path."""
    return "://" in path and not path.startswith("file://")


def patiently(action: Callable[[], Result], where: str) -> Result:
    """What `action` returns, which does something at `where`. On an object store it is repeated while the store fails.

    So it is when a file is not found: a listing or a marker promised it, and it may not be visible yet. If it never
    is, FileNotFoundError is raised as it came.

    Raises StorageError in one line if the store refuses or goes on failing.
    """
    if not is_remote(where):
        return action()
    for wait_s in (*WAITS_S, None):
        try:
            return action()
        except _FACTS:
            raise
        except OSError as error:
            if wait_s is None and isinstance(error, FileNotFoundError):
                raise
            if wait_s is None or _REFUSED.search(str(error)):
                raise StorageError(
                    f"the object store fails at {where} ({first_line(error)}); check its address and state and the "
                    "credentials; the same command continues"
                ) from None
            time.sleep(wait_s * random.uniform(0.5, 1.5))  # many workers must not come back at once
    raise AssertionError("unreachable")


def side_by_side(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`function(item)` for each item, in their order, CALLS_AT_ONCE of them in threads; no more results are held."""
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(CALLS_AT_ONCE) as threads:
        for item in items:
            pending.append(threads.submit(function, item))
            if len(pending) == CALLS_AT_ONCE:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _patient(
    method: Callable[Concatenate[Folder, Arguments], Result],
) -> Callable[Concatenate[Folder, Arguments], Result]:
    """A method of `Folder` that does `patiently` what it does."""

    @functools.wraps(method)
    def call(folder: Folder, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        return patiently(lambda: method(folder, *args, **kwargs), folder.path)

    return call


@dataclass(frozen=True)
class Folder:
    """A folder by its path or URI. Pickles small: workers open their own connections.

    A local path is made absolute at once: workers have other working directories.
    """

    path: str

    def __post_init__(self) -> None:
        if not is_remote(self.path):
            local = os.path.abspath(os.path.expanduser(self.path.removeprefix("file://")))
            object.__setattr__(self, "path", local)

    def __repr__(self) -> str:
        return f"Folder({self.shown!r})"

    @property
    def shown(self) -> str:
        """The path or URI as it may be shown and published."""
        return without_secrets(self.path) if is_remote(self.path) else self.path

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
        """The path or URI without the settings of a store: the same for every way of writing it."""
        return self._split()[0]

    def full(self, name: str) -> str:
        """The path or URI of a file in this folder; the settings of a store (`?region=...`) stay at the end."""
        base, settings = self._split()
        return f"{base}/{name}{settings}"

    def _split(self) -> tuple[str, str]:
        """The path proper, and the settings of a store or ""."""
        base, mark, settings = (
            self.path.partition("?") if is_remote(self.path) else (self.path, "", "")
        )
        return base.rstrip("/"), mark + settings

    def create(self) -> None:
        """Makes the folder and proves that it can be written. Raises StorageError in one line."""
        try:
            self._make()
            # one that is swept by another run, which has the folder, shows as well that it can be written
            with contextlib.suppress(FileNotFoundError):
                self.write_bytes(WRITE_TEST, b"")
                self.delete(WRITE_TEST)
        except (OSError, StorageError) as error:
            cause = error.__cause__ if isinstance(error, StorageError) else error
            if cause is None:  # of an object store, which says where itself
                raise
            raise StorageError(f"cannot write to {self.shown}: {_reason(cause)}") from error

    @_patient
    def _make(self) -> None:
        fs, root = self._fs
        fs.create_dir(root, recursive=True)

    @_patient
    def exists(self, name: str) -> bool:
        fs, root = self._fs
        return fs.get_file_info(f"{root}/{name}").type == pafs.FileType.File

    @_patient
    def names(self, suffix: str = "") -> list[str]:
        """The names of the files directly in this folder that end in `suffix`, sorted; none if there is no folder."""
        fs, root = self._fs
        infos = fs.get_file_info(pafs.FileSelector(root, allow_not_found=True))
        return sorted(
            i.base_name
            for i in infos
            if i.type == pafs.FileType.File and i.base_name.endswith(suffix)
        )

    @_patient
    def delete(self, name: str) -> None:
        """Removes a file; one that is not there is no error. Raises what `writer` does."""
        fs, root = self._fs
        with _in_one_line(f"delete {self.full(name)}"), contextlib.suppress(FileNotFoundError):
            fs.delete_file(f"{root}/{name}")

    def delete_each(self, names: Iterable[str]) -> None:
        """`delete` of each file, side by side."""
        for _ in side_by_side(self.delete, names):
            pass

    @_patient
    def delete_all(self) -> None:
        """Removes the folder and all in it; one that is not there is no error. Raises what `writer` does."""
        fs, root = self._fs
        with _in_one_line(f"delete {self.shown}"), contextlib.suppress(FileNotFoundError):
            fs.delete_dir(root)

    def sweep(self, spare: str = "") -> None:
        """Removes what interrupted writers left behind, here and below. Only for the holder of the lock.

        A folder directly in this one that has the name `spare` is left alone. On an object store there is nothing
        visible; a lifecycle rule of the bucket removes uploads never completed. Raises what `writer` does.
        """
        if is_remote(self.path):
            return
        for place, folders, files in os.walk(self.path):
            if place == self.path and spare in folders:
                folders.remove(spare)
            for name in files:
                if name.endswith(PART_SUFFIX):
                    part = Path(place, name)
                    with _in_one_line(f"delete {part}"):
                        part.unlink(
                            missing_ok=True
                        )  # orphans of a killed driver may still finish it

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder for this process; it is free again however the process ends.

        Object stores have no locks; there a run looks for the signs of life of others (`heartbeat.beating`). Should two
        runs of one configuration be at work in one folder nevertheless, they do the same work twice and may take each
        other's unfinished pieces away, which ends one of them; but every object is whole, both write the same bytes
        under the same name, and markers come last, so that what is there can be trusted.

        Raises StorageError in one line if another process holds it, or what `writer` does.
        """
        if is_remote(self.path):
            yield
            return
        with _in_one_line(f"write to {self.shown}"):
            handle = open(self.full(LOCK), "a")  # noqa: SIM115 - closed below
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
        """A binary stream whose content appears as file `name` when the block ends well, and not otherwise.

        Raises StorageError in one line if the disk is full, read-only or broken.
        """
        if is_remote(self.path):
            # gathered first: an upload closed by an error would publish half an object
            gathered = tempfile.SpooledTemporaryFile(SPOOL_BYTES)  # noqa: SIM115 - after an interrupt it is still read
            try:
                yield gathered
            except OSError as error:
                if error.errno in DISK_FAULTS:
                    raise StorageError(
                        f"cannot write {tempfile.gettempdir()}: {_reason(error)}"
                    ) from error
                raise
            self._upload(name, gathered)
            gathered.close()
            return
        final = self.full(name)
        aside = Path(f"{final}.{uuid.uuid4().hex[:8]}{PART_SUFFIX}")
        with _in_one_line(f"write {final}"):
            try:
                aside.parent.mkdir(parents=True, exist_ok=True)
                with aside.open("wb") as stream:
                    yield stream
                    stream.flush()
                    os.fsync(stream.fileno())
                aside.replace(final)
            except BaseException:
                with contextlib.suppress(
                    OSError
                ):  # a broken disk may keep it; what broke it first is to be told
                    aside.unlink(missing_ok=True)
                raise

    @_patient
    def _upload(self, name: str, data: IO[bytes]) -> None:
        fs, root = self._fs
        size = data.seek(0, os.SEEK_END)

        def upload() -> None:
            data.seek(0)
            with fs.open_output_stream(f"{root}/{name}") as stream:
                shutil.copyfileobj(data, stream, STREAM_BUFFER_BYTES)

        with ThreadPoolExecutor(
            1
        ) as thread:  # a signal in the middle, too, would publish half; threads get none
            thread.submit(upload).result()
        seen = fs.get_file_info(f"{root}/{name}").size
        if seen != size:
            raise OSError(f"{name}: {size} bytes were written, {seen or 0} are there")

    def write_bytes(self, name: str, data: bytes) -> None:
        with self.writer(name) as stream:
            stream.write(data)

    @_patient
    def read_bytes(self, name: str) -> bytes:
        fs, root = self._fs
        with fs.open_input_file(f"{root}/{name}") as file:
            return _read_at(file, 0, file.size())

    def sha256(self, name: str) -> str:
        """Hex SHA-256 of a file. Raises what `open_stream` does."""
        fs, root = self._fs
        with open_stream(fs, f"{root}/{name}", self.full(name)) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def write_json(self, name: str, value: Any) -> None:
        self.write_bytes(name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def read_json(self, name: str) -> Any:
        return json.loads(self.read_bytes(name))

    def write_table(self, name: str, table: pa.Table) -> str:
        """Writes Parquet and returns the SHA-256 of its bytes.

        Embeddings do not compress, hence lz4: fast, and good enough for the text beside them.
        """
        buffer = io.BytesIO()
        pq.write_table(
            table, buffer, compression="lz4", use_dictionary=False, row_group_size=16_384
        )
        self.write_bytes(name, buffer.getvalue())
        return hashlib.sha256(buffer.getbuffer()).hexdigest()

    @_patient
    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        fs, root = self._fs
        return pq.read_table(f"{root}/{name}", columns=columns, filesystem=fs, partitioning=None)


@contextlib.contextmanager
def _in_one_line(what: str) -> Iterator[None]:
    """Raises StorageError, saying what cannot be done, if the disk is full, read-only or broken."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FAULTS:
            raise
        raise StorageError(f"cannot {what}: {_reason(error)}") from error


class _RemoteFile(io.RawIOBase):
    """An object read forwards. A transfer that breaks off is taken up where it was, and is never taken for the end."""

    def __init__(self, file: pa.NativeFile, where: str) -> None:
        self._file = file
        self._size = file.size()
        self._where = where
        self._position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._position)
        data = patiently(lambda: _read_at(self._file, self._position, wanted), self._where)
        buffer[:wanted] = data
        self._position += wanted
        return wanted

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _read_at(file: pa.NativeFile, position: int, size: int) -> bytes:
    """Raises OSError if there is less."""
    data = file.read_at(size, position) if size else b""
    if len(data) < size:
        raise OSError(f"the transfer ended after {len(data)} of {size} bytes")
    return data


def open_stream(filesystem: pafs.FileSystem, path: str, where: str) -> io.BufferedReader:
    """A file to read forwards, as it is stored. `where` is its path or URI, for messages.

    Raises FileNotFoundError if it is not there, and StorageError if it lies on an object store that goes on failing.
    """
    if isinstance(filesystem, pafs.LocalFileSystem):
        return io.BufferedReader(
            filesystem.open_input_stream(path, compression=None), STREAM_BUFFER_BYTES
        )
    file = patiently(lambda: filesystem.open_input_file(path), where)
    return io.BufferedReader(_RemoteFile(file, where), STREAM_BUFFER_BYTES)


@functools.lru_cache(maxsize=32)
def open_filesystem(path: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a path or URI, and the path inside it.

    Raises StorageError if the scheme is unknown or the store cannot be set up.
    """
    if not is_remote(path):
        return pafs.LocalFileSystem(), os.path.abspath(
            os.path.expanduser(path.removeprefix("file://"))
        )
    try:
        return patiently(lambda: pafs.FileSystem.from_uri(path.rstrip("/")), path)
    except pa.ArrowInvalid as error:
        raise StorageError(
            f"cannot open {path}: {_reason(error)}"
        ) from None  # it shows the URI as it is


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)  # pyarrow's own text names the file once more
    return first_line(error)


@functools.lru_cache(maxsize=256)
def _sha256(path: str, size: int, mtime_ns: int) -> str:  # noqa: ARG001 - size and time key the cache
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def folder_sha256(folder: Path, patterns: tuple[str, ...]) -> str:
    """Hex SHA-256 over names and contents of the files below a folder that match one of the patterns."""
    digest = hashlib.sha256()
    for path in sorted(
        {path for pattern in patterns for path in folder.rglob(pattern) if path.is_file()}
    ):
        digest.update(f"{path.relative_to(folder).as_posix()} {file_sha256(path)}\n".encode())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file, computed once while it does not change."""
    stat = path.stat()
    return _sha256(str(path), stat.st_size, stat.st_mtime_ns)

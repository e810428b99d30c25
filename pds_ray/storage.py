"""Files, local or on an object store: one handle on a folder, writes that are whole or not there.

On a local disk a file is written aside, flushed and renamed; on an object store an object becomes visible when its
upload closes, so a plain write is already all-or-nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import io
import json
import os
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pds_ray.errors import UserError

PART_SUFFIX = ".part"
LOCK = ".lock"


class StorageError(UserError, OSError):
    """A folder cannot be used."""


def is_remote(path: str) -> bool:
    """Whether `path` names an object store (s3://, gs://, hdfs://) rather than a local path."""
    return "://" in path and not path.startswith("file://")


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

    @property
    def _fs(self) -> tuple[pafs.FileSystem, str]:
        return open_filesystem(self.path)

    def __truediv__(self, name: str) -> Folder:
        return Folder(self.full(name))

    def full(self, name: str) -> str:
        """The path or URI of a file in this folder; the settings of a store (`?region=...`) stay at the end."""
        base, mark, settings = self.path.partition("?") if is_remote(self.path) else (self.path, "", "")
        return base.rstrip("/") + "/" + name + mark + settings

    def create(self) -> None:
        """Makes the folder and proves that it can be written. Raises StorageError in one line."""
        fs, root = self._fs
        probe = f".write-test-{uuid.uuid4().hex}"
        try:
            fs.create_dir(root, recursive=True)
            self.write_bytes(probe, b"")
            fs.delete_file(f"{root}/{probe}")
        except OSError as error:
            raise StorageError(f"cannot write to {self.path}: {_reason(error)}") from error

    def exists(self, name: str) -> bool:
        fs, root = self._fs
        return fs.get_file_info(f"{root}/{name}").type == pafs.FileType.File

    def names(self, suffix: str = "") -> list[str]:
        """The names of the files directly in this folder that end in `suffix`, sorted; none if there is no folder."""
        fs, root = self._fs
        infos = fs.get_file_info(pafs.FileSelector(root, allow_not_found=True))
        return sorted(i.base_name for i in infos if i.type == pafs.FileType.File and i.base_name.endswith(suffix))

    def delete(self, name: str) -> None:
        """Removes a file; one that is not there is no error."""
        fs, root = self._fs
        with contextlib.suppress(FileNotFoundError):
            fs.delete_file(f"{root}/{name}")

    def delete_all(self) -> None:
        """Removes the folder and all in it; one that is not there is no error."""
        fs, root = self._fs
        with contextlib.suppress(FileNotFoundError):
            fs.delete_dir(root)

    def sweep(self) -> None:
        """Removes what interrupted writers left behind, here and below. Only for the holder of the lock."""
        fs, root = self._fs
        for info in fs.get_file_info(pafs.FileSelector(root, allow_not_found=True, recursive=True)):
            if info.type == pafs.FileType.File and info.base_name.endswith(PART_SUFFIX):
                fs.delete_file(info.path)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder for this process; it is free again however the process ends. Object stores have no locks.

        Raises StorageError in one line if another process holds it.
        """
        if is_remote(self.path):
            yield
            return
        with open(self.full(LOCK), "a") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise StorageError(
                    f"another run is at work in {self.path}; wait for it or give another --out"
                ) from error
            yield

    @contextlib.contextmanager
    def writer(self, name: str) -> Iterator[IO[bytes]]:
        """A binary stream whose content appears as file `name` when the block ends well, and not otherwise."""
        fs, root = self._fs
        final = f"{root}/{name}"
        if not isinstance(fs, pafs.LocalFileSystem):
            buffer = io.BytesIO()  # gathered first: an upload closed by an error would publish half an object
            yield buffer
            with fs.open_output_stream(final) as upload:
                upload.write(buffer.getbuffer())
            return
        aside = Path(f"{final}.{uuid.uuid4().hex[:8]}{PART_SUFFIX}")
        aside.parent.mkdir(parents=True, exist_ok=True)
        try:
            with aside.open("wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            aside.replace(final)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise

    def write_bytes(self, name: str, data: bytes) -> None:
        with self.writer(name) as stream:
            stream.write(data)

    def read_bytes(self, name: str) -> bytes:
        fs, root = self._fs
        with fs.open_input_stream(f"{root}/{name}") as stream:
            return stream.read()

    def sha256(self, name: str) -> str:
        """Hex SHA-256 of a file."""
        digest = hashlib.sha256()
        fs, root = self._fs
        with fs.open_input_stream(f"{root}/{name}") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()

    def write_json(self, name: str, value: Any) -> None:
        self.write_bytes(name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def read_json(self, name: str) -> Any:
        return json.loads(self.read_bytes(name))

    def write_table(self, name: str, table: pa.Table) -> str:
        """Writes Parquet and returns the SHA-256 of its bytes.

        Embeddings do not compress, hence lz4: fast, and good enough for the text beside them.
        """
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="lz4", use_dictionary=False, row_group_size=16_384)
        self.write_bytes(name, buffer.getvalue())
        return hashlib.sha256(buffer.getbuffer()).hexdigest()

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        fs, root = self._fs
        return pq.read_table(f"{root}/{name}", columns=columns, filesystem=fs, partitioning=None)


def without_secrets(uri: str) -> str:
    """A URI as it may be shown and published: without user, password and settings of the store."""
    if "://" not in uri:
        return uri
    return re.sub(r"(?<=://)[^/@\s]*@", "", re.sub(r"\?\S*", "", uri))


@functools.lru_cache(maxsize=32)
def open_filesystem(path: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a path or URI, and the path inside it.

    Raises StorageError if the scheme is unknown or the store cannot be set up.
    """
    if not is_remote(path):
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(path.removeprefix("file://")))
    try:
        return pafs.FileSystem.from_uri(path.rstrip("/"))
    except (pa.ArrowInvalid, OSError) as error:
        raise StorageError(f"cannot open {path}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0]


@functools.lru_cache(maxsize=256)
def _sha256(path: str, size: int, mtime_ns: int) -> str:  # noqa: ARG001 - size and time key the cache
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def folder_sha256(folder: Path, patterns: tuple[str, ...]) -> str:
    """Hex SHA-256 over names and contents of the files below a folder that match one of the patterns."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.rglob(pattern) if path.is_file()}):
        digest.update(f"{path.relative_to(folder).as_posix()} {file_sha256(path)}\n".encode())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file, computed once while it does not change."""
    stat = path.stat()
    return _sha256(str(path), stat.st_size, stat.st_mtime_ns)

"""Files and objects as streams that are read forwards; a transfer that breaks off goes on."""

from __future__ import annotations

import contextlib
import hashlib
import io
from typing import IO, Any

import pyarrow as pa
import pyarrow.fs as pafs

from pds_ray.store.calls import with_retries

STREAM_BUFFER_BYTES = 1024**2
PIECE_S = 60.0
"""Seconds for STREAM_BUFFER_BYTES of an object, on the slowest line."""


class _RemoteFile(io.RawIOBase):
    """A reader of an object.

    A transfer that breaks off is resumed where it stopped, and never mistaken for the end.
    """

    def __init__(self, file: pa.NativeFile, where: str) -> None:
        self._file = file
        self._where = where
        self._position = 0
        self._size: int | None = None
        with contextlib.suppress(io.UnsupportedOperation):  # a server that does not tell it
            self._size = file.size()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._size is not None

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if self._size is None:
            raise io.UnsupportedOperation("the server does not tell the size of the file")
        starts = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}
        self._position = starts[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = len(buffer)
        if self._size is not None:
            wanted = max(0, min(wanted, self._size - self._position))  # beyond the end is nothing
        data = with_retries(lambda: self._read(wanted), self._where, PIECE_S)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _read(self, wanted: int) -> bytes:
        data = self._file.read_at(wanted, self._position) if wanted else b""
        if wanted and not data and self._size is not None:
            raise OSError(f"the transfer ended after {self._position} of {self._size} bytes")
        return data

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def read_at(file: pa.NativeFile, position: int, size: int) -> bytes:
    """Return exactly `size` bytes from `position`. Raises OSError if there are fewer."""
    data = file.read_at(size, position) if size else b""
    if len(data) < size:
        raise OSError(f"the transfer ended after {len(data)} of {size} bytes")
    return data


def open_stream(filesystem: pafs.FileSystem, path: str, where: str) -> io.BufferedReader:
    """Open a file for reading forwards, without decompression.

    `where` is its path or URI, for messages. Raises FileNotFoundError if the file is missing, and
    StorageError if its object store keeps failing.
    """
    if isinstance(filesystem, pafs.LocalFileSystem):
        return io.BufferedReader(
            filesystem.open_input_stream(path, compression=None), STREAM_BUFFER_BYTES
        )
    file = with_retries(lambda: _RemoteFile(filesystem.open_input_file(path), where), where)
    return io.BufferedReader(file, STREAM_BUFFER_BYTES)


class Hashed(io.RawIOBase):
    """A binary stream that counts and hashes what is written to it."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__()
        self._stream = stream
        self._digest = hashlib.sha256()
        self._bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        self._digest.update(data)
        self._bytes += len(data)
        return self._stream.write(data)

    @property
    def sha256(self) -> str:
        """The hex SHA-256 of what was written."""
        return self._digest.hexdigest()

    def entry(self) -> dict[str, Any]:
        """Return the manifest's entry of the file."""
        return {"bytes": self._bytes, "sha256": self.sha256}

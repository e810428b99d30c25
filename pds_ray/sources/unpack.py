"""Compressed files unpacked as a stream, and names of files by the bytes with which they begin."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zlib
from collections.abc import Callable
from typing import Any

import pyarrow as pa

MAX_EXPANSION = 100
"""Bytes that a compressed archive may give per byte read of it, once it has given EXPANSION_FREE.

Images hardly compress; zeros do 1000:1.
"""
EXPANSION_FREE = 64 * 1024**2

DAMAGE = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError)
"""Errors of a damaged archive, as reading it raises them."""

UNPACKERS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda stream: gzip.GzipFile(fileobj=stream, mode="rb"),
    b"BZh": lambda stream: _Joined(stream, bz2.BZ2Decompressor),
    b"\xfd7zXZ\0": lambda stream: _Joined(stream, lzma.LZMADecompressor),
    b"\x28\xb5\x2f\xfd": lambda stream: pa.CompressedInputStream(pa.PythonFile(stream), "zstd"),
}
"""First bytes of a compressed file -> what makes a stream of its content."""

BEGINNINGS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself",
    b"<": "an HTML or XML page, not an archive",
    b"{": "JSON, not an archive",
    b"PK\3\4": "a zip archive, not a tar",
    b"Rar!": "a rar archive, not a tar",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive, not a tar",
    b"\x04\x22\x4d\x18": "an lz4 file; only gz, bz2, xz and zst are unpacked",
    b"PAR1": "a Parquet file, not a tar",
}
"""First bytes of what is found in the place of a tar -> its name."""


def describe(begins: bytes) -> str:
    """Name the kind of a file that is no tar by its first bytes; "" if it is not known."""
    text = begins.removeprefix(b"\xef\xbb\xbf").lstrip()
    return next((name for bytes_, name in BEGINNINGS.items() if text.startswith(bytes_)), "")


def unpacked(stream: io.BufferedReader) -> io.BufferedReader | Unpacked:
    """Return the stream, or that of its content if it begins as a compressed file does."""
    begins = stream.peek(8)
    for magic, make in UNPACKERS.items():
        if begins.startswith(magic):
            return Unpacked(stream, make)
    return stream


class Unpacked:
    """The content of a compressed stream.

    Reading raises one of DAMAGE: tarfile.ReadError where it expands beyond MAX_EXPANSION.
    """

    def __init__(self, stream: io.BufferedReader, make: Callable[[Any], Any]) -> None:
        self._compressed = _Counted(stream)
        self._content = make(self._compressed)
        self._given = 0

    def read(self, size: int) -> bytes:
        """Return so many bytes, fewer at the end alone."""
        try:
            data = self._content.read(size)
        except OSError as error:  # by which some decompressors report damage
            if self._compressed.failed:
                raise
            raise tarfile.ReadError(str(error)) from error
        self._given += len(data)
        if self._given > max(EXPANSION_FREE, MAX_EXPANSION * self._compressed.taken):
            raise tarfile.ReadError(
                f"expands to more than {MAX_EXPANSION} times its compressed size"
            )
        return data


class _Joined:
    """The content of compressed streams that are joined, with zeros between them.

    The classes of the standard library for such files take anything else behind a stream for
    nothing, be it another one whose first bytes are damaged.
    """

    def __init__(self, stream: _Counted, make: Callable[[], Any]) -> None:
        self._stream = stream
        self._make = make
        self._decompressor = make()

    def read(self, size: int) -> bytes:
        """Return so many bytes, fewer at the end alone. Raises one of DAMAGE, or OSError."""
        pieces: list[bytes] = []
        while size > 0 and (piece := self._next(size)):
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)

    def _next(self, most: int) -> bytes:
        """Return some bytes, none at the end."""
        content = b""
        while not content:
            packed = b""
            if self._decompressor.eof:
                packed = self._behind(self._decompressor.unused_data)
                if not packed:
                    return b""
                self._decompressor = self._make()
            elif self._decompressor.needs_input:
                packed = self._stream.read(io.DEFAULT_BUFFER_SIZE)
                if not packed:
                    raise EOFError("the compressed file ends early")
            content = self._decompressor.decompress(packed, most)
        return content

    def _behind(self, unused: bytes) -> bytes:
        """Return the first bytes behind a stream and its zeros, none at the end of the file."""
        packed = unused.lstrip(b"\0")
        while not packed and (more := self._stream.read(io.DEFAULT_BUFFER_SIZE)):
            packed = more.lstrip(b"\0")
        return packed


class _Counted(io.RawIOBase):
    """A stream that counts the bytes read of it and knows whether reading it failed."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream
        self.taken = 0
        self.failed = False

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        try:
            data = self._stream.read(size)
        except OSError:
            self.failed = True
            raise
        self.taken += len(data)
        return data

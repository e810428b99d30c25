"""A tar archive read strictly forwards, plain or gzipped, whatever its bytes are.

Headers are parsed by `tarfile`; the walk is our own, because tarfile's stream mode takes a damaged
header for the end of the archive (the samples behind it would vanish unreported), reads extension
headers of any declared size into memory, and keeps every header it has seen. Memory holds one
member; work is bounded by the size of the file.
"""

from __future__ import annotations

import gzip
import io
import re
import tarfile
import zlib
from collections.abc import Iterator

MAX_HEADER_BYTES = 64 * 1024
"""Largest extension header (PAX, GNU long name) that is read: a path and a few attributes."""

MAX_EXPANSION = 100
"""Bytes that a gzipped archive may give per byte read of it, once it has given EXPANSION_FREE.

Images hardly compress; zeros do 1000:1.
"""
EXPANSION_FREE = 64 * 1024**2

DAMAGE = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile)
"""Errors of a damaged archive, as reading it raises them."""

_PAX_RECORD = re.compile(rb"(\d{1,9}) ([^=]+)=")


class TarReader:
    """An iterator over the members of a tar; `read` returns the data of the current one.

    Damage raises one of `DAMAGE`, for which tarfile.ReadError stands where the tar itself is
    damaged.
    """

    def __init__(self, stream: io.BufferedReader) -> None:
        """Read from `stream`, which is unpacked if it begins as a gzip file does."""
        self._stream = _Gunzip(stream) if stream.peek(2)[:2] == b"\x1f\x8b" else stream
        self._unread = 0
        self._padding = 0
        self.started = False
        """A valid header has been found, so this is a tar."""

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        overrides: dict[str, str] = {}
        while (member := self._next_header()) is not None:
            if member.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
                attribute = "path" if member.type == tarfile.GNUTYPE_LONGNAME else "linkpath"
                overrides[attribute] = _decode(self._read_extension(member).rstrip(b"\0"))
            elif member.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                records = _parse_pax(self._read_extension(member))
                for keyword in records.keys() & {"path", "linkpath", "size"}:
                    overrides[keyword] = records[keyword]
            elif member.type == tarfile.XGLTYPE:
                # defaults for all members: comments in practice, never a name
                self._read_extension(member)
            else:
                member.name = overrides.get("path", member.name)
                member.linkname = overrides.get("linkpath", member.linkname)
                if "size" in overrides:
                    member.size = _parse_size(overrides["size"])
                overrides = {}
                if member.isreg() or member.type not in tarfile.SUPPORTED_TYPES:
                    self._expect(member.size)
                yield member

    def read(self) -> bytes:
        """Return the data of the current member, whole."""
        data = self._take(self._unread)
        self._unread = 0
        return data

    def _next_header(self) -> tarfile.TarInfo | None:
        """Return the next header block, None at the end-of-archive mark."""
        self._skip(self._unread + self._padding)
        self._expect(0)
        block = self._stream.read(tarfile.BLOCKSIZE)
        if block == bytes(tarfile.BLOCKSIZE):
            self.started = True
            return None
        if not block:
            raise tarfile.ReadError("the file ends without an end-of-archive mark")
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error
        if member.size < 0:
            raise tarfile.ReadError("negative size in header")
        self.started = True
        return member

    def _read_extension(self, member: tarfile.TarInfo) -> bytes:
        if member.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(
                f"extension header of {member.size} bytes, at most {MAX_HEADER_BYTES}"
            )
        self._expect(member.size)
        return self.read()

    def _expect(self, size: int) -> None:
        self._unread = size
        self._padding = -size % tarfile.BLOCKSIZE

    def _take(self, size: int) -> bytes:
        data = self._stream.read(size)
        if len(data) < size:
            raise tarfile.ReadError("unexpected end of data")
        return data

    def _skip(self, size: int) -> None:
        while size > 0:
            size -= len(self._take(min(size, 1024**2)))


def _decode(raw: bytes) -> str:
    # as plain headers are decoded: keys must be storable as UTF-8
    return raw.decode("utf-8", "backslashreplace")


def _parse_pax(data: bytes) -> dict[str, str]:
    """Parse PAX records, each `LENGTH KEYWORD=VALUE\\n`; LENGTH counts the whole record's bytes."""
    records: dict[str, str] = {}
    start, stop = 0, len(data.rstrip(b"\0"))
    while start < stop:
        match = _PAX_RECORD.match(data, start)
        end = start + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(data):
            raise tarfile.ReadError("damaged PAX header")
        records[_decode(match[2])] = _decode(data[match.end() : end - 1])
        start = end
    return records


def _parse_size(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,19}", text):
        raise tarfile.ReadError("damaged size in PAX header")
    return int(text)


class _Gunzip:
    """The content of a gzip file; tarfile.ReadError where it expands beyond MAX_EXPANSION."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._compressed = _Counted(stream)
        self._unzipped = gzip.GzipFile(fileobj=self._compressed, mode="rb")
        self._given = 0

    def read(self, size: int) -> bytes:
        data = self._unzipped.read(size)
        self._given += len(data)
        if self._given > max(EXPANSION_FREE, MAX_EXPANSION * self._compressed.taken):
            raise tarfile.ReadError(
                f"expands to more than {MAX_EXPANSION} times its compressed size"
            )
        return data


class _Counted(io.RawIOBase):
    """A stream that counts the bytes read of it."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream
        self.taken = 0

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self.taken += len(data)
        return data

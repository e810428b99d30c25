"""Tar archives read strictly forwards, plain or compressed, whatever the bytes are.

Headers are parsed by `tarfile`; the walk is our own, because tarfile's stream mode takes a damaged
header for the end of the archive (the samples behind it would vanish unreported), reads extension
headers of any declared size into memory, and keeps every header it has seen. Memory holds one
member; work is bounded by the size of the file.

An archive ends with zeros, and a file may hold several archives, joined. A hole is zeros as well: a
download that was preallocated and never finished, or a disk that lost a block. It is told from an
end by its length.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator

from pds_ray.sources.unpack import describe, unpacked

MAX_HEADER_BYTES = 1024**2
"""Largest extension header (PAX, GNU long name) that is read: a path, and what systems note."""

RECORDS = (20 * tarfile.BLOCKSIZE, *(tarfile.BLOCKSIZE << power for power in range(12)))
"""Multiples of bytes to which tar fills up the end of an archive.

The first is the default of every tar; `tar -b` takes others, in practice powers of two up to the
megabyte of tape drives.
"""

_PAX_RECORD = re.compile(rb"(\d{1,9}) ([^=]+)=")
_EXTENSIONS = (
    tarfile.XHDTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_HOLES = frozenset({"GNU.sparse.size", "GNU.sparse.major"})
"""Keywords of which every file with holes has one, by the version of its format."""
_KEYWORDS = frozenset({"path", "linkpath", "size", "GNU.sparse.name"}) | _HOLES
"""Keywords that count; of others the values, which may be large, are not kept."""


class Member(tarfile.TarInfo):
    """A member of a tar. One with holes has the type GNUTYPE_SPARSE, whatever the format."""

    problem = ""
    """Why it must not be read, "" if it may."""


class TarReader:
    """An iterator over the members of a tar; `read` returns the data of the current one.

    Damage raises one of `unpack.DAMAGE`, for which tarfile.ReadError stands where the tar itself is
    damaged.
    """

    def __init__(self, stream: io.BufferedReader) -> None:
        """Read from `stream`, which is unpacked if it begins as a compressed file does."""
        self._begins = stream.peek(tarfile.BLOCKSIZE)[: tarfile.BLOCKSIZE]
        self._stream = unpacked(stream)
        self._offset = 0
        self._begin = 0
        """The offset at which the current archive begins."""
        self._unread = 0
        self._padding = 0
        self.started = False
        """A valid header has been found, so this is a tar."""

    def __iter__(self) -> Iterator[Member]:
        overrides: dict[str, str] = {}
        problem = ""
        while (member := self._next_header()) is not None:
            if member.type == tarfile.XGLTYPE:
                # defaults for all members: comments in practice, never a name
                self._expect(member.size)
            elif member.type in _EXTENSIONS and member.size > MAX_HEADER_BYTES:
                # stepped over; the name and the size of the member may be in it
                self._expect(member.size)
                problem = f"a header of {member.size:,} bytes, at most {MAX_HEADER_BYTES:,}"
            elif member.type in _EXTENSIONS:
                self._expect(member.size)
                overrides |= _parse_extension(member.type, self.read())
            else:
                _override(member, overrides)
                member.problem = problem
                overrides, problem = {}, ""
                if member.isreg() or member.type not in tarfile.SUPPORTED_TYPES:
                    self._expect(member.size)
                yield member

    def read(self) -> bytes:
        """Return the data of the current member, whole."""
        data = self._take(self._unread)
        self._unread = 0
        return data

    def _next_header(self) -> Member | None:
        """Return the next header, None at the end of the file."""
        self._skip(self._unread + self._padding)
        self._expect(0)
        block = self._get(tarfile.BLOCKSIZE)
        zeros = 0
        if block == bytes(tarfile.BLOCKSIZE):
            zeros, block = self._count_zeros()
            ended = self._offset - len(block)
            self._check_end(zeros, ended - self._begin)
            self._begin = ended
            if not block:
                self.started = True
                return None
        if not block:
            raise tarfile.ReadError("the file ends without an end-of-archive mark")
        try:
            member = Member.frombuf(block, "utf-8", "backslashreplace")
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(self._no_header(str(error), zeros)) from error
        if member.size < 0:
            raise tarfile.ReadError("negative size in header")
        self.started = True
        if member.type == tarfile.GNUTYPE_SPARSE:
            self._skip_map(goes_on=block[482] != 0)
        return member

    def _skip_map(self, goes_on: bool) -> None:
        """Step over the blocks in which the map of a file with holes goes on.

        The size of the member leaves them out.
        """
        while goes_on:
            goes_on = self._take(tarfile.BLOCKSIZE)[504] != 0

    def _count_zeros(self) -> tuple[int, bytes]:
        """Return the length of a run of zeros whose first block is read, and the block behind it.

        No further block is read than an end may have zeros.
        """
        zeros, block = tarfile.BLOCKSIZE, self._get(tarfile.BLOCKSIZE)
        while block and not block.strip(b"\0") and zeros <= RECORDS[-1] + tarfile.RECORDSIZE:
            zeros += len(block)
            block = self._get(tarfile.BLOCKSIZE)
        return zeros, block

    def _check_end(self, zeros: int, length: int) -> None:
        """Raise tarfile.ReadError if so many zeros are no end of an archive but a hole.

        `length` is that of the archive with the zeros. An end is two blocks, filled up to a record.
        Records other than that of every tar have to divide the archive; one without members is
        filled up to that alone.
        """
        records = [size for size in RECORDS if length % size == 0] if self.started else []
        if zeros > max([RECORDS[0], *records]) + tarfile.BLOCKSIZE:
            where = "after the last file" if self.started else "where the first file should begin"
            raise tarfile.ReadError(
                f"{zeros:,} bytes of zeros {where}: a download that was not finished?"
            )

    def _no_header(self, problem: str, zeros: int) -> str:
        """Say what stands in the place of a header."""
        if not self.started:
            return describe(self._begins) or problem
        if zeros:
            return f"{zeros:,} bytes of zeros, and data behind them that begin no archive"
        return problem

    def _expect(self, size: int) -> None:
        self._unread = size
        self._padding = -size % tarfile.BLOCKSIZE

    def _take(self, size: int) -> bytes:
        data = self._get(size)
        if len(data) < size:
            raise tarfile.ReadError("unexpected end of data")
        return data

    def _get(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._offset += len(data)
        return data

    def _skip(self, size: int) -> None:
        while size > 0:
            size -= len(self._take(min(size, 1024**2)))


def _decode(raw: bytes) -> str:
    # as plain headers are decoded: keys must be storable as UTF-8
    return raw.decode("utf-8", "backslashreplace")


def _override(member: Member, records: dict[str, str]) -> None:
    """Give a member what the headers in front of it say of it."""
    member.name = records.get("GNU.sparse.name", records.get("path", member.name))
    member.linkname = records.get("linkpath", member.linkname)
    if "size" in records:
        member.size = _parse_size(records["size"])
    if member.isreg() and records.keys() & _HOLES:
        member.type = tarfile.GNUTYPE_SPARSE


def _parse_extension(kind: bytes, data: bytes) -> dict[str, str]:
    """Return what an extension header says of the member behind it, by the PAX keyword."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": _decode(data.rstrip(b"\0"))}
    if kind == tarfile.GNUTYPE_LONGLINK:
        return {"linkpath": _decode(data.rstrip(b"\0"))}
    return _parse_pax(data)


def _parse_pax(data: bytes) -> dict[str, str]:
    """Parse PAX records, each `LENGTH KEYWORD=VALUE\\n`; LENGTH counts the whole record's bytes."""
    records: dict[str, str] = {}
    start, stop = 0, len(data.rstrip(b"\0"))
    while start < stop:
        match = _PAX_RECORD.match(data, start)
        end = start + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(data):
            raise tarfile.ReadError("damaged PAX header")
        if (keyword := _decode(match[2])) in _KEYWORDS:
            records[keyword] = _decode(data[match.end() : end - 1])
        start = end
    return records


def _parse_size(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,19}", text):
        raise tarfile.ReadError("damaged size in PAX header")
    return int(text)

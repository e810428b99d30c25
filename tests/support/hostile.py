"""Shards, images and captions made to do harm, for tests and fuzzers, and ways to read them."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from pds_ray.sources.base import Fault, Sample, Shard
from pds_ray.sources.webdataset import WebDatasetSource

END_MARK = bytes(1024)
MIB = 1 << 20


def read(path: Path, **limits: int) -> list[Sample | Fault]:
    """Return what a shard gives."""
    return list(WebDatasetSource(str(path), **limits).read(Shard("x", str(path))))


def read_bytes(folder: Path, data: bytes, **limits: int) -> list[Sample | Fault]:
    """Return what a shard of these bytes gives."""
    (folder / "x.tar").write_bytes(data)
    return read(folder / "x.tar", **limits)


def brief(items: list[Sample | Fault]) -> list[tuple[str, str]]:
    """(key, reason), the reason of a sample being ""."""
    return [(item.key, item.reason if isinstance(item, Fault) else "") for item in items]


@contextmanager
def memory(limit: int) -> Iterator[None]:
    """Pass if Python's memory grew by less than `limit` bytes meanwhile."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < limit, f"{peak:,} bytes"


def tar_bytes(members: list[tuple[str, bytes]], fmt: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar of these members, as tarfile writes it, up to its end mark."""
    buffer = io.BytesIO()
    end = 0
    with tarfile.open(fileobj=buffer, mode="w", format=fmt) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        end = tar.offset
    return buffer.getvalue()[: end + len(END_MARK)]


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    """One raw header block, whatever it claims."""
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info.tobuf(tarfile.GNU_FORMAT)


def block(data: bytes) -> bytes:
    """Data filled up to a multiple of 512 bytes."""
    return data + bytes(-len(data) % 512)


def member(name: str, data: bytes) -> bytes:
    return header(name, len(data)) + block(data)


def pax(*records: tuple[bytes, bytes]) -> bytes:
    """An extended header with these records."""
    body = b""
    for keyword, value in records:
        length = len(keyword) + len(value) + 3
        while len(b"%d" % length) + len(keyword) + len(value) + 3 != length:
            length = len(b"%d" % length) + len(keyword) + len(value) + 3
        body += b"%d %s=%s\n" % (length, keyword, value)
    return header("pax", len(body), tarfile.XHDTYPE) + block(body)


def long_name(name: bytes) -> bytes:
    return header("././@LongLink", len(name) + 1, tarfile.GNUTYPE_LONGNAME) + block(name + b"\0")


def sample(key: str, image: bytes = b"image", caption: bytes = b"a caption") -> bytes:
    """The two members of a good sample."""
    return member(f"{key}.jpg", image) + member(f"{key}.txt", caption)


GOOD = sample("good")


def _checked(head: bytes) -> bytes:
    """A header with the checksum that belongs to it."""
    head = head[:148] + b" " * 8 + head[156:]
    return head[:148] + b"%06o\0 " % sum(head) + head[156:]


def _with_size(size_field: bytes) -> bytes:
    head = header("bad.jpg")
    return _checked(head[:124] + size_field + head[136:])


def _sparse(extended: bool) -> bytes:
    head = header("bad.jpg", 512, tarfile.GNUTYPE_SPARSE)
    table = b"%011o\0%011o\0" % (1 << 32, 512) * 4
    return _checked(head[:386] + table + bytes([extended]) + b"%011o\0" % (1 << 32) + head[495:])


SHARDS: dict[str, bytes] = {
    "parent": sample("../../escaped"),
    "parent within": sample("x/../../../escaped"),
    "absolute": sample("/tmp/escaped"),
    "drive": sample("C:\\..\\escaped"),
    "pax path": pax((b"path", b"../../escaped.jpg")) + member("bad.jpg", b"image"),
    "long name": long_name(b"/etc/cron.d/escaped.jpg") + member("bad.jpg", b"image"),
    "symbolic link": header("bad.jpg", kind=tarfile.SYMTYPE, link="/etc/passwd"),
    "link to a folder, then through it": header("bad", kind=tarfile.SYMTYPE, link="/tmp")
    + sample("bad/x"),
    "hard link": header("bad.jpg", kind=tarfile.LNKTYPE, link="good.jpg"),
    "character device": header("bad.jpg", kind=tarfile.CHRTYPE),
    "block device": header("bad.jpg", kind=tarfile.BLKTYPE),
    "fifo": header("bad.jpg", kind=tarfile.FIFOTYPE),
    "unknown type": header("bad.jpg", kind=b"~"),
    "sparse": _sparse(False) + bytes(512),
    "sparse, more to come": _sparse(True) + bytes(512) * 2,
    "pax sparse": pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.realsize", b"1099511627776"))
    + sample("bad"),
    "negative size": _with_size(b"\xff" * 12),
    "size of 2^88": _with_size(b"\x80\xff" + b"\xff" * 10),
    "size that is no number": _with_size(b"not a number"),
    "pax size of 10^18": pax((b"size", b"9" * 18)) + member("bad.jpg", b"image"),
    "pax negative size": pax((b"size", b"-512")) + member("bad.jpg", b"image"),
    "pax of a terabyte": header("pax", 1 << 40, tarfile.XHDTYPE),
    "global pax of a terabyte": header("pax", 1 << 40, tarfile.XGLTYPE),
    "long name of a terabyte": header("name", 1 << 40, tarfile.GNUTYPE_LONGNAME),
    "long link of a terabyte": header("name", 1 << 40, tarfile.GNUTYPE_LONGLINK),
    "image of a terabyte": header("bad.jpg", 1 << 40),
    "other file of a terabyte": header("bad.bin", 1 << 40),
    "name of 60,000 characters": long_name(b"n" * 60_000 + b".jpg") + member("x", b"image"),
    "line breaks and escapes": sample("bad\n\r\x1b]0;title\x07\x1b[2J\u202egpj\u2028"),
    "names that are formulas": sample("=cmd|'/c calc'!A0") + sample("@SUM(1)") + sample('",",\n'),
    "markup": sample("<img src=x onerror=alert(1)>", caption=b"<script>alert(1)</script>"),
    "name with a zero byte": pax((b"path", b"a\0b.jpg")) + member("bad.jpg", b"image"),
    "empty name": member("", b"x") + member(".jpg", b"image"),
    "zeros": bytes(1 << 20) + GOOD,
    "gzip in gzip": gzip.compress(gzip.compress(GOOD)),
    "pickle": b"cos\nsystem\n(S'touch escaped'\ntR.",
}
"""Hostile shards, by what is wrong with them."""

JSON: dict[str, bytes] = {
    "deep lists": b"[" * 1_000_000,
    "deep objects": b'{"a":' * 180_000,
    "deep and closed": b'{"caption":' + b"[" * 400_000 + b"]" * 400_000 + b"}",
    "huge integer": b'{"caption":"x","n":' + b"9" * 1_000_000 + b"}",
    "huge exponent": b'{"caption":"x","n":1e999999999,"m":-1E+99999}',
    "many keys": b'{"caption":"x"' + b"".join(b',"%d":0' % n for n in range(90_000)) + b"}",
    "one key many times": b"{" + b'"caption":"y",' * 70_000 + b'"caption":"x"}',
    "not numbers": b'{"caption":"x","a":NaN,"b":-Infinity}',
    "lone surrogates": rb'{"caption":"\ud800 \udfff\ud800","captions":["\udc00x"]}',
    "lists of lists": b'{"captions":[["a"],[["b"]],{"c":"d"},null,1,true],"caption":["x"]}',
    "many captions": b'{"captions":[' + b",".join(b'"%x"' % n for n in range(100_000)) + b"]}",
    "blank captions": b'{"captions":["", " ", "\\n", "\\u00a0", "\\u2028"],"caption":"\\u3000"}',
    "long caption": b'{"caption":"' + b"x" * 1_000_000 + b'"}',
    "utf-16": '{"caption":"x"}'.encode("utf-16"),
    "utf-32 with surrogates": '{"caption":"\ud800"}'.encode("utf-32-le", "surrogatepass"),
    "python": b'{"py/object/apply":"os.system","caption":"x"}',
}
"""Hostile .json files, by what is wrong with them; each little over a million bytes at most."""

CAPTIONS = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "[click](javascript:alert(1)) ![x](http://example.org/x.png)",
    "| a | b |\n| --- | --- |",
    "```\n# heading\n```",
    "---\nlicense: mit\n---",
    "=cmd|'/c calc'!A0",
    "@SUM(1+1)*cmd",
    "red \x1b[31mtext\x1b[0m \x1b]0;title\x07 \x9b2J \x1bP+q\x1b\\",
    "one\nline\rmore\x0b\x0c\x1c\x85\u2028\u2029end",
    "\u202egpj.exe\u202c \u2066x\u2069 \u200b\u200d\ufeff\u2060 \U000e0041",
    "quotes \" ' ` and, commas; \\ back",
    "nul\x00 byte",
    "{{7*7}} ${7*7} %s %n {0}",
    "x" * 5000,
)
"""Captions that mean something to whatever shows or stores them."""


def encoded(image: Image.Image, fmt: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes, pixels: bytes = b"") -> bytes:
    """A grey PNG that declares a size, whatever pixels follow."""
    start = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + start
        + b"".join(chunks)
        + png_chunk(b"IDAT", pixels)
        + png_chunk(b"IEND", b"")
    )


def zeros(size: int) -> bytes:
    """`size` zeros as a zlib stream."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(size >> 20)) + packer.flush()


def overlapping_exif(size: int, orientation: int = 0) -> bytes:
    """EXIF whose entries each claim nearly all of it; the first is the orientation, if given."""
    entries = min(65_535, size // 24)
    rows = b"".join(struct.pack(">HHII", 1000 + n, 7, size - 100, 50) for n in range(entries))
    if orientation:
        rows = struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0) + rows[12:]
    body = b"MM\0*\0\0\0\x08" + struct.pack(">H", entries) + rows
    return b"Exif\0\0" + body + bytes(size - len(body))


def jpeg_with_scans(side: int, scans: int, junk: bytes = b"") -> bytes:
    """A progressive JPEG whose last pass, some 100 bytes, is repeated, with `junk` before each."""
    data = encoded(Image.new("L", (side, side), 128), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + (junk + data[last:-2]) * scans + data[-2:]


def gif(width: int, height: int, before: bytes = b"", frames: int = 1) -> bytes:
    """A GIF whose screen declares a size; each frame is one pixel."""
    frame = b",\0\0\0\0\1\0\1\0\0\2\2\x44\1\0"
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", width, height, 0x80, 0, 0)
        + bytes(6)
        + before
        + frame * frames
        + b";"
    )


def webp_canvas(side: int, frames: int) -> bytes:
    """An animated WebP that declares a canvas; each frame is the same small image."""
    small = encoded(Image.new("RGB", (16, 16)), "WEBP", lossless=True)[12:]
    frame = bytes(6) + (15).to_bytes(3, "little") * 2 + bytes(4) + small
    chunks = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + (side - 1).to_bytes(3, "little") * 2
    chunks += (
        b"ANIM"
        + struct.pack("<I", 6)
        + bytes(6)
        + (b"ANMF" + struct.pack("<I", len(frame)) + frame) * frames
    )
    return b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WEBP" + chunks

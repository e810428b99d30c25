"""Invariants of any bytes at all, one function per place where a stranger's bytes come in."""

from __future__ import annotations

import io
import json
import unicodedata
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from pds_ray.config import FilesConfig
from pds_ray.modalities.image import FORMATS, ImageError, decode_image
from pds_ray.modalities.text import CLEANERS, MAX_CAPTIONS, MAX_CHARACTERS, clean_basic
from pds_ray.report.page import _data
from pds_ray.sources.base import REASONS, Fault, Sample
from pds_ray.sources.captions import CaptionReader
from pds_ray.sources.samples import read_samples
from pds_ray.sources.tar import TarReader
from pds_ray.sources.unpack import UNPACKERS
from pds_ray.sources.webdataset import WebDatasetSource
from pds_ray.store.card import _cell
from tests.support.hostile import (
    CAPTIONS,
    GOOD,
    JSON,
    SHARDS,
    encoded,
    gif,
    jpeg_with_scans,
    overlapping_exif,
    png,
    webp_canvas,
)

MAX_PIXELS = 1_000_000
PNG_START = b"\x89PNG\r\n\x1a\n"
CUT_EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\x01"


def storable(text: str) -> bool:
    return text.encode("utf-8").decode("utf-8") == text


def has_commands(text: str) -> bool:
    """Return whether a terminal or a line-based format acts on a text, or its writing turns."""
    return any(
        unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        or unicodedata.bidirectional(character)
        in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
        for character in text
    )


def check_captions(captions: tuple[str, ...]) -> None:
    assert len(captions) <= MAX_CAPTIONS
    assert all(storable(caption) and caption.strip() for caption in captions)
    assert len({caption.strip() for caption in captions}) == len(captions)


def tar(data: bytes) -> None:
    """A shard gives samples and faults with known reasons, no sample twice, one per member."""
    read_shard(data)
    read_shard(with_header_sums(data))


def with_header_sums(data: bytes) -> bytes:
    """Return the data with the checksums that belong to its tar headers, to get past them."""
    blocks = [data[start : start + 512] for start in range(0, len(data), 512)]
    for number, head in enumerate(blocks):
        if head[257:262] == b"ustar" and len(head) == 512:
            total = sum(head) - sum(head[148:156]) + 8 * 32
            blocks[number] = head[:148] + b"%06o\0 " % total + head[156:]
    return b"".join(blocks)


def read_shard(data: bytes) -> None:
    reader = TarReader(io.BufferedReader(io.BytesIO(data)))
    found = list(read_samples(reader, WebDatasetSource("x.tar").files, each_line=False))
    check_outcomes(found)
    if not data.startswith(tuple(UNPACKERS)):
        assert len(found) <= len(data) // 512 + 1


def check_outcomes(found: list[Sample | Fault]) -> None:
    """Samples have captions that can be stored and keys of their own, faults a known reason."""
    keys = [item.key for item in found if isinstance(item, Sample)]
    assert len(set(keys)) == len(keys)
    for item in found:
        assert storable(item.key)
        if isinstance(item, Fault):
            assert item.reason in REASONS
            assert storable(item.detail)
        else:
            assert item.captions
            check_captions(item.captions)


def record(data: bytes) -> None:
    """The .json, and the .txt, of a sample give captions that can be stored, or none."""
    reader = CaptionReader.of(FilesConfig())
    for texts in ({"json": data}, {"txt": data}, {"txt": data, "json": data}):
        for each_line in (False, True):
            check_captions(reader.read(texts, each_line).texts)


def caption(data: bytes) -> None:
    """A caption is cleaned to a bounded text, and neither the page nor the card lets it act."""
    try:
        text = data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    for clean in CLEANERS.values():
        assert len(clean(text)) <= MAX_CHARACTERS
    line = clean_basic(text)
    assert clean_basic(line) == line
    assert line == " ".join(line.split())
    assert storable(line)
    assert not has_commands(line)
    shown = _data({"text": text})
    assert json.loads(shown) == {"text": text}
    assert shown.isascii()
    assert not set("<>&") & set(shown)
    cell = _cell(text)
    assert not has_commands(cell)
    assert not set("<>`") & set(cell)


def image(data: bytes) -> None:
    """Bytes are an RGB image within the limits, or an ImageError that names no object."""
    decode(data)
    if data.startswith(PNG_START):
        decode(with_chunk_sums(data))


def with_chunk_sums(data: bytes) -> bytes:
    """The data with the checksums that belong to its PNG chunks."""
    chunks, start = [PNG_START], len(PNG_START)
    while start + 12 <= len(data):
        end = start + 8 + int.from_bytes(data[start : start + 4])
        chunks += [data[start:end], zlib.crc32(data[start + 4 : end]).to_bytes(4)]
        start = end + 4
    return b"".join(chunks)


def decode(data: bytes) -> None:
    outcome, detail = "", ""
    try:
        decoded = decode_image(data, max_pixels=MAX_PIXELS)
    except ImageError as error:
        outcome, detail = error.reason, error.detail
    else:
        assert decoded.mode == "RGB"
        assert decoded.width * decoded.height <= MAX_PIXELS
    assert outcome in ("", *REASONS)
    assert " at 0x" not in detail


TARGETS: dict[str, Callable[[bytes], None]] = {
    "tar": tar,
    "record": record,
    "caption": caption,
    "image": image,
}


def seeds(target: str) -> Iterator[bytes]:
    """Inputs to start from, small enough to be changed to some purpose."""
    if target == "tar":
        yield from (data + GOOD + bytes(1024) for data in SHARDS.values() if len(data) < 1 << 16)
    elif target == "record":
        yield from (data if len(data) < 1 << 12 else data[: 1 << 11] for data in JSON.values())
    elif target == "caption":
        yield from (text.encode() for text in CAPTIONS)
    else:
        grey = Image.effect_noise((24, 16), 40)
        for fmt in FORMATS:
            has_exif = fmt in ("JPEG", "PNG", "WEBP")  # Pillow reads what it writes in others
            exif = {"exif": overlapping_exif(600)} if has_exif else {}
            yield gif(4, 4) if fmt == "GIF" else encoded(grey.convert("RGB"), fmt, **exif)
        yield encoded(grey.convert("CMYK"), "JPEG", progressive=True, exif=CUT_EXIF)
        yield encoded(grey.convert("P"), "PNG", transparency=1)
        yield encoded(grey, "PNG", bits=1)
        yield encoded(grey.convert("P"), "GIF", save_all=True, append_images=[grey.convert("P")])
        yield encoded(Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16)), "PNG")
        yield from (jpeg_with_scans(16, 3), webp_canvas(16, 3), png(8, 8), gif(9, 9, frames=3))

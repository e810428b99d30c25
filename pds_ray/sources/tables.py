"""Tables that name images and say what they show: CSV and the like, JSON lines, Parquet.

A table may name an image in several rows, one caption each. The first line of a CSV tells the
delimiter, and whether it is a header; without one the image comes first and the caption last, as in
the `.token` files of Flickr8K and Flickr30K (`1000.jpg#0<TAB>A child ...`). A row without a caption
says nothing of its image.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pds_ray.config import FilesConfig
from pds_ray.modalities.text import MAX_CAPTIONS, decode_text
from pds_ray.sources.base import SourceError
from pds_ray.sources.captions import CAPTION_KEYS, CaptionReader, Names

MAX_TABLE_BYTES = 256 * 1024**2
"""Largest table, as it is parsed whole."""
IMAGE_COLUMNS = (
    *("file_name", "filename", "image", "image_name", "image_path", "filepath"),
    *("image_file", "img", "file", "path", "name"),
)
"""Names of the column of images, in any case, in the order in which they count."""
COLUMN_KEYS = Names(
    CAPTION_KEYS.always,
    (*CAPTION_KEYS.otherwise, "txt", "comment", "prompt", "title", "description", "sentence"),
)
"""Names of columns of captions."""
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Names by which Hugging Face knows the table of a folder of images."""
DELIMITERS = "|\t;,"
SHOWN = 8  # names of columns that a message shows
_SENTENCE_NUMBER = re.compile(r"#\w+$")  # of the .token files: #0 to #4, #enc

Record = Mapping[str, Any]
Images = list[tuple[str, tuple[str, ...]]]
"""(path, captions) of every image."""


def is_table(name: str) -> bool:
    """Return whether a file is, by its name, a table of whatever kind."""
    lower = name.lower()
    return lower.endswith((".csv", ".tsv", ".token", ".token.txt")) or lower == "captions.txt"


def column_reader(options: FilesConfig) -> CaptionReader:
    """Return the reader of captions from columns that the options ask for."""
    reader = CaptionReader.of(options)
    return dataclasses.replace(reader, keys=COLUMN_KEYS) if reader.keys is CAPTION_KEYS else reader


def column_names(names: list[str]) -> str:
    """Return the names of columns as a message shows them."""
    return ", ".join(name[:40] for name in names[:SHOWN]) + (", ..." if names[SHOWN:] else "")


def read_table(path: Path, suffixes: tuple[str, ...], captions: CaptionReader) -> Images:
    """Return the images that a table names, once each and in its order, each with its captions.

    An image is a path as the table has it, with slashes. `suffixes` are those of images, by which a
    table without a header is known. Raises SourceError in one line if the table cannot be used.
    """
    images: defaultdict[str, list[str]] = defaultdict(list)
    record: Record = {}
    try:
        if path.stat().st_size > MAX_TABLE_BYTES:
            raise SourceError(f"{path} holds more than {MAX_TABLE_BYTES} bytes; cut it in several")
        for number, record in enumerate(_records(path, suffixes), 1):
            image = _image(record)
            if image is None:
                raise SourceError(
                    f"{path}, row {number}: it names no image (as file_name); "
                    f"it has {column_names(list(record)) or 'nothing'}"
                )
            path_of_image = PurePosixPath(image.replace("\\", "/")).as_posix()  # without ./
            images[path_of_image] += captions.of_record(record)
    except SourceError:
        raise
    except (OSError, ValueError, pa.ArrowException, csv.Error) as error:
        raise SourceError(f"{path} cannot be read: {error}") from error
    if not any(images.values()):
        raise SourceError(
            f"{path} has no captions; it has {column_names(list(record)) or 'no row'}; name the "
            "column with --read.caption-keys"
        )
    return [
        (image, tuple(islice(dict.fromkeys(texts), MAX_CAPTIONS)))
        for image, texts in images.items()
    ]


def _image(record: Record) -> str | None:
    """Return the image that a record names."""
    lower = {name.lower(): value for name, value in record.items()}
    values = (lower.get(name) for name in IMAGE_COLUMNS)
    return next((value for value in values if isinstance(value, str) and value), None)


def _records(path: Path, suffixes: tuple[str, ...]) -> Iterator[Record]:
    if path.suffix == ".parquet":
        file = pq.ParquetFile(path)
        groups = (file.metadata.row_group(number) for number in range(file.num_row_groups))
        if sum(group.total_byte_size for group in groups) > MAX_TABLE_BYTES:
            raise SourceError(f"{path} unpacks to more than {MAX_TABLE_BYTES} bytes")
        return iter(file.read().to_pylist())
    text, _ = decode_text(path.read_bytes())
    if path.suffix == ".jsonl":
        return _json_lines(text)
    return _csv_records(text, suffixes)


def _json_lines(text: str) -> Iterator[Record]:
    for number, line in enumerate(io.StringIO(text), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number}: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"line {number}: it is no JSON object")
        yield record


def _csv_records(text: str, suffixes: tuple[str, ...]) -> Iterator[Record]:
    first = text.lstrip().partition("\n")[0]
    delimiter = next((mark for mark in DELIMITERS if _splits(first, mark, suffixes)), ",")
    headless = _is_image(first.partition(delimiter)[0], suffixes)
    # in these two a quotation mark is one, and would swallow rows up to the next
    plain = delimiter == "|" or (headless and delimiter == "\t")
    rows = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        quoting=csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL,
    )
    columns: list[str] = []
    for row in filter(any, rows):
        if not columns:
            columns = [name.strip() for name in row]
            if not headless:
                continue
            columns = ["file_name", *[""] * (len(row) - 2), "caption"]
        last = len(columns) - 1
        cells = [*row[:last], delimiter.join(row[last:])] if plain and row[last:] else row
        if len(cells) > len(columns) or (headless and not plain and len(cells) < len(columns)):
            raise ValueError(
                f"line {rows.line_num}: {len(cells)} cells, but the first line has {len(columns)}; "
                f"a text that holds {delimiter!r} needs quotation marks"
            )
        if headless:
            cells[0] = _SENTENCE_NUMBER.sub("", cells[0])
        record = dict(zip(columns, map(str.strip, cells), strict=False))
        if swallowed := _swallowed(record, delimiter, suffixes):
            raise ValueError(
                f"line {rows.line_num}: a text holds the row of {swallowed}, because of a "
                "quotation mark that is not closed; write one within a text twice"
            )
        yield record


def _swallowed(record: Record, delimiter: str, suffixes: tuple[str, ...]) -> str:
    """Return an image whose row is part of a text in another one, "" if there is none."""
    lines = (line for cell in record.values() for line in cell.splitlines()[1:])
    rows = (map(str.strip, line.split(delimiter)) for line in lines)
    records = (dict(zip(record, row, strict=False)) for row in rows)
    images = (_image(each) for each in records if len(each) == len(record))
    return next((image for image in images if image and _is_image(image, suffixes)), "")


def _splits(line: str, delimiter: str, suffixes: tuple[str, ...]) -> bool:
    """Return whether a delimiter cuts the first line of a table so that one part is the images'."""
    first, *others = line.split(delimiter)
    names = {name.strip(' "\r').lower() for name in (first, *others)}
    return bool(others) and (_is_image(first, suffixes) or not names.isdisjoint(IMAGE_COLUMNS))


def _is_image(cell: str, suffixes: tuple[str, ...]) -> bool:
    name = _SENTENCE_NUMBER.sub("", cell.strip(' "\r')).lower()
    return name.endswith(tuple(f".{suffix}" for suffix in suffixes))

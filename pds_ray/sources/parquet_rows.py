"""Samples in the rows of a Parquet file that includes its images.

An image is a value of bytes or, as Hugging Face stores it, a struct {bytes, path}. Captions are in
the columns that the option names (`sources.tables` has the usual ones), texts or lists of texts. A
file is read forwards, page by page: memory holds ROWS_AT_ONCE rows, a page and a buffer per column,
whatever the size of its row groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from pds_ray.config import FilesConfig, listed
from pds_ray.errors import first_line
from pds_ray.modalities.text import decode_text
from pds_ray.sources.base import Fault, Sample, SourceError
from pds_ray.sources.captions import IMAGE_SUFFIXES, CaptionReader
from pds_ray.sources.listing import require_file
from pds_ray.sources.tables import column_names, column_reader
from pds_ray.sources.unpack import describe
from pds_ray.store.calls import is_remote
from pds_ray.store.filesystems import open_filesystem
from pds_ray.store.streams import open_stream

ROWS_AT_ONCE = 16
BUFFER_BYTES = 4 * 1024**2
"""Bytes of a column fetched at a time: a request each where the file is elsewhere."""
IMAGE_COLUMNS = ("image", "img", "picture", "image_bytes", *IMAGE_SUFFIXES)
"""Names of the column of images, of which the first that is there counts."""

_GONE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class _NoParquetError(ValueError):
    """A file that is no Parquet file, or whose end, which describes it, is damaged."""


@dataclass(frozen=True)
class RowReader:
    """A reader of Parquet files by the options of a run."""

    options: FilesConfig
    max_image_bytes: int

    def check(self, location: str) -> bool:
        """Return True if the file at a path or URI has columns of images and of captions.

        False stands for a file that cannot be opened, which `read` reports. Raises SourceError in
        one line if it has no such columns.
        """
        try:
            with _open(location) as file:
                self._columns(file.schema_arrow, location)
        except (*_GONE, _NoParquetError):
            return False
        return True

    def read(self, location: str) -> Iterator[Sample | Fault]:
        """Yield the samples and faults of the file at a path or URI; damage is a fault and the end.

        A sample's key is the number of its row. Raises OSError or StorageError if disk or store
        fail, which says nothing about the data.
        """
        try:
            file = _open(location)
        except _GONE as error:
            yield Fault("", "missing_shard", error.strerror or str(error))
            return
        except _NoParquetError as error:
            yield Fault("", "not_a_parquet", str(error))
            return
        with file:
            try:
                image, captions = self._columns(file.schema_arrow, location)
            except SourceError as error:  # others may have them: `check` looks at the first
                yield Fault("", "not_a_parquet", str(error))
                return
            batches = file.iter_batches(ROWS_AT_ONCE, columns=[image, *captions], use_threads=False)
            row = 0
            try:
                for batch in batches:
                    for place in range(batch.num_rows):
                        yield self._sample(f"{row:09d}", batch, place, image, captions)
                        row += 1
            except (OSError, pa.ArrowException) as error:
                if not _is_damage(error):
                    raise
                yield Fault("", "truncated_shard", f"row {row} or later: {first_line(error)}")
                return
            if row != file.metadata.num_rows:  # a damaged end may hide row groups
                detail = f"{row} rows, where its end says {file.metadata.num_rows}"
                yield Fault("", "truncated_shard", detail)

    def _sample(
        self, key: str, batch: pa.RecordBatch, place: int, image: str, captions: list[str]
    ) -> Sample | Fault:
        try:
            value = batch.column(image)[place].as_py()
        except UnicodeDecodeError as error:
            return Fault(key, "missing_image", f"its path is not UTF-8: {error}")
        path = value.get("path") if isinstance(value, dict) else None
        data = value["bytes"] if isinstance(value, dict) else value
        if not data:
            detail = f"the row has only its path, {path!r}" if path else f"no {image} in the row"
            return Fault(key, "missing_image", detail)
        if len(data) > self.max_image_bytes:
            return Fault(
                key, "member_too_large", f"{len(data)} bytes, at most {self.max_image_bytes}"
            )
        try:
            record = {name: _text(batch.column(name)[place].as_py()) for name in captions}
        except UnicodeDecodeError as error:
            return Fault(key, "missing_caption", f"it is not UTF-8: {error}")
        texts = self._captions.of_record(record)
        if texts:
            return Sample(key, data, texts)
        entries = [entry for value in record.values() if isinstance(value, dict) for entry in value]
        has = f", which has {column_names(entries)}" if entries else ""
        return Fault(key, "missing_caption", f"no caption in {column_names(captions)}{has}")

    @cached_property
    def _captions(self) -> CaptionReader:
        return column_reader(self.options)

    def _columns(self, schema: pa.Schema, location: str) -> tuple[str, list[str]]:
        """Return the columns of images and of captions. Raises SourceError in one line."""
        captions = [name for name in self._captions.keys if name in schema.names]
        image = self._image_column(schema, location)
        for name in (image, *captions):
            if schema.names.count(name) > 1:
                raise SourceError(
                    f"{location} has several columns called {name}; write it with one"
                )
        if not captions:
            raise SourceError(
                f"{location} has no captions; its columns are {column_names(schema.names)}; name "
                "those of captions with --read.caption-keys"
            )
        return image, captions

    def _image_column(self, schema: pa.Schema, location: str) -> str:
        """Return the column of images. Raises SourceError in one line."""
        possible = [field.name for field in schema if _holds_bytes(field.type)]
        chosen = self.options.image_suffixes
        names = IMAGE_COLUMNS if chosen == "auto" else listed(chosen)
        named = [name for name in names if name in possible]
        if named or (len(possible) == 1 and chosen == "auto"):
            return (named or possible)[0]
        if possible:
            raise SourceError(
                f"{location}: name the column of images, of {column_names(possible)}, with "
                "--read.image-suffixes"
            )
        addresses = [name for name in schema.names if "url" in name.lower()]
        if addresses:
            raise SourceError(
                f"{location} holds no images, only their addresses (column {addresses[0]}); "
                "download them with img2dataset first, then give what that wrote"
            )
        raise SourceError(
            f"{location} holds no images: none of its columns, {column_names(schema.names)}, is of "
            "bytes or of structs {bytes, path}; write images as one of these"
        )


def _text(value: Any) -> Any:
    """Return a value of a column of captions with text in place of bytes, as some store it."""
    if isinstance(value, list):
        return [_text(item) for item in value]
    if isinstance(value, dict):
        return {name: _text(entry) for name, entry in value.items()}
    return decode_text(value)[0] if isinstance(value, bytes) else value


def _holds_bytes(kind: pa.DataType) -> bool:
    if pt.is_struct(kind):
        return any(field.name == "bytes" and _is_binary(field.type) for field in kind)
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return pt.is_binary(kind) or pt.is_large_binary(kind) or pt.is_binary_view(kind)


def _open(location: str) -> pq.ParquetFile:
    """Open a Parquet file. Raises _NoParquetError, an error of `_GONE`, OSError or StorageError."""
    filesystem, path = open_filesystem(location)
    if is_remote(location):
        file = open_stream(filesystem, path, location)
    else:
        require_file(path)
        file = filesystem.open_input_file(path)
    try:
        return pq.ParquetFile(
            file, buffer_size=BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
        )
    except (OSError, pa.ArrowException) as error:
        if not _is_damage(error):
            raise
        file.seek(0)
        kind = describe(file.read(64))
        raise _NoParquetError(f"it is {kind}" if kind else first_line(error)) from error


def _is_damage(error: Exception) -> bool:
    """Return whether an error is of the data: one of the disk has a number."""
    return isinstance(error, pa.ArrowInvalid | pa.ArrowNotImplementedError) or (
        type(error) in (OSError, pa.ArrowException) and getattr(error, "errno", None) is None
    )

"""Annotation files of Flickr30K and COCO: the images that they name, each with its captions.

Three forms are read, plain or gzipped, and told apart by their content:

    [{"image": PATH, "caption": ...}]                       the Karpathy splits, a file per split
    {"images": [{"filename", "filepath", "split", "sentences"}]}   Karpathy's own, all splits
    {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}     COCO's own

Of more than MAX_CAPTIONS of an image the first ones count.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, cast

from pds_ray.modalities.text import MAX_CAPTIONS, storable
from pds_ray.sources.base import SourceError

MAX_ANNOTATION_BYTES = 256 * 1024**2
"""Largest annotation file, uncompressed; the largest of COCO has 140 MB."""

SPLITS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}
"""Split -> its names in Karpathy's own files.

`restval`, the rest of COCO's validation images, is trained on, as published.
"""

_WANTED = {
    *("image", "caption"),
    *("images", "filename", "filepath", "split", "sentences", "raw"),
    *("annotations", "id", "file_name", "image_id"),
}

Images = tuple[tuple[str, tuple[str, ...]], ...]
"""(path, captions) of every image."""


class _RecordError(ValueError):
    """A record that cannot be used."""


def read_annotations(path: Path, split: str) -> Images:
    """Return the images of a split, in the order in which the file first names them.

    Raises SourceError in one line if the file cannot be used.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from error
    return _parse(path, split, stat.st_mtime_ns, stat.st_size)


# one parse per process, not per shard; time and size tell a rewritten file from the old one
@lru_cache(maxsize=3)
def _parse(path: Path, split: str, _mtime_ns: int, _size: int) -> Images:
    images: defaultdict[str, list[str]] = defaultdict(list)
    try:
        for image, captions in _records(_load(path), split):
            images[image] += [storable(caption) for caption in captions if caption.strip()]
    except _RecordError as error:
        raise SourceError(f"{path}, {error}") from None
    if not images:
        raise SourceError(f"{path} has no image of the split {split}")
    return tuple((image, tuple(captions[:MAX_CAPTIONS])) for image, captions in images.items())


def _load(path: Path) -> Any:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(MAX_ANNOTATION_BYTES + 1)
        if len(data) > MAX_ANNOTATION_BYTES:
            raise SourceError(f"{path} holds more than {MAX_ANNOTATION_BYTES} bytes")
        content = json.loads(data, object_pairs_hook=_only_wanted)
    except SourceError:
        raise
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise SourceError(f"{path} cannot be read: {error}") from error
    if isinstance(content, dict):
        content = content if isinstance(content.get("images"), list) else None
    if not isinstance(content, list | dict) or not content:
        raise SourceError(f"{path} is not a JSON list of records")
    return content


def _only_wanted(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # the lists of tokens of Karpathy's COCO file alone would take half a gigabyte per worker
    return {key: value for key, value in pairs if key in _WANTED}


def _records(content: Any, split: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (path, captions) of the records of a split, an image perhaps several times."""
    if isinstance(content, list):
        return _split_records(content)
    if isinstance(content.get("annotations"), list):
        return _coco_records(content["images"], content["annotations"])
    return _karpathy_records(content["images"], SPLITS[split])


def _split_records(records: list[Any]) -> Iterator[tuple[str, list[str]]]:
    for index, record in enumerate(records):
        where = f"record {index}"
        image = _path(_object(record, where).get("image"), "image", where)
        caption = record.get("caption")
        captions = caption if isinstance(caption, list) else [caption]
        if not all(isinstance(item, str) for item in captions):
            raise _RecordError(f"{where}: 'caption' is neither a string nor a list of strings")
        yield image, captions


def _karpathy_records(images: list[Any], names: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    for index, record in enumerate(images):
        where = f"image {index}"
        if _object(record, where).get("split") not in names:
            continue
        name = _path(record.get("filename"), "filename", where)
        folder = record.get("filepath")
        sentences = record.get("sentences")
        raw = [
            sentence.get("raw") if isinstance(sentence, dict) else None
            for sentence in (sentences if isinstance(sentences, list) else [None])
        ]
        if not all(isinstance(sentence, str) for sentence in raw):
            raise _RecordError(f"{where}: 'sentences' is not a list of objects with a text 'raw'")
        place = f"{_path(folder, 'filepath', where)}/{name}" if folder else name
        yield place, cast("list[str]", raw)


def _coco_records(images: list[Any], annotations: list[Any]) -> Iterator[tuple[str, list[str]]]:
    names: dict[Any, str] = {}
    for index, record in enumerate(images):
        where = f"image {index}"
        name = _path(_object(record, where).get("file_name"), "file_name", where)
        names[str(record.get("id"))] = name
        yield name, []
    for index, record in enumerate(annotations):
        where = f"annotation {index}"
        image = names.get(str(_object(record, where).get("image_id")))
        caption = record.get("caption")
        if image is None or not isinstance(caption, str):
            raise _RecordError(f"{where}: no 'caption', or 'image_id' is none of the images")
        yield image, [caption]


def _object(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise _RecordError(f"{where}: not a JSON object")
    return record


def _path(value: Any, name: str, where: str) -> str:
    """Return a path below the folder, with slashes also where a file of Windows has others."""
    if not isinstance(value, str) or not value:
        raise _RecordError(f"{where}: '{name}' is not a path")
    path = value.replace("\\", "/")
    if path.startswith("/") or ".." in PurePosixPath(path).parts or not path.isprintable():
        raise _RecordError(
            f"{where}: image path {value!r} leaves the folder or is not a plain path"
        )
    return path

"""Flickr30K and COCO captions in the Karpathy splits, as the published code lays them out.

    Flickr30k/  flickr30k-images/  flickr30k_{train,val,test}.json
    COCO/       train2014/  val2014/  coco_karpathy_{train,val,test}.json

An annotation file is one JSON list, plain or gzipped. A record is one image with a list of
captions, or one caption as a string, in which case the image's further captions are in other
records. Of more than MAX_CAPTIONS of an image the first ones count.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath

from pds_ray.config import ReadConfig
from pds_ray.modalities.text import MAX_CAPTIONS
from pds_ray.sources.base import Fault, Sample, Shard, SourceError

SHARD_SIZE = 1000
MAX_ANNOTATION_BYTES = 256 * 1024**2
"""Largest annotation file, uncompressed; those of COCO have 70 MB."""
SPLITS = ("train", "val", "test")
ANNOTATIONS = {"flickr30k": "flickr30k_{split}.json", "coco": "coco_karpathy_{split}.json"}

Images = tuple[tuple[str, tuple[str, ...]], ...]
"""(path below the root, captions) of every image."""


class KarpathySource:
    """`flickr30k:ROOT[:SPLIT]` or `coco:ROOT[:SPLIT]`, the train split by default.

    A sample's key is the image path in the annotation file. Images come in the order in which that
    file first names them, each once with all of its captions.
    """

    def __init__(
        self, uri: str, _: ReadConfig | None = None, max_image_bytes: int = 64 * 1024**2
    ) -> None:
        self.uri = uri
        self.max_image_bytes = max_image_bytes
        self.dataset, _, root = uri.partition(":")
        head, _, tail = root.rpartition(":")
        root, self.split = (head, tail) if head and tail in SPLITS else (root, "train")
        if self.dataset not in ANNOTATIONS or not root:
            raise SourceError(
                f"{uri!r} is not {' or '.join(f'{name}:ROOT[:SPLIT]' for name in ANNOTATIONS)}"
            )
        # Absolute, because instances travel to workers that run in another folder.
        self.root = os.path.abspath(os.path.expanduser(root))
        self.validation = None if self.split == "val" else f"{self.dataset}:{self.root}:val"

    def shards(self) -> list[Shard]:
        """Return shards of 1,000 images.

        A shard's version is a digest of its records, so that an edited annotation file is another
        source. Raises SourceError if the annotations are unusable or any image is not there.
        """
        images = self._images()
        self._check_images_exist(images)
        shards = []
        for number, start in enumerate(range(0, len(images), SHARD_SIZE)):
            rows = images[start : start + SHARD_SIZE]
            digest = hashlib.blake2b(json.dumps(rows).encode(), digest_size=8).hexdigest()
            location = f"{start}:{start + len(rows)}"
            shards.append(
                Shard(f"{self.dataset}-{self.split}-{number:05d}", location, len(rows), digest)
            )
        return shards

    def read(self, shard: Shard) -> Iterator[Sample | Fault]:
        """Yield the samples and faults of a row range.

        Raises SourceError if the annotation file has gone since it was listed.
        """
        start, stop = map(int, shard.location.split(":"))
        for key, captions in self._images()[start:stop]:
            try:
                with open(os.path.join(self.root, key), "rb") as file:
                    image = file.read(self.max_image_bytes + 1)
            except (
                FileNotFoundError,
                PermissionError,
                IsADirectoryError,
                NotADirectoryError,
            ) as error:
                yield Fault(key, "missing_image", error.strerror or str(error))
                continue
            if len(image) > self.max_image_bytes:
                yield Fault(key, "member_too_large", f"more than {self.max_image_bytes} bytes")
            elif not captions:
                yield Fault(key, "missing_caption", "every caption is blank")
            else:
                yield Sample(key, image, captions)

    def _images(self) -> Images:
        plain = Path(self.root, ANNOTATIONS[self.dataset].format(split=self.split))
        for path in (plain, plain.with_name(f"{plain.name}.gz")):
            if path.is_file():
                stat = path.stat()
                return _parse_annotations(path, stat.st_mtime_ns, stat.st_size)
        raise SourceError(f"{self.uri}: there is no annotation file {plain} (or {plain.name}.gz)")

    def _check_images_exist(self, images: Images) -> None:
        # each folder is listed once, far quicker than asking for every file
        present: dict[str, set[str]] = {}
        absent = []
        for key, _ in images:
            folder, _, name = key.rpartition("/")
            if folder not in present:
                present[folder] = _names_in(os.path.join(self.root, folder))
            if name not in present[folder]:
                absent.append(key)
        if absent:
            counts = f"{len(absent)} of {len(images)} images are not in {self.root}"
            raise SourceError(f"{self.uri}: {counts}, the first: {', '.join(absent[:3])}")


def _names_in(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries}
    except (FileNotFoundError, NotADirectoryError):
        return set()


# one parse per process, not per shard; time and size tell a rewritten file from the old one
@lru_cache(maxsize=3)
def _parse_annotations(path: Path, _mtime_ns: int, _size: int) -> Images:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(MAX_ANNOTATION_BYTES + 1)
        if len(data) > MAX_ANNOTATION_BYTES:
            raise SourceError(f"{path} holds more than {MAX_ANNOTATION_BYTES} bytes")
        records = json.loads(data)
    except SourceError:
        raise
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise SourceError(f"{path} cannot be read: {error}") from error
    if not isinstance(records, list) or not records:
        raise SourceError(f"{path} is not a JSON list of records")
    images: defaultdict[str, list[str]] = defaultdict(list)
    for index, record in enumerate(records):
        problem = _problem(record)
        if problem:
            raise SourceError(f"{path}, record {index}: {problem}")
        captions = record["caption"] if isinstance(record["caption"], list) else [record["caption"]]
        images[record["image"]] += [_storable(caption) for caption in captions if caption.strip()]
    return tuple((key, tuple(captions[:MAX_CAPTIONS])) for key, captions in images.items())


def _problem(record: object) -> str:
    """Say why a record cannot be used, "" if it can."""
    if not isinstance(record, dict):
        return "not a JSON object"
    image, caption = record.get("image"), record.get("caption")
    if not isinstance(image, str) or not image:
        return "'image' is not a path"
    if image.startswith("/") or ".." in PurePosixPath(image).parts or not image.isprintable():
        return f"image path {image!r} leaves the folder or is not a plain path"
    if not isinstance(caption, str) and not (
        isinstance(caption, list) and all(isinstance(c, str) for c in caption)
    ):
        return "'caption' is neither a string nor a list of strings"
    return ""


def _storable(caption: str) -> str:
    # JSON can spell lone surrogates, which UTF-8 cannot hold
    return caption.encode("utf-8", "replace").decode("utf-8")

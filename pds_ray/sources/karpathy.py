"""Flickr30K and COCO captions in the Karpathy splits, or as Karpathy and COCO publish them.

    Flickr30k/  flickr30k-images/  flickr30k_{train,val,test}.json
    COCO/       train2014/  val2014/  coco_karpathy_{train,val,test}.json

This is how the published code lays them out. Where these annotation files are absent, the originals
are read: Karpathy's dataset_flickr30k.json and dataset_coco.json, COCO's captions_train2014.json
and the like. They lie in ROOT, ROOT/annotations or ROOT/karpathy; the images in one of `FOLDERS`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from pds_ray.config import FilesConfig
from pds_ray.sources.annotations import SPLITS, Images, read_annotations
from pds_ray.sources.base import Fault, Sample, Shard, SourceError

SHARD_SIZE = 1000
PROBE = 10
"""Images of which one has to be there for an annotation file to be that of the folder."""
ANNOTATIONS = {"flickr30k": "flickr30k_{split}.json", "coco": "coco_karpathy_{split}.json"}
ORIGINALS = {
    "flickr30k": ("dataset_flickr30k.json",),
    "coco": ("dataset_coco.json", "captions_{split}2014.json", "captions_{split}2017.json"),
}
PUBLISHED = {
    "flickr30k": "dataset_flickr30k.json (in Karpathy's caption_datasets.zip)",
    "coco": "dataset_coco.json (in Karpathy's caption_datasets.zip) or captions_{split}2014.json "
    "(in annotations_trainval2014.zip on COCO's download page)",
}
ANNOTATION_FOLDERS = ("", "annotations", "karpathy")
FOLDERS = {
    "flickr30k": (
        "flickr30k-images",
        "flickr30k_images",
        "flickr30k_images/flickr30k_images",
        "images",
        "Images",
    ),
    "coco": (
        *("train2014", "val2014", "train2017", "val2017"),
        *("images/train2014", "images/val2014", "images/train2017", "images/val2017"),
        "images",
    ),
}
"""Folders in which images lie where they do not lie where the annotation file says."""


class KarpathySource:
    """`flickr30k:ROOT[:SPLIT]` or `coco:ROOT[:SPLIT]`, the train split by default.

    A sample's key is the image path in the annotation file. Images come in the order in which that
    file first names them, each once with all of its captions.
    """

    def __init__(
        self, uri: str, _read: FilesConfig | None = None, max_image_bytes: int = 64 * 1024**2
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
            places = [os.path.join(self.root, place) for place in self._places(key)]
            try:
                with open(next(filter(os.path.exists, places), places[0]), "rb") as file:
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
        return read_annotations(self._annotations, self.split)

    @cached_property
    def _annotations(self) -> Path:
        """The first annotation file whose images are there.

        A folder may hold the annotations of other years, too. It is chosen once, for all shards,
        and travels with the instance.
        """
        files = self._annotation_files()
        there = (path for path in files if self._are_there(read_annotations(path, self.split)))
        return next(there, files[0])

    def _are_there(self, images: Images) -> bool:
        places = (place for key, _ in images[:PROBE] for place in self._places(key))
        return any(os.path.exists(os.path.join(self.root, place)) for place in places)

    def _places(self, key: str) -> list[str]:
        """Return the paths below the root at which an image may lie, the likeliest first."""
        name = key.rpartition("/")[2]
        folders = FOLDERS[self.dataset]
        return [key, f"images/{key}", *(f"{folder}/{name}" for folder in folders)]

    def _annotation_files(self) -> list[Path]:
        """Return the annotation files that are there, the preferred one first."""
        names = [
            name.format(split=self.split)
            for name in (ANNOTATIONS[self.dataset], *ORIGINALS[self.dataset])
        ]
        places = [
            Path(self.root, folder, name + packed)
            for name in names
            for folder in ANNOTATION_FOLDERS
            for packed in ("", ".gz")
        ]
        found = [path for path in places if path.is_file()]
        if not found:
            raise SourceError(
                f"{self.uri}: there is no annotation file {places[0]} (or {places[1].name}), nor "
                f"{PUBLISHED[self.dataset].format(split=self.split)}, in {self.root} or its "
                f"folder {' or '.join(ANNOTATION_FOLDERS[1:])}"
            )
        return found

    def _check_images_exist(self, images: Images) -> None:
        # each folder is listed once, far quicker than asking for every file
        present: dict[str, set[str]] = {}

        def there(place: str) -> bool:
            folder, _, name = place.rpartition("/")
            if folder not in present:
                present[folder] = _names_in(os.path.join(self.root, folder))
            return name in present[folder]

        absent = [key for key, _ in images if not any(map(there, self._places(key)))]
        if absent:
            counts = f"{len(absent)} of {len(images)} images are not in {self.root}"
            if len(absent) == len(images):
                counts += f" (looked also in its folders {', '.join(FOLDERS[self.dataset])})"
            raise SourceError(f"{self.uri}: {counts}, the first: {', '.join(absent[:3])}")


def _names_in(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries}
    except (FileNotFoundError, NotADirectoryError):
        return set()

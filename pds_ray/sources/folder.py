"""Images in a folder, each with its caption beside it or in a table: `folder:ROOT`, or the path.

| the folder holds | what is read |
| --- | --- |
| tar shards | these |
| `metadata.jsonl`, `.csv` or `.parquet`, here or below | the images that it names |
| images with files of the same stem, here or below | all images (`sources.beside`) |
| one CSV, TSV or `.token` file, and images | the images that it names (`sources.named`) |

For each shard the folders that its images lie in are listed again, or its table is read again, so
that neither driver nor workers hold a list of all files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache

from pds_ray import catalog
from pds_ray.config import FilesConfig
from pds_ray.sources.base import Fault, Sample, Shard, SourceError
from pds_ray.sources.beside import Beside
from pds_ray.sources.captions import IMAGE_SUFFIXES, CaptionReader, suffixes
from pds_ray.sources.local_files import Cutter, LocalFiles
from pds_ray.sources.named import Named
from pds_ray.sources.samples import Files
from pds_ray.sources.shard_patterns import SHARD_SUFFIXES
from pds_ray.sources.tables import METADATA, column_reader, is_table
from pds_ray.telemetry import log

VALIDATION = dict.fromkeys(("train", "test"), ("validation", "valid", "val", "dev"))
"""Name of a folder -> names that the folder of the validation split may have beside it."""


@dataclass
class _Found:
    """The finds of a look through the folder."""

    folders: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    tars: bool = False
    """A folder below has a tar."""
    parquet: str = ""
    """The path of a Parquet file below, if there is one."""
    images: Cutter = field(default_factory=Cutter)
    captioned: bool = False
    """An image has a caption file."""
    beside: int = 0
    """Images with a caption file, in folders for which no metadata of `metadata` are."""


class FolderSource:
    """A folder of tar shards or, without any, of images.

    The key of an image is its path below the folder. Images come folder by folder, in the order of
    their names, or table by table.
    """

    def __init__(
        self,
        uri: str,
        options: FilesConfig | None = None,
        max_image_bytes: int = 64 * 1024**2,
        max_text_bytes: int = 1024**2,
    ) -> None:
        self.uri = uri
        options = options or FilesConfig()
        root = os.path.expanduser(uri.removeprefix("folder:"))
        if not os.path.isdir(root):
            raise SourceError(f"there is no folder {root!r}; write folder:ROOT")
        # absolute, because instances travel to workers that run in another folder
        self.root = os.path.abspath(root)
        files = LocalFiles(os.path.realpath(root))
        images = suffixes(options.image_suffixes, IMAGE_SUFFIXES)
        known = Files(images, CaptionReader.of(options), max_image_bytes, max_text_bytes)
        self.beside = Beside(files, known, each_line=options.caption_lines == "each")
        self.named = Named(files, tuple(images), column_reader(options), max_image_bytes)
        tars = files.names("", lambda name: name.lower().endswith(SHARD_SUFFIXES))
        self.tars = catalog.make_source(f"{self.root}/*", options) if tars else None

    @property
    def validation(self) -> str | None:
        """The folder of the validation split, if it lies beside this one."""
        above, name = os.path.split(self.root)
        others = (os.path.join(above, other) for other in VALIDATION.get(name, ()))
        return next((f"folder:{path}" for path in others if os.path.isdir(path)), None)

    def shards(self) -> list[Shard]:
        """Return the tars of the folder, or shards of 1,000 images.

        The version of the latter is a digest of names, sizes and, from tables, captions. Raises
        SourceError in one line if there are no images or no captions, if it is not clear which
        table is meant, or if one cannot be used.
        """
        if self.tars is not None:
            return self.tars.shards()
        found = self._look()
        if found.metadata:
            if found.beside:
                say_left_out(self.root, found.metadata[0], found.beside)
            return self.named.shards(found.metadata, found.folders)
        if found.captioned:
            return found.images.shards
        if len(found.tables) == 1:
            return self.named.shards(found.tables, found.folders)
        raise SourceError(self._problem(found))

    def _look(self) -> _Found:
        found = _Found()
        files, named = self.beside.files, set[str]()
        for folder, names in files.walk():
            found.folders.append(folder)
            found.tars |= any(name.lower().endswith(SHARD_SUFFIXES) for name in names)
            parquet = min((each for each in names if each.lower().endswith(".parquet")), default="")
            found.parquet = found.parquet or (parquet and os.path.join(folder, parquet))
            metadata = next((name for name in METADATA if name in names), None)
            if metadata:
                found.metadata.append(os.path.join(folder, metadata))
                named.add(folder)
            found.tables += [os.path.join(folder, name) for name in sorted(names) if is_table(name)]
            for image, beside in () if _is_below(folder, named) else self.beside.images(names):
                found.beside += bool(beside)
                if found.metadata:  # nothing but its number is needed
                    continue
                paths = [os.path.join(folder, name) for name in (image, *beside)]
                found.images.add(
                    ["beside", folder], image, [(path, files.size(path)) for path in paths]
                )
                found.captioned |= bool(beside)
        found.images.end()
        return found

    def _problem(self, found: _Found) -> str:
        """Say why nothing in the folder can be read."""
        if found.tables:
            return (
                f"{self.root} has {len(found.tables)} tables ({', '.join(found.tables[:3])}); "
                "leave the one that names the images, or call it metadata.csv"
            )
        known = self.beside.known
        if found.tars:
            return f"{self.root} has tars only in the folders below it; give {self.root}/**/*.tar"
        if found.parquet and not found.images.shards:
            place = os.path.join(self.root, os.path.dirname(found.parquet), "*.parquet")
            return f"{self.root} has no image but Parquet files; give parquet:{place}"
        if not found.images.shards:
            return f"{self.root} has no tar and no image ({', '.join(known.images)})"
        return (
            f"{self.root} has images but no captions, neither in files of the same stem "
            f"({', '.join(known.captions.suffixes)}) nor in a table (metadata.jsonl, metadata.csv, "
            "or one .csv or .tsv)"
        )

    def read(self, shard: Shard) -> Iterator[Sample | Fault]:
        """Yield the samples and faults of a shard. Raises SourceError if its folder has gone."""
        if self.tars is not None:
            yield from self.tars.read(shard)
            return
        readers: dict[str, Callable[..., Iterator[Sample | Fault]]]
        readers = {"beside": self.beside.read, "named": self.named.read}
        for kind, *piece in json.loads(shard.location):
            yield from readers[kind](*piece)


def _is_below(folder: str, others: set[str]) -> bool:
    """Return whether a folder is one of others or lies below one; "" holds all."""
    while folder and folder not in others:
        folder = os.path.dirname(folder)
    return folder in others


@cache  # the shards of a source are looked for more than once
def say_left_out(root: str, table: str, images: int) -> None:
    """Say that images with captions beside them are not read, because of a table elsewhere."""
    text = (
        f"pds-ray: {images:,} images in {root} have captions beside them and are left out, as the "
        f"images are those that {table} and its like name; give their folder alone, or a table"
    )
    log.event("images_left_out", text, "warning", images=images)

"""Images that tables in their folder name, with captions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

from pds_ray.sources.base import Fault, Sample, Shard, SourceError
from pds_ray.sources.captions import CaptionReader
from pds_ray.sources.local_files import Cutter, LocalFiles, storable
from pds_ray.sources.tables import Images, read_table

PROBE = 10
"""Images of a table that are looked for to find the folder in which its paths begin."""


@dataclass(frozen=True)
class Named:
    """The images that tables below a folder name."""

    files: LocalFiles
    suffixes: tuple[str, ...]
    """Suffixes of images."""
    captions: CaptionReader
    max_image_bytes: int

    def shards(self, tables: list[str], folders: list[str]) -> list[Shard]:
        """Return the shards of all images of the tables, each table's in the order of their paths.

        `tables` and `folders` are paths below the root; the paths in a table begin in its own
        folder or, where nothing is found there, in another. Raises SourceError in one line if a
        table cannot be used, no image is there, or one lies where another table is in charge.
        """
        cut, there = Cutter(), 0
        owners = {os.path.dirname(table): table for table in tables}
        for table in tables:
            images = self._images(table)
            base = self._base(os.path.dirname(table), images, folders)
            for row, (image, captions) in enumerate(images):
                path = os.path.join(base, image)
                size = -1 if _leaves(image) else self.files.size(path)
                there += size >= 0
                if size >= 0 and (other := _other_owner(path, table, owners)):
                    raise SourceError(
                        f"{path} is named by {table} and lies beside {other}, so that it may be "
                        f"read twice; take away one of the two tables in {self.files.root}"
                    )
                cut.add(["named", table, base], row, (image, size, captions))
        cut.end()
        if not there:
            first = self._images(tables[0])[0][0]
            raise SourceError(
                f"no image that {tables[0]} names is in {self.files.root}, the first: {first}; "
                "put the table and its images into one folder"
            )
        return cut.shards

    def read(self, table: str, base: str, first: int, last: int) -> Iterator[Sample | Fault]:
        """Yield the samples and faults of some images of a table.

        Raises SourceError if the table has gone.
        """
        for image, captions in self._images(table)[first : last + 1]:
            path = os.path.join(base, image)
            key = storable(path)
            if _leaves(image):
                yield Fault(
                    key, "unsafe_member", f"the path in {storable(table)} leaves the folder"
                )
                continue
            data = self.files.read(path, key, self.max_image_bytes)
            if isinstance(data, Fault):
                yield data
            elif captions:
                yield Sample(key, data, captions)
            else:
                detail = f"no caption in {storable(table)} is a text that is not blank"
                yield Fault(key, "missing_caption", detail)

    def _base(self, own: str, images: Images, folders: list[str]) -> str:
        """Return the folder in which the paths of a table begin."""
        names = [image for image, _ in images[:PROBE] if not _leaves(image)]
        for base in (own, *folders):
            if any(self.files.size(os.path.join(base, name)) >= 0 for name in names):
                return base
        return own

    def _images(self, table: str) -> Images:
        path = Path(self.files.root, table)
        try:
            state = path.stat()
        except OSError as error:
            raise SourceError(f"{path} cannot be read: {error.strerror}") from error
        return _sorted_table(path, self.suffixes, self.captions, state.st_mtime_ns, state.st_size)


# one parse per process, not per shard; time and size tell a rewritten table from the old one
@lru_cache(maxsize=2)
def _sorted_table(
    path: Path, suffixes: tuple[str, ...], captions: CaptionReader, _mtime_ns: int, _size: int
) -> Images:
    return sorted(read_table(path, suffixes, captions))


def _other_owner(path: str, table: str, owners: dict[str, str]) -> str:
    """Return the table nearest to an image, "" if it is that of its row or one further up.

    `owners` has the tables by their folders.
    """
    folder = os.path.dirname(path)
    while folder and folder not in owners:
        folder = os.path.dirname(folder)
    further_up = not folder or table.startswith(f"{folder}/")
    return "" if further_up else owners[folder]


def _leaves(path: str) -> bool:
    return path.startswith("/") or ".." in PurePosixPath(path).parts

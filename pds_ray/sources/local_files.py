"""Files below a local folder: listed in order, and read only if they really lie there.

Hidden files and folders are passed over. Memory holds the names of one folder at a time.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pds_ray.sources.base import Fault, Shard, SourceError
from pds_ray.sources.listing import say_passed_over
from pds_ray.store.run_folder import result_in

SHARD_SIZE = 1000
"""Images per shard."""
OF_THE_DATA = (
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
)
"""Errors that say what a file is, and not how the disk fares."""
PASSED_OVER = ("__MACOSX",)


@dataclass(frozen=True)
class LocalFiles:
    """The files below the folder `root`, an absolute path without links."""

    root: str

    def walk(self) -> Iterator[tuple[str, set[str]]]:
        """Yield each folder, as a path below the root, with the names of its files.

        A folder comes before those in it, and these come in the order of their names. Runs and
        distilled sets are passed over, as their images are results; so is a link to a folder in the
        root, whose files are met where they lie. Raises SourceError in one line for a link to a
        folder outside, and for a folder that cannot be listed.
        """
        pending = [""]
        while pending:
            folder = pending.pop()
            files, folders = self._list(folder, lambda _: True)
            if folder and (result := result_in(files)):
                say_passed_over(os.path.join(self.root, folder), result)
                continue
            yield folder, files
            pending += sorted((os.path.join(folder, name) for name in folders), reverse=True)

    def names(self, folder: str, wanted: Callable[[str], bool]) -> set[str]:
        """Return the names of the files directly in a folder that are wanted.

        Raises what `walk` raises.
        """
        return self._list(folder, wanted)[0]

    def _list(self, folder: str, wanted: Callable[[str], bool]) -> tuple[set[str], list[str]]:
        files: set[str] = set()
        folders: list[str] = []
        try:
            with os.scandir(os.path.join(self.root, folder)) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or entry.name in PASSED_OVER:
                        continue
                    if not _is_folder(entry):
                        if wanted(entry.name):
                            files.add(entry.name)
                    elif self._is_own(entry):
                        folders.append(entry.name)
        except OSError as error:
            place = os.path.join(self.root, folder).rstrip("/")
            raise SourceError(f"{place} cannot be listed: {error.strerror or error}") from error
        return files, folders

    def _is_own(self, folder: os.DirEntry[str]) -> bool:
        """Return False for a link to a folder in the root; raise SourceError for one outside."""
        if not folder.is_symlink():
            return True
        if not self._holds(folder.path):
            raise SourceError(
                f"{folder.path} is a link to {os.path.realpath(folder.path)}, outside of "
                f"{self.root}; give that folder itself, or copy it there"
            )
        return False

    def size(self, path: str) -> int:
        """Return the bytes of the file at a path below the root, -1 if it cannot be asked."""
        try:
            return os.stat(self._full(path)).st_size
        except (OSError, ValueError):  # ValueError: no path at all, as a table may have it
            return -1

    def read(self, path: str, key: str, limit: int) -> bytes | Fault:
        """Return the content of the file at a path below the root, or why it is not used.

        Raises OSError if the disk fails, which says nothing about the data.
        """
        full, shown = self._full(path), storable(path)
        if not self._holds(full):
            place = storable(os.path.realpath(full))
            return Fault(key, "unsafe_member", f"{shown} is a link and leaves the folder: {place}")
        try:
            if not stat.S_ISREG(os.stat(full).st_mode):  # a named pipe would be waited for
                return Fault(key, "missing_image", f"{shown}: not a regular file")
            with open(full, "rb") as file:
                data = file.read(limit + 1)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno not in OF_THE_DATA:
                raise
            return Fault(key, "missing_image", f"{shown}: {getattr(error, 'strerror', error)}")
        if len(data) > limit:
            return Fault(key, "member_too_large", f"{shown}: more than {limit} bytes")
        return data

    def _full(self, path: str) -> str:
        """Return where a path below the root leads, in the spelling that the disk has of it."""
        places = [os.path.join(self.root, each) for each in spellings(path)]
        there = filter(os.path.lexists, places) if len(places) > 1 else iter(places)
        return next(there, places[0])

    def _holds(self, full: str) -> bool:
        """Return whether a path below the root leads nowhere else."""
        above = full
        while len(above) > len(self.root) and not os.path.islink(above):
            above = os.path.dirname(above)
        if len(above) <= len(self.root):  # no link on the way, which is asked quickly
            return True
        return os.path.commonpath((self.root, os.path.realpath(full))) == self.root


def spellings(name: str) -> list[str]:
    """Return a name, and the ways in which its accents may be written, composed or apart.

    macOS takes names apart that other systems, and the programs that write tables, compose.
    """
    if name.isascii():
        return [name]
    forms = unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)
    return list(dict.fromkeys([name, *forms]))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a circle
        return False


def storable(path: str) -> str:
    """Return a path as text that UTF-8 can hold: other bytes are spelled out."""
    return path.encode("utf-8", "backslashreplace").decode("utf-8")


@dataclass
class Cutter:
    """Images, as they come, cut in shards of SHARD_SIZE.

    A shard's location lists pieces of where its images lie, as JSON: what `add` was given as
    place, with the first and the last position there.
    """

    shards: list[Shard] = field(default_factory=list)
    _pieces: list[list[Any]] = field(default_factory=list)
    _digest: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=8))
    _count: int = 0

    def add(self, place: list[str], position: int | str, content: object) -> None:
        """Add an image, whose shard's version depends on `content`."""
        if not self._pieces or self._pieces[-1][:-2] != place:
            self._pieces.append([*place, position, position])
        self._pieces[-1][-1] = position
        self._digest.update(json.dumps(content).encode())
        self._count += 1
        if self._count == SHARD_SIZE:
            self.end()

    def end(self) -> None:
        """End the shard that is open, if there is one."""
        if self._count:
            name, location = f"folder-{len(self.shards):05d}", json.dumps(self._pieces)
            self.shards.append(Shard(name, location, self._count, self._digest.hexdigest()))
            self._pieces, self._count = [], 0
            self._digest = hashlib.blake2b(digest_size=8)

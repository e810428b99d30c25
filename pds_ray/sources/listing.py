"""Files of a local disk or of a store: looked for folder by folder, opened by their location.

Globbing is our own, so that each folder is listed once, local and remote names follow one rule, odd
names (spaces, `%`, braces) are taken to the letter, and the results of a run are never taken for
data.
"""

from __future__ import annotations

import errno
import io
import os
import re
import stat
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache

import pyarrow.fs as pafs

from pds_ray.errors import without_secrets
from pds_ray.store.calls import UNLIMITED, await_answer, is_remote, with_retries
from pds_ray.store.filesystems import open_filesystem
from pds_ray.store.run_folder import result_in
from pds_ray.store.streams import open_stream
from pds_ray.telemetry import log


def is_magic(pattern: str) -> bool:
    """Return whether a path has a wildcard."""
    return re.search(r"[*?\[]", pattern) is not None


class Listing:
    """A file system to look for files in.

    Each folder is listed once: on object stores it is the listing that costs.
    """

    def __init__(self, prefix: str, query: str) -> None:
        self._prefix = prefix
        self._query = query
        self._filesystem, self.root = open_filesystem(prefix + query)
        if is_remote(prefix):
            await_answer(lambda: self._filesystem.get_file_info(self.root), prefix)
        self._listings: dict[str, dict[str, pafs.FileInfo]] = {}

    def location(self, path: str) -> str:
        """Return the location of a path that `walk` found."""
        return self._prefix + path.removeprefix(self.root).lstrip("/") + self._query

    def walk(self, folder: str, parts: list[str]) -> Iterator[pafs.FileInfo]:
        """Yield the files and folders that match the path `parts` below `folder`.

        Wildcards pass over hidden names and over runs and distilled sets, whose tars are results.
        `**` reads a folder once, by whatever links it may be reached: links may lead in a circle.
        """
        yield from self._walk(folder, parts, set())

    def _walk(self, folder: str, parts: list[str], read: set[str]) -> Iterator[pafs.FileInfo]:
        """Do what `walk` does; `read` holds the real paths of the folders that `**` has read."""
        head, *rest = parts
        if rest and not is_magic(head):  # not listed: the folders on the way may be closed or huge
            yield from self._walk(f"{folder.rstrip('/')}/{head}", rest, set())
            return
        entries = self._list(folder)
        visible = {name: info for name, info in entries.items() if not name.startswith(".")}
        if head == "**":
            yield from self._walk(folder, rest or ["*"], set())
            read.add(self._real(folder))
            folders = [i for i in visible.values() if i.type == pafs.FileType.Directory]
            matches = sorted(folders, key=lambda info: (self._is_link(info), info.path))
            rest = parts
        elif is_magic(head):
            matches = [info for name, info in visible.items() if fnmatchcase(name, head)]
        else:
            matches = [entries[head]] if head in entries else []
        for info in matches:
            if not rest:
                yield info
            elif info.type != pafs.FileType.Directory or (
                is_magic(head) and self._passes_over(info.path)
            ):
                continue
            elif head != "**":
                yield from self._walk(info.path, rest, set())
            elif self._real(info.path) not in read:
                yield from self._walk(info.path, rest, read)

    def _is_link(self, info: pafs.FileInfo) -> bool:
        return self.root == "/" and os.path.islink(info.path)

    def _real(self, folder: str) -> str:
        """Return the path of a folder without links, which stores elsewhere do not have."""
        return os.path.realpath(folder) if self.root == "/" else folder

    def _passes_over(self, folder: str) -> bool:
        """Return True, and say it, for a folder that is a result."""
        try:
            result = result_in(self._list(folder).keys())
        except PermissionError:  # a folder on the way that may be closed
            return False
        if result:
            say_passed_over(self.location(folder), result)
        return bool(result)

    def _list(self, folder: str) -> dict[str, pafs.FileInfo]:
        if folder not in self._listings:
            selector = pafs.FileSelector(folder, allow_not_found=True)
            try:
                infos = with_retries(
                    lambda: self._filesystem.get_file_info(selector),
                    self.location(folder),
                    UNLIMITED,
                )
                infos += self._dangling(folder) if self.root == "/" else []
            except NotADirectoryError:
                infos = []
            self._listings[folder] = {_base_name(info): info for info in infos}
        return self._listings[folder]

    @staticmethod
    def _dangling(folder: str) -> list[pafs.FileInfo]:
        """Return the links of a local folder that lead nowhere: no listing of pyarrow has them."""
        if not os.path.isdir(folder):
            return []
        with os.scandir(folder) as entries:
            lost = [each.path for each in entries if each.is_symlink() and not os.path.exists(each)]
        return [pafs.FileInfo(path, pafs.FileType.NotFound) for path in sorted(lost)]


def _base_name(info: pafs.FileInfo) -> str:
    """Return the name of a file; one that is not UTF-8 matches wildcards, and is then refused."""
    try:
        return info.base_name
    except UnicodeDecodeError as error:
        return os.fsdecode(error.object)


def open_shard(location: str) -> io.BufferedReader:
    """Open the file at a location that `find_shards` returned."""
    filesystem, path = open_filesystem(location)
    if not is_remote(location):
        require_file(path)
    return open_stream(filesystem, path, location)


def require_file(path: str) -> None:
    """Raise OSError if a local path is no file: a pipe would be waited for without an end.

    Its kind is IsADirectoryError for a folder, PermissionError for a pipe or a device,
    FileNotFoundError for nothing, also where links lead in a circle.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise FileNotFoundError(error.errno, error.strerror, path) from error
        raise
    if stat.S_ISDIR(mode):  # pyarrow's error does not tell its kind
        raise IsADirectoryError(errno.EISDIR, "it is a folder", path)
    if not stat.S_ISREG(mode):
        raise PermissionError(errno.EACCES, "it is a pipe or a device, not a file", path)


@cache  # the shards of a source are looked for more than once
def say_passed_over(folder: str, result: str) -> None:
    """Say that a folder is no part of a source; `result` is what it is."""
    text = (
        f"pds-ray: {without_secrets(folder)} is {result} and passed over; name it in full, without "
        "a wildcard, to read what is in it"
    )
    log.event("run_passed_over", text, "warning", folder=without_secrets(folder))

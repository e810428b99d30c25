"""Shards named by patterns: a path, a glob, a brace range, several of these, or a list file.

Patterns are local paths or object-store URIs. Globbing is our own, so that each folder is listed
once, local and remote names follow one rule, and odd names (spaces, `%`, braces) are taken to the
letter.
"""

from __future__ import annotations

import glob
import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import takewhile

import pyarrow.fs as pafs
from braceexpand import braceexpand

from pds_ray.errors import first_line
from pds_ray.sources.base import SourceError
from pds_ray.store.storage import (
    StorageError,
    is_remote,
    open_filesystem,
    open_stream,
    with_retries,
)

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")

DATASET_TYPE = "dataset_type.txt"
"""The file beside the shards, or a folder above, by which clip-benchmark says what they are for."""

NAME_LENGTH = 150
"""Longest name of a shard, in characters.

A file name has 255, of which the run folder needs some for what it adds.
"""


def find_shards(uri: str) -> tuple[dict[str, pafs.FileInfo], str]:
    """Return location -> size and time of every shard that the patterns of `uri` name.

    The second value says in one line which of several patterns match nothing, "" if all match.
    Raises SourceError if there is no pattern, if the only one matches nothing, or if one cannot be
    looked for.
    """
    patterns = list(_expand(uri))
    found: dict[str, pafs.FileInfo] = {}
    stores: dict[tuple[str, str], _Store] = {}
    unmatched: list[str] = []
    for pattern in patterns:
        prefix, path, query = _split_location(pattern)
        try:
            if (prefix, query) not in stores:
                stores[prefix, query] = _Store(prefix, query)
            store = stores[prefix, query]
            shards = _only_shards(pattern, list(store.walk(store.root, path.split("/"))))
        except (OSError, StorageError) as error:
            raise SourceError(f"cannot look for {pattern}: {first_line(error)}") from error
        found |= {store.location(info.path): info for info in shards}
        if not shards:
            unmatched.append(pattern)
    if not patterns:
        raise SourceError(f"no tar shard is named in {uri!r}")
    return found, _complaint(unmatched, len(patterns))


def _complaint(unmatched: list[str], patterns: int) -> str:
    """Say which patterns match nothing, "" if none; raise SourceError if there is no other."""
    if not unmatched:
        return ""
    first = f"{unmatched[0]} (looked in {_fixed_folder(unmatched[0])})"
    if patterns == 1:
        raise SourceError(f"no tar shard matches {first}")
    return f"{len(unmatched)} of {patterns} shard patterns match nothing, the first is {first}"


def _only_shards(pattern: str, infos: list[pafs.FileInfo]) -> list[pafs.FileInfo]:
    shards = [info for info in infos if info.is_file and info.path.lower().endswith(SHARD_SUFFIXES)]
    if infos and not shards and not _is_magic(pattern):
        if infos[0].is_file:
            raise SourceError(f"{pattern} is not a tar shard ({', '.join(SHARD_SUFFIXES)})")
        raise SourceError(f"{pattern} is a folder; name the shards in it, as in {pattern}/*.tar")
    return shards


def shard_names(locations: list[str]) -> dict[str, str]:
    """Return location -> name: the file's stem in safe characters.

    A hash of the location is added where two names would be the same, and where one is cut at
    NAME_LENGTH.
    """
    names = {location: _safe_stem(location) for location in locations}
    uses = Counter(names.values())
    for location, name in names.items():
        if uses[name] > 1 or len(name) > NAME_LENGTH:
            digest = hashlib.blake2b(location.encode(), digest_size=4).hexdigest()
            names[location] = f"{name[:NAME_LENGTH]}-{digest}"
    return names


def _safe_stem(location: str) -> str:
    path = _split_location(location)[1]
    base = path.rpartition("/")[2]
    ends = [suffix for suffix in SHARD_SUFFIXES if base.lower().endswith(suffix)]
    stem = base[: -max(map(len, ends))] if ends else base
    return re.sub(r"[^A-Za-z0-9._-]", "_", stem).lstrip(".") or "shard"


def for_retrieval(locations: Iterable[str]) -> set[str]:
    """Return those shards whose DATASET_TYPE says retrieval: each line of a text is a caption."""
    said: dict[str, bool] = {}
    found = set()
    for location in locations:
        prefix, path, query = _split_location(location)
        folder = path.rpartition("/")[0]
        for place in (folder, folder.rpartition("/")[0]):
            file = prefix + "/".join(filter(None, (place, DATASET_TYPE))) + query
            if file not in said:
                said[file] = _says_retrieval(file)
            if said[file]:
                found.add(location)
    return found


def _says_retrieval(location: str) -> bool:
    filesystem, path = _open_root(location)
    try:
        if not filesystem.get_file_info(path).is_file:
            return False
        with open_shard(location) as stream:
            return stream.read(64).strip().lower() == b"retrieval"
    except (OSError, StorageError):  # some stores refuse to say that a file is not there
        return False


# ---- patterns ------------------------------------------------------------------------------------


def _expand(uri: str) -> Iterator[str]:
    """Yield a source URI's patterns: lists read, braces spelled out, local paths made absolute."""
    # the name of a file that exists is literal: it may hold spaces or braces
    is_file = os.path.isfile(_absolute(uri.removeprefix("@")))
    for token in [uri] if is_file else re.split(r"\s+|::", uri):
        if token.startswith("@"):
            for line in _read_list(_absolute(token[1:])):
                yield from _expand_braces(line)
        elif is_file:
            yield glob.escape(_absolute(token))
        elif token:
            yield from _expand_braces(token)


def _expand_braces(pattern: str) -> Iterator[str]:
    try:
        yield from map(_absolute, braceexpand(pattern))
    except ValueError:  # whose message shows the URI, secrets and all
        raise SourceError(f"braces do not match in {pattern!r}") from None


def _read_list(location: str) -> list[str]:
    try:
        with open_shard(location) as stream:
            lines = [line.strip() for line in stream.read().decode("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"cannot read the shard list {location}: {error}") from error
    folder = location.rpartition("/")[0]
    entries = [line for line in lines if line and not line.startswith("#")]
    return [
        entry if "://" in entry or entry.startswith(("/", "~")) else f"{folder}/{entry}"
        for entry in entries
    ]


def _absolute(path: str) -> str:
    if is_remote(path):
        return path
    return os.path.abspath(os.path.expanduser(path.removeprefix("file://")))


def _is_magic(pattern: str) -> bool:
    return re.search(r"[*?\[]", pattern) is not None


def _fixed_folder(pattern: str) -> str:
    prefix, path, _ = _split_location(pattern)
    return prefix + "/".join(takewhile(lambda part: not _is_magic(part), path.split("/")[:-1]))


# ---- file systems --------------------------------------------------------------------------------


class _Store:
    """A file system to look for files in.

    Each folder is listed once: on object stores it is the listing that costs.
    """

    def __init__(self, prefix: str, query: str) -> None:
        self._prefix = prefix
        self._query = query
        self._filesystem, self.root = _open_root(prefix + query)
        self._listings: dict[str, dict[str, pafs.FileInfo]] = {}

    def location(self, path: str) -> str:
        """Return the location of a path that `walk` found."""
        return self._prefix + path.removeprefix(self.root).lstrip("/") + self._query

    def walk(self, folder: str, parts: list[str]) -> Iterator[pafs.FileInfo]:
        """Yield the files and folders that match the path `parts` below `folder`.

        Wildcards pass over hidden names.
        """
        head, *rest = parts
        if rest and not _is_magic(head):  # not listed: the folders on the way may be closed or huge
            yield from self.walk(f"{folder.rstrip('/')}/{head}", rest)
            return
        entries = self._list(folder)
        visible = {name: info for name, info in entries.items() if not name.startswith(".")}
        if head == "**":
            yield from self.walk(folder, rest or ["*"])
            matches = list(visible.values())
            rest = parts
        elif _is_magic(head):
            matches = [info for name, info in visible.items() if fnmatchcase(name, head)]
        else:
            matches = [entries[head]] if head in entries else []
        for info in matches:
            if not rest:
                yield info
            elif info.type == pafs.FileType.Directory:
                yield from self.walk(info.path, rest)

    def _list(self, folder: str) -> dict[str, pafs.FileInfo]:
        if folder not in self._listings:
            selector = pafs.FileSelector(folder, allow_not_found=True)
            try:
                infos = with_retries(
                    lambda: self._filesystem.get_file_info(selector), self.location(folder)
                )
            except NotADirectoryError:
                infos = []
            self._listings[folder] = {info.base_name: info for info in infos}
        return self._listings[folder]


def open_shard(location: str) -> io.BufferedReader:
    """Open the file at a location that `find_shards` returned."""
    filesystem, path = _open_root(location)
    return open_stream(filesystem, path, location)


def _split_location(location: str) -> tuple[str, str, str]:
    """Split a location: root (`/` or `s3://bucket/`), path below it, and `?query` or ""."""
    if not is_remote(location):
        return "/", location.lstrip("/"), ""
    address, question, query = location.partition("?")
    scheme, _, rest = address.partition("://")
    authority, _, path = rest.partition("/")
    return f"{scheme}://{authority}/", path, question + query


def _open_root(location: str) -> tuple[pafs.FileSystem, str]:
    """Return the file system of a location and the path inside it, taken to the letter.

    Only the root goes through URI parsing, which would refuse or decode spaces, `%` and other odd
    names.
    """
    if not is_remote(location):
        return pafs.LocalFileSystem(), location
    prefix, path, query = _split_location(location)
    filesystem, root = _open_store(prefix.rstrip("/") + query)
    return filesystem, f"{root.rstrip('/')}/{path}".rstrip("/")


@lru_cache(maxsize=16)  # setting up a store can cost a round trip, as for the region of a bucket
def _open_store(root_uri: str) -> tuple[pafs.FileSystem, str]:
    return open_filesystem(root_uri)

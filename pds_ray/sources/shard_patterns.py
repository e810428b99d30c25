"""Shards named by patterns: a path, a glob, a brace range, several of these, or a list file.

Patterns are local paths or URIs of stores. Globbing is our own, so that each folder is listed once,
local and remote names follow one rule, odd names (spaces, `%`, braces) are taken to the letter, and
the results of a run are never taken for data. A web server lists nothing: each of its shards is
asked for.
"""

from __future__ import annotations

import codecs
import errno
import glob
import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from functools import cache
from itertools import takewhile
from typing import NamedTuple

import pyarrow.fs as pafs
from braceexpand import braceexpand

from pds_ray.errors import first_line, without_secrets
from pds_ray.sources.base import SourceError
from pds_ray.store.calls import (
    UNLIMITED,
    StorageError,
    await_answer,
    is_remote,
    side_by_side,
    with_retries,
)
from pds_ray.store.filesystems import local_path, open_filesystem, split_address
from pds_ray.store.run_folder import result_in
from pds_ray.store.streams import open_stream
from pds_ray.telemetry import log

WEB = ("http://", "https://")
SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")

DATASET_TYPE = "dataset_type.txt"
"""The file beside the shards, or a folder above, by which clip-benchmark says what they are for."""

UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
"""How a list begins that an editor or a shell of Windows wrote."""

NAME_LENGTH = 150
"""Longest name of a shard, in characters.

A file name has 255, of which the run folder needs some for what it adds.
"""


class Kind(NamedTuple):
    """A kind of files that are shards."""

    noun: str
    suffixes: tuple[str, ...]


TARS = Kind("tar shard", SHARD_SUFFIXES)
PARQUET = Kind("Parquet file", (".parquet", ".parq", ".pq"))


class _Match(NamedTuple):
    """What a pattern names: location -> size and version of each shard, or why there is none."""

    shards: dict[str, pafs.FileInfo]
    why_not: str = ""


def find_shards(uri: str, kind: Kind = TARS) -> tuple[dict[str, pafs.FileInfo], str]:
    """Return location -> size and time of every shard that the patterns of `uri` name.

    In place of the time, stores that tell a version have a number made of it. The second value says
    in one line which of several patterns match nothing, "" if all match. Raises SourceError if
    there is no pattern, if the only one matches nothing, or if one cannot be looked for.
    """
    patterns = list(_expand(uri, kind))
    if not patterns:
        raise SourceError(f"no {kind.noun} is named in {uri!r}")
    if kind is TARS and patterns[0].lower().endswith(PARQUET.suffixes):
        raise SourceError(f"{patterns[0]} names no tar; Parquet files are read as parquet:PATTERN")
    on_web = [pattern for pattern in patterns if pattern.startswith(WEB)]
    matches = dict(zip(on_web, side_by_side(_ask, on_web), strict=True))
    stores: dict[tuple[str, str], _Store] = {}
    for pattern in patterns:
        if pattern not in matches:
            matches[pattern] = _look_for(pattern, kind, stores)
    found = {place: info for match in matches.values() for place, info in match.shards.items()}
    return found, _complaint(uri, kind, matches)


def _look_for(pattern: str, kind: Kind, stores: dict[tuple[str, str], _Store]) -> _Match:
    """Look for a pattern where files can be listed. Raises SourceError."""
    prefix, path, query = split_address(pattern)
    try:
        if (prefix, query) not in stores:
            stores[prefix, query] = _Store(prefix, query)
        store = stores[prefix, query]
        shards = _only_shards(pattern, kind, list(store.walk(store.root, path.split("/"))))
    except (OSError, StorageError) as error:
        raise SourceError(f"cannot look for {pattern}: {first_line(error)}") from error
    except UnicodeError as error:
        raise SourceError(
            f"cannot take all that {pattern} matches: the name {error.args[1]!r} is not UTF-8; "
            "rename it"
        ) from error
    token = "; a private data set needs HF_TOKEN" if prefix.startswith("hf://") else ""
    return _Match(
        {store.location(info.path): info for info in shards},
        f"looked in {_fixed_folder(pattern)}{token}",
    )


def _ask(location: str) -> _Match:
    """Ask a web server for a shard. Raises SourceError."""
    if _is_magic(split_address(location)[1]):
        raise SourceError(
            f"{location}: a web server lists no files; name them, as in {{00000..00041}}.tar or "
            "in a list, @FILE"
        )
    filesystem, path = open_filesystem(location)
    try:
        info = with_retries(lambda: filesystem.get_file_info(path), location)
    except (OSError, StorageError) as error:
        if isinstance(error, PermissionError):
            return _Match({}, str(error))
        raise SourceError(f"cannot look for {location}: {first_line(error)}") from error
    if not info.is_file:
        return _Match({}, "HTTP status 404")
    known = pafs.FileInfo(path, info.type, size=info.size or 0, mtime_ns=info.mtime_ns)
    return _Match({location: known})


def _complaint(uri: str, kind: Kind, matches: dict[str, _Match]) -> str:
    """Say which patterns match nothing, "" if none; raise SourceError if there is no other."""
    unmatched = [pattern for pattern, match in matches.items() if not match.shards]
    if not unmatched:
        return ""
    first = f"{unmatched[0]} ({matches[unmatched[0]].why_not})"
    if len(matches) == 1:
        raise SourceError(f"no {kind.noun} matches {first}")
    text = (
        f"{len(unmatched):,} of {len(matches):,} shard patterns match nothing, the first is {first}"
    )
    there = len(matches) - len(unmatched)
    return f"{text}; {there:,} match: to take those, {_way_out(uri)}" if there else text


def _way_out(uri: str) -> str:
    """Say how to name the shards that are there among those that a brace range spells out."""
    pattern = re.sub(r"\{[^{}]*\}", "*", re.sub(r"\{\d+\.\.\d+\}", "[0-9]*", uri))
    if pattern == uri or uri.startswith("@") or any(scheme in uri for scheme in WEB):
        return "name them alone, in a list, @FILE"
    return f"give {pattern!r}"


def _only_shards(pattern: str, kind: Kind, infos: list[pafs.FileInfo]) -> list[pafs.FileInfo]:
    shards = [
        info
        for info in infos
        # what a wildcard takes for a shard and is none is counted as a failed shard
        if (info.is_file or info.type == pafs.FileType.NotFound or _is_magic(pattern))
        and info.path.lower().endswith(kind.suffixes)
    ]
    if infos and not shards and not _is_magic(pattern):
        if infos[0].is_file:
            raise SourceError(f"{pattern} is not a {kind.noun} ({', '.join(kind.suffixes)})")
        example = f"{pattern}/*{kind.suffixes[0]}"
        raise SourceError(f"{pattern} is a folder; name the shards in it, as in {example}")
    return shards


def shard_names(locations: list[str]) -> dict[str, str]:
    """Return location -> name: the file's stem in safe characters.

    A hash of the location is added where two names would be the same, in capitals or not, as some
    file systems see them, and where one is cut at NAME_LENGTH. The query of a web address, which
    may be a signature, is no part of it.
    """
    names = {location: _safe_stem(location) for location in locations}
    uses = Counter(name.lower() for name in names.values())
    for location, name in names.items():
        if uses[name.lower()] > 1 or len(name) > NAME_LENGTH:
            place = without_secrets(location) if location.startswith(WEB) else location
            digest = hashlib.blake2b(place.encode(), digest_size=4).hexdigest()
            names[location] = f"{name[:NAME_LENGTH]}-{digest}"
    return names


def _safe_stem(location: str) -> str:
    path = split_address(location)[1]
    base = path.rpartition("/")[2]
    ends = [suffix for suffix in TARS.suffixes + PARQUET.suffixes if base.lower().endswith(suffix)]
    stem = base[: -max(map(len, ends))] if ends else base
    return re.sub(r"[^A-Za-z0-9._-]", "_", stem).lstrip(".") or "shard"


def for_retrieval(locations: Iterable[str]) -> set[str]:
    """Return those shards whose DATASET_TYPE says retrieval: each line of a text is a caption."""
    said: dict[str, bool] = {}
    found = set()
    for location in locations:
        prefix, path, query = split_address(location)
        folder = path.rpartition("/")[0]
        for place in (folder, folder.rpartition("/")[0]):
            file = prefix + "/".join(filter(None, (place, DATASET_TYPE))) + query
            if file not in said:
                said[file] = _says_retrieval(file)
            if said[file]:
                found.add(location)
    return found


def _says_retrieval(location: str) -> bool:
    filesystem, path = open_filesystem(location)
    try:
        if not filesystem.get_file_info(path).is_file:
            return False
        with open_shard(location) as stream:
            return stream.read(64).strip().lower() == b"retrieval"
    except (OSError, StorageError):  # some stores refuse to say that a file is not there
        return False


# ---- patterns ------------------------------------------------------------------------------------


def _expand(uri: str, kind: Kind) -> Iterator[str]:
    """Yield a source URI's patterns: lists read, braces spelled out, local paths made absolute.

    `::` separates patterns. So does white space, unless the pattern around it matches shards.
    """
    for pattern in [uri] if _is_file(uri) else map(str.strip, uri.split("::")):
        for token in (
            [pattern] if _is_file(pattern) or _has_spaces(pattern, kind) else pattern.split()
        ):
            _refuse_commands(token)
            if token.startswith("@"):
                for line in _read_list(_absolute(token[1:])):
                    _refuse_commands(line)
                    yield from _expand_braces(line)
            elif _is_file(token):  # taken to the letter: it may hold spaces or braces
                yield glob.escape(_absolute(token))
            else:
                yield from _expand_braces(token)


def _is_file(pattern: str) -> bool:
    return os.path.isfile(_absolute(pattern.removeprefix("@")))


def _has_spaces(text: str, kind: Kind) -> bool:
    """Return whether text with white space is one pattern, as in `/My Drive/*.tar`."""
    others = text.split()[1:]
    if not others or text.startswith(("@", *WEB)) or any("://" in other for other in others):
        return False
    stores: dict[tuple[str, str], _Store] = {}
    try:
        return any(
            _look_for(pattern, kind, stores).shards
            for pattern in _expand_braces(text)
            if is_remote(pattern) or os.path.isdir(_fixed_folder(pattern))
        )
    except SourceError:  # its parts are looked for in turn, and what is wrong with them is said
        return False


def _refuse_commands(pattern: str) -> None:
    if pattern.startswith("pipe:"):
        raise SourceError(
            "pipe: is a command, and pds-ray runs none; give the address that it reads, such as "
            "https://HOST/{00000..00041}.tar, s3://BUCKET/*.tar or hf://datasets/ORG/NAME/*.tar"
        )


def _expand_braces(pattern: str) -> Iterator[str]:
    try:
        yield from map(_absolute, braceexpand(pattern))
    except ValueError:  # whose message shows the URI, secrets and all
        raise SourceError(f"braces do not match in {pattern!r}") from None


def _read_list(location: str) -> list[str]:
    try:
        with open_shard(location) as stream:
            data = stream.read()
        encoding = "utf-16" if data.startswith(UTF_16) else "utf-8-sig"
        lines = [line.strip() for line in data.decode(encoding).splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"cannot read the shard list {location}: {error}") from error
    prefix, path, settings = split_address(location)
    folder = prefix + "".join(path.rpartition("/")[:2])
    after = "" if location.startswith(WEB) else settings  # a signature is for one file
    entries = [line for line in lines if line and not line.startswith("#")]
    return [
        entry if "://" in entry or entry.startswith(("/", "~", "pipe:")) else folder + entry + after
        for entry in entries
    ]


def _absolute(path: str) -> str:
    if is_remote(path):
        return path
    return local_path(path)


def _is_magic(pattern: str) -> bool:
    return re.search(r"[*?\[]", pattern) is not None


def _fixed_folder(pattern: str) -> str:
    prefix, path, _ = split_address(pattern)
    return prefix + "/".join(takewhile(lambda part: not _is_magic(part), path.split("/")[:-1]))


# ---- file systems --------------------------------------------------------------------------------


class _Store:
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
            elif info.type == pafs.FileType.Directory and not (
                _is_magic(head) and self._passes_over(info.path)
            ):
                yield from self.walk(info.path, rest)

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
    if not is_remote(location) and os.path.isdir(path):  # pyarrow's error does not tell its kind
        raise IsADirectoryError(errno.EISDIR, "it is a folder", path)
    return open_stream(filesystem, path, location)


@cache  # the shards of a source are looked for more than once
def say_passed_over(folder: str, result: str) -> None:
    """Say that a folder is no part of a source; `result` is what it is."""
    text = (
        f"pds-ray: {without_secrets(folder)} is {result} and passed over; name it in full, without "
        "a wildcard, to read what is in it"
    )
    log.event("run_passed_over", text, "warning", folder=without_secrets(folder))

"""Shards named by patterns: a path, a glob, a brace range, several of these, or a list file.

Patterns are local paths or URIs of stores, in which `sources.listing` looks. A web server lists
nothing: each of its shards is asked for.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import takewhile
from typing import NamedTuple

import pyarrow.fs as pafs
from braceexpand import braceexpand

from pds_ray.errors import first_line, without_secrets
from pds_ray.sources.base import SourceError
from pds_ray.sources.listing import Listing, is_magic, open_shard
from pds_ray.store.calls import (
    FACTS,
    REFUSED,
    StorageError,
    is_remote,
    side_by_side,
    with_retries,
)
from pds_ray.store.filesystems import local_path, open_filesystem, split_address

WEB = ("http://", "https://")
SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")

DATASET_TYPE = "dataset_type.txt"
"""The file beside the shards, or a folder above, by which clip-benchmark says what they are for."""

UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
"""First bytes of a list that an editor or a shell of Windows wrote."""

_BETWEEN = re.compile(r"::(?![^\[\]]*\])")
"""The separator of patterns; within brackets it is of an address, as in http://[::1]/0.tar."""

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
    """The shards of a pattern, location -> size and version, or why there is none."""

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
    stores: dict[tuple[str, str], Listing] = {}
    for pattern in patterns:
        if pattern not in matches:
            matches[pattern] = _look_for(pattern, kind, stores)
    found = {place: info for match in matches.values() for place, info in match.shards.items()}
    return found, _complaint(uri, kind, matches)


def _look_for(pattern: str, kind: Kind, stores: dict[tuple[str, str], Listing]) -> _Match:
    """Look for a pattern where files can be listed. Raises SourceError."""
    prefix, path, query = split_address(pattern)
    try:
        if (prefix, query) not in stores:
            stores[prefix, query] = Listing(prefix, query)
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
    if is_magic(split_address(location)[1]):
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
    if there := len(matches) - len(unmatched):
        return f"{text}; {there:,} match: to take those, {_way_out(uri)}"
    is_split = len(uri.split()) > 1 and "::" not in uri
    return f"{text}; spaces separate patterns, as no file matches the whole" if is_split else text


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
        if (info.is_file or info.type == pafs.FileType.NotFound or is_magic(pattern))
        and info.path.lower().endswith(kind.suffixes)
    ]
    if infos and not shards and not is_magic(pattern):
        if infos[0].type != pafs.FileType.Directory:
            raise SourceError(f"{pattern} is not a {kind.noun} ({', '.join(kind.suffixes)})")
        example = f"{pattern}/*{kind.suffixes[0]}"
        raise SourceError(f"{pattern} is a folder; name the shards in it, as in {example}")
    return shards


def shard_names(locations: list[str]) -> dict[str, str]:
    """Return location -> name: the file's stem in safe characters.

    A hash of the location is added where two names would be the same, in capitals or not, as some
    file systems see them, and where one is cut at NAME_LENGTH. The query of a web address, which
    may be a signature, is a part of it only where addresses differ in nothing else.
    """
    stems = {location: _safe_stem(location) for location in locations}
    names = dict(stems)
    too_long = {location for location, name in names.items() if len(name) > NAME_LENGTH}
    for location in _not_unique(names) | too_long:
        place = without_secrets(location) if location.startswith(WEB) else location
        names[location] = _with_digest(stems[location], place, 4)
    for location in _not_unique(names):
        names[location] = _with_digest(stems[location], location, 8)
    return names


def _not_unique(names: dict[str, str]) -> set[str]:
    """Return the locations whose names are those of others, too."""
    uses = Counter(name.lower() for name in names.values())
    return {location for location, name in names.items() if uses[name.lower()] > 1}


def _with_digest(stem: str, place: str, size: int) -> str:
    digest = hashlib.blake2b(place.encode(), digest_size=size).hexdigest()
    return f"{stem[:NAME_LENGTH]}-{digest}"


def _safe_stem(location: str) -> str:
    path = split_address(location)[1]
    base = path.rpartition("/")[2]
    ends = [suffix for suffix in TARS.suffixes + PARQUET.suffixes if base.lower().endswith(suffix)]
    stem = base[: -max(map(len, ends))] if ends else base
    return re.sub(r"[^A-Za-z0-9._-]", "_", stem).lstrip(".") or "shard"


def for_retrieval(locations: Iterable[str]) -> set[str]:
    """Return those shards whose DATASET_TYPE says retrieval: each line of a text is a caption.

    Raises SourceError if a store fails.
    """
    said: dict[str, bool] = {}
    found = set()
    for location in locations:
        prefix, path, settings = split_address(location)
        query = "" if location.startswith(WEB) else settings  # a signature is for one file
        folder = path.rpartition("/")[0]
        for place in (folder, folder.rpartition("/")[0]):
            file = prefix + "/".join(filter(None, (place, DATASET_TYPE))) + query
            if file not in said:
                said[file] = _says_retrieval(file)
            if said[file]:
                found.add(location)
                break
    return found


def _says_retrieval(location: str) -> bool:
    filesystem, path = open_filesystem(location)
    try:
        if not with_retries(lambda: filesystem.get_file_info(path), location).is_file:
            return False
        with open_shard(location) as stream:
            return stream.read(64).strip().lower() == b"retrieval"
    except FACTS:  # some stores refuse to say that a file is not there
        return False
    except (OSError, StorageError) as error:
        if REFUSED.search(str(error)):
            return False
        raise SourceError(f"cannot look for {location}: {first_line(error)}") from error


# ---- patterns ------------------------------------------------------------------------------------


def _expand(uri: str, kind: Kind) -> Iterator[str]:
    """Yield a source URI's patterns: lists read, braces spelled out, local paths made absolute.

    `::` separates patterns. So does white space, unless the pattern around it matches shards.
    """
    for pattern in [uri] if _is_there(uri) else map(str.strip, _BETWEEN.split(uri)):
        for token in (
            [pattern] if _is_there(pattern) or _has_spaces(pattern, kind) else pattern.split()
        ):
            _refuse_commands(token)
            if token.startswith("@"):
                for line in _read_list(_absolute(token[1:])):
                    _refuse_commands(line)
                    yield from _expand_braces(line)
            elif _is_there(token):  # taken to the letter: it may hold spaces or braces
                folder = token.removesuffix("/*")
                yield glob.escape(_absolute(folder)) + token[len(folder) :]
            else:
                yield from _expand_braces(token)


def _is_there(pattern: str) -> bool:
    """Return whether a pattern is a file that exists, or all in a folder that does."""
    path = pattern.removeprefix("@")
    folder = path.removesuffix("/*")
    if folder and folder != path:
        return os.path.isdir(_absolute(folder))
    return os.path.isfile(_absolute(path))


def _has_spaces(text: str, kind: Kind) -> bool:
    """Return whether text with white space is one pattern, as in `/My Drive/*.tar`."""
    others = text.split()[1:]
    if not others or text.startswith(("@", *WEB)) or any("://" in other for other in others):
        return False
    stores: dict[tuple[str, str], Listing] = {}
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


def _fixed_folder(pattern: str) -> str:
    prefix, path, _ = split_address(pattern)
    return prefix + "/".join(takewhile(lambda part: not is_magic(part), path.split("/")[:-1]))

"""Image-caption samples in tar shards, the WebDataset layout: `KEY.jpg`, `KEY.txt`, `KEY.json` side by side.

Shards are named by a path, a glob, a brace range, several of these, or a list file, local or on an object store. A
shard is read once, forwards, member by member; nothing is ever extracted to a path. Memory holds one sample and a
digest of every key of the shard; work is bounded by the size of the file, compressed or not.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import islice, takewhile

import pyarrow.fs as pafs
from braceexpand import braceexpand

from pds_ray.errors import first_line
from pds_ray.modalities.text import MAX_CAPTIONS
from pds_ray.sources.base import Fault, MissingShardsError, Sample, Shard, SourceError
from pds_ray.store.storage import (
    StorageError,
    is_remote,
    open_filesystem,
    open_stream,
    with_retries,
)

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif")
CAPTION_SUFFIXES = ("txt", "json")

MAX_HEADER_BYTES = 64 * 1024
"""Largest extension header (PAX, GNU long name) that is read; it holds a path and a few attributes."""

MAX_NAME = 4096
"""Longest name of a member, in characters: no file system takes a longer path."""

MAX_EXPANSION = 100
"""Bytes that a compressed shard may give for each byte read of it, once it has given EXPANSION_FREE of them. Pictures
hardly compress; zeros do 1000:1."""
EXPANSION_FREE = 64 * 1024**2

NAME_LENGTH = 150
"""Of a shard, in characters: a file name has 255, of which the run folder needs some for what it adds."""

_GONE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_PAX_RECORD = re.compile(rb"(\d{1,9}) ([^=]+)=")
_DAMAGED = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile)


@dataclass(frozen=True)
class WebDatasetSource:
    """Tar shards of image-caption samples.

    `uri` is one or more patterns, separated by white space or `::`. A pattern is a path or an object-store URI, in
    which `{a,b}` and `{00000..00041}` are spelled out and `*`, `?`, `[...]`, `**` match files that exist; `@FILE` reads
    patterns from a list, one a line, relative to that file. Settings of a store follow a `?`, as in
    `s3://bucket/*.tar?region=eu-west-1`; so a `?` in a remote pattern is never a wildcard.

    A sample's captions are its .txt and the strings of `captions` and `caption` in its .json; of more than MAX_CAPTIONS
    the first ones count.
    """

    uri: str = field(repr=False)
    max_image_bytes: int = 64 * 1024**2
    max_text_bytes: int = 1024**2
    validation: None = None

    def shards(self) -> list[Shard]:
        """The shards that exist, sorted by location. Every pattern must match, or SourceError says which does not."""
        found, missing = _find_shards(self.uri)
        names = _shard_names(sorted(found))
        shards = [
            Shard(name, location, found[location].size, str(found[location].mtime_ns))
            for location, name in names.items()
        ]
        if missing:
            raise MissingShardsError(missing, shards)
        return shards

    def read(self, shard: Shard) -> Iterator[Sample | Fault]:
        """The samples and faults of a shard, in stored order.

        A file that is gone or may not be read is a fault. Any other I/O failure (network, disk) says nothing about
        the data: it is raised, for the caller to try again.
        """
        try:
            stream = _open_stream(shard.location)
        except _GONE as error:
            yield Fault("", "missing_shard", error.strerror or str(error))
            return
        with stream:
            yield from self._read_samples(_TarReader(_decompressed(stream)))

    def _read_samples(self, tar: _TarReader) -> Iterator[Sample | Fault]:
        seen: set[bytes] = set()
        group: _Group | None = None
        try:
            for member in tar:
                key, suffix, unsafe = _identify(member)
                if key is None:
                    continue
                if group is None or key != group.key or suffix in group.suffixes:
                    if group is not None:
                        yield group.outcome()
                    group = _Group(key)
                    digest = hashlib.blake2b(
                        key.encode(), digest_size=16
                    ).digest()  # names can be long, and many
                    if digest in seen:
                        group.refuse("duplicate_key", f"second sample at {member.name}")
                    seen.add(digest)
                if unsafe:
                    group.refuse("unsafe_member", f"{member.name}: {unsafe}")
                else:
                    limit = (
                        self.max_image_bytes if suffix in IMAGE_SUFFIXES else self.max_text_bytes
                    )
                    group.add(suffix, member, tar, limit)
        except _DAMAGED as error:
            yield from _cut_short(tar, group, str(error))
            return
        if group is not None:
            yield group.outcome()


# ---- samples ---------------------------------------------------------------------------------------------------------


@dataclass
class _Group:
    """The consecutive members of one key, as far as they have been read."""

    key: str
    fault: Fault | None = None
    suffixes: set[str] = field(default_factory=set)
    """The suffixes met that mean something here; one that comes again starts another sample."""
    image: bytes | None = None
    texts: dict[str, bytes] = field(default_factory=dict)
    reading: bool = False
    """A member is being read; still set afterwards if the shard ended inside it."""

    def refuse(self, reason: str, detail: str) -> None:
        """Marks the sample as unusable; the first reason stays."""
        self.fault = self.fault or Fault(self.key, reason, detail)

    def add(self, suffix: str, member: tarfile.TarInfo, tar: _TarReader, limit: int) -> None:
        """Takes a member in if it is a picture (the first one counts) or a caption file."""
        if suffix not in IMAGE_SUFFIXES + CAPTION_SUFFIXES:
            return
        self.suffixes.add(suffix)
        if member.size > limit:
            self.refuse("member_too_large", f"{member.name}: {member.size} bytes, at most {limit}")
        if self.fault is not None or (suffix in IMAGE_SUFFIXES and self.image is not None):
            return
        self.reading = True
        data = tar.read()
        self.reading = False
        if suffix in IMAGE_SUFFIXES:
            self.image = data
        else:
            self.texts[suffix] = data

    def outcome(self) -> Sample | Fault:
        if self.fault is not None:
            return self.fault
        if self.image is None:
            return Fault(self.key, "missing_image", f"no {', '.join(IMAGE_SUFFIXES)} member")
        captions = _captions(self.texts)
        if not captions:
            found = " and ".join(f".{suffix}" for suffix in self.texts)
            return Fault(
                self.key,
                "missing_caption",
                f"no caption in {found}" if found else "no .txt or .json member",
            )
        return Sample(self.key, self.image, captions)


def _cut_short(tar: _TarReader, group: _Group | None, detail: str) -> Iterator[Sample | Fault]:
    """What is left to say of a shard whose next bytes are missing or damaged."""
    if not tar.started:
        yield Fault("", "not_a_tar", detail)
        return
    key = ""
    if group is not None:
        outcome = group.outcome()
        if group.reading or (
            isinstance(outcome, Fault) and outcome.reason in ("missing_image", "missing_caption")
        ):
            key = group.key  # what it lacks lies behind the cut
        else:
            yield outcome
    yield Fault(key, "truncated_shard", detail)


def _identify(member: tarfile.TarInfo) -> tuple[str | None, str, str]:
    """The key of a member (None: nothing to do with samples), its lower-case suffix, and why it is unsafe or ""."""
    name = member.name
    if len(name) > MAX_NAME:
        return name[:MAX_NAME], "", f"a name of {len(name)} characters, at most {MAX_NAME}"
    parts = re.split(r"[/\\]", name)
    if member.isdir():
        return None, "", ""
    if name.startswith(("/", "\\")):
        unsafe = "absolute path"
    elif ".." in parts:
        unsafe = "leaves the folder"
    elif any(part == "__MACOSX" or (part.startswith(".") and part != ".") for part in parts):
        return None, "", ""
    elif member.issym() or member.islnk():
        unsafe = f"link to {member.linkname}"
    elif member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE):
        unsafe = f"not a regular file (type {member.type!r})"
    else:
        unsafe = ""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    if stem and dot:
        return f"{folder}{slash}{stem}", suffix.lower(), unsafe
    return (name, "", unsafe) if unsafe else (None, "", "")


def _captions(texts: dict[str, bytes]) -> tuple[str, ...]:
    """The captions of .txt and .json, in this order, without blank and repeated ones, MAX_CAPTIONS at most."""
    from_json = _json_captions(texts.get("json", b""))
    try:
        from_txt = [texts.get("txt", b"").decode("utf-8-sig")]
    except UnicodeDecodeError:
        from_txt = [] if any(map(str.strip, from_json)) else [texts["txt"].decode("latin-1")]
    unique: dict[str, str] = {}
    for caption in from_txt + from_json:
        unique.setdefault(caption.strip(), caption)
    unique.pop("", None)
    return tuple(islice(unique.values(), MAX_CAPTIONS))


def _json_captions(data: bytes) -> list[str]:
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):  # not JSON, not text, or nested too deep
        return []
    if not isinstance(record, dict):
        return []
    found: list[str] = []
    for value in (record.get("captions"), record.get("caption")):
        found += [
            item
            for item in (value if isinstance(value, list) else [value])
            if isinstance(item, str)
        ]
    # JSON can spell lone surrogates, which no UTF-8 file can hold.
    return [caption.encode("utf-8", "replace").decode("utf-8") for caption in found]


# ---- tar -------------------------------------------------------------------------------------------------------------


class _TarReader:
    """The members of a tar, strictly forwards; `read` gives the data of the current one.

    Headers are parsed by tarfile, the walk is our own, because tarfile's stream mode takes a damaged header for the end
    of the archive (the samples behind it would vanish unreported), reads extension headers of any declared size into
    memory, and keeps every header it has seen. Damage raises tarfile.ReadError.
    """

    def __init__(self, stream: io.BufferedReader | _Gunzip) -> None:
        self._stream = stream
        self._unread = 0
        self._padding = 0
        self.started = False
        """A valid header has been found, so this is a tar."""

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        overrides: dict[str, str] = {}
        while (member := self._next_header()) is not None:
            if member.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
                field_name = "path" if member.type == tarfile.GNUTYPE_LONGNAME else "linkpath"
                overrides[field_name] = _decode(self._read_extension(member).rstrip(b"\0"))
            elif member.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                records = _parse_pax(self._read_extension(member))
                overrides |= {
                    keyword: records[keyword]
                    for keyword in records.keys() & {"path", "linkpath", "size"}
                }
            elif member.type == tarfile.XGLTYPE:
                self._read_extension(
                    member
                )  # defaults for all members: comments in practice, never a name
            else:
                member.name = overrides.get("path", member.name)
                member.linkname = overrides.get("linkpath", member.linkname)
                if "size" in overrides:
                    member.size = _parse_size(overrides["size"])
                overrides = {}
                if member.isreg() or member.type not in tarfile.SUPPORTED_TYPES:
                    self._expect(member.size)
                yield member

    def read(self) -> bytes:
        """The data of the current member, whole."""
        data = self._take(self._unread)
        self._unread = 0
        return data

    def _next_header(self) -> tarfile.TarInfo | None:
        """The next header block, None at the end-of-archive mark."""
        self._skip(self._unread + self._padding)
        self._expect(0)
        block = self._stream.read(tarfile.BLOCKSIZE)
        if block == bytes(tarfile.BLOCKSIZE):
            self.started = True
            return None
        if not block:
            raise tarfile.ReadError("the file ends without an end-of-archive mark")
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error
        if member.size < 0:
            raise tarfile.ReadError("negative size in header")
        self.started = True
        return member

    def _read_extension(self, member: tarfile.TarInfo) -> bytes:
        if member.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(
                f"extension header of {member.size} bytes, at most {MAX_HEADER_BYTES}"
            )
        self._expect(member.size)
        return self.read()

    def _expect(self, size: int) -> None:
        self._unread = size
        self._padding = -size % tarfile.BLOCKSIZE

    def _take(self, size: int) -> bytes:
        data = self._stream.read(size)
        if len(data) < size:
            raise tarfile.ReadError("unexpected end of data")
        return data

    def _skip(self, size: int) -> None:
        while size > 0:
            size -= len(self._take(min(size, 1024**2)))


def _decode(raw: bytes) -> str:
    return raw.decode(
        "utf-8", "backslashreplace"
    )  # as for plain headers: keys must be storable as UTF-8


def _parse_pax(data: bytes) -> dict[str, str]:
    """PAX records, each `LENGTH KEYWORD=VALUE\\n` with LENGTH the bytes of the whole record."""
    records: dict[str, str] = {}
    start, stop = 0, len(data.rstrip(b"\0"))
    while start < stop:
        match = _PAX_RECORD.match(data, start)
        end = start + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(data):
            raise tarfile.ReadError("damaged PAX header")
        records[_decode(match[2])] = _decode(data[match.end() : end - 1])
        start = end
    return records


def _parse_size(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,19}", text):
        raise tarfile.ReadError("damaged size in PAX header")
    return int(text)


def _open_stream(location: str) -> io.BufferedReader:
    filesystem, path = _open_root(location)
    return open_stream(filesystem, path, location)


def _decompressed(stream: io.BufferedReader) -> io.BufferedReader | _Gunzip:
    return _Gunzip(stream) if stream.peek(2)[:2] == b"\x1f\x8b" else stream


class _Gunzip:
    """What a gzip file holds; tarfile.ReadError where it expands beyond MAX_EXPANSION."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._compressed = _Counted(stream)
        self._unzipped = gzip.GzipFile(fileobj=self._compressed, mode="rb")
        self._given = 0

    def read(self, size: int) -> bytes:
        data = self._unzipped.read(size)
        self._given += len(data)
        if self._given > max(EXPANSION_FREE, MAX_EXPANSION * self._compressed.taken):
            raise tarfile.ReadError(
                f"expands to more than {MAX_EXPANSION} times its compressed size"
            )
        return data


class _Counted(io.RawIOBase):
    """A stream that knows how much was read of it."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream
        self.taken = 0

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self.taken += len(data)
        return data


# ---- finding shards --------------------------------------------------------------------------------------------------


def _find_shards(uri: str) -> tuple[dict[str, pafs.FileInfo], str]:
    """Location -> size and time of every shard the patterns of `uri` name; and which of them match nothing, if any."""
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
    if unmatched:
        first = f"{unmatched[0]} (looked in {_fixed_folder(unmatched[0])})"
        if len(patterns) == 1:
            raise SourceError(f"no tar shard matches {first}")
        return (
            found,
            f"{len(unmatched)} of {len(patterns)} shard patterns match nothing, the first is {first}",
        )
    return found, ""


def _only_shards(pattern: str, infos: list[pafs.FileInfo]) -> list[pafs.FileInfo]:
    shards = [info for info in infos if info.is_file and info.path.lower().endswith(SHARD_SUFFIXES)]
    if infos and not shards and not _is_magic(pattern):
        if infos[0].is_file:
            raise SourceError(f"{pattern} is not a tar shard ({', '.join(SHARD_SUFFIXES)})")
        raise SourceError(f"{pattern} is a folder; name the shards in it, as in {pattern}/*.tar")
    return shards


def _expand(uri: str) -> Iterator[str]:
    """The patterns of a source URI: lists read, brace ranges spelled out, local paths made absolute."""
    is_file = os.path.isfile(
        _absolute(uri.removeprefix("@"))
    )  # such a name is literal: it may hold spaces or braces
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
    except ValueError:
        raise SourceError(
            f"braces do not match in {pattern!r}"
        ) from None  # it shows the URI as it is


def _read_list(location: str) -> list[str]:
    try:
        with _open_stream(location) as stream:
            lines = [line.strip() for line in stream.read().decode("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"cannot read the shard list {location}: {error}") from error
    folder = location.rpartition("/")[0]
    entries = [line for line in lines if line and not line.startswith("#")]
    return [
        entry if "://" in entry or entry.startswith(("/", "~")) else f"{folder}/{entry}"
        for entry in entries
    ]


class _Store:
    """A file system to look for files in; each folder is listed once, which on object stores is what costs."""

    def __init__(self, prefix: str, query: str) -> None:
        self._prefix = prefix
        self._query = query
        self._filesystem, self.root = _open_root(prefix + query)
        self._listings: dict[str, dict[str, pafs.FileInfo]] = {}

    def location(self, path: str) -> str:
        """The location of a path that `walk` found."""
        return self._prefix + path.removeprefix(self.root).lstrip("/") + self._query

    def walk(self, folder: str, parts: list[str]) -> Iterator[pafs.FileInfo]:
        """The files and folders that match the path `parts` below `folder`; wildcards pass over hidden names."""
        head, *rest = parts
        if rest and not _is_magic(head):  # not listed: the folders on the way may be closed or huge
            yield from self.walk(f"{folder.rstrip('/')}/{head}", rest)
            return
        entries = self._list(folder)
        if head == "**":
            yield from self.walk(folder, rest or ["*"])
            matches = [info for name, info in entries.items() if not name.startswith(".")]
            rest = parts
        elif _is_magic(head):
            matches = [
                info
                for name, info in entries.items()
                if fnmatchcase(name, head) and not name.startswith(".")
            ]
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


def _absolute(path: str) -> str:
    return (
        path
        if is_remote(path)
        else os.path.abspath(os.path.expanduser(path.removeprefix("file://")))
    )


def _split_location(location: str) -> tuple[str, str, str]:
    """A location as its root (`/` or `s3://bucket/`), the path below it, and its `?query` or ""."""
    if not is_remote(location):
        return "/", location.lstrip("/"), ""
    address, question, query = location.partition("?")
    scheme, _, rest = address.partition("://")
    authority, _, path = rest.partition("/")
    return f"{scheme}://{authority}/", path, question + query


def _open_root(location: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a location and the path inside it, taken to the letter.

    Only the root goes through URI parsing, which would refuse or decode spaces, `%` and other odd names.
    """
    if not is_remote(location):
        return pafs.LocalFileSystem(), location
    prefix, path, query = _split_location(location)
    filesystem, root = _open_store(prefix.rstrip("/") + query)
    return filesystem, f"{root.rstrip('/')}/{path}".rstrip("/")


@lru_cache(maxsize=16)  # setting up a store can cost a round trip, as for the region of a bucket
def _open_store(root_uri: str) -> tuple[pafs.FileSystem, str]:
    return open_filesystem(root_uri)


def _is_magic(pattern: str) -> bool:
    return re.search(r"[*?\[]", pattern) is not None


def _fixed_folder(pattern: str) -> str:
    prefix, path, _ = _split_location(pattern)
    return prefix + "/".join(takewhile(lambda part: not _is_magic(part), path.split("/")[:-1]))


def _shard_names(locations: list[str]) -> dict[str, str]:
    """Location -> name: the file's stem in safe characters, with a hash of the location where two would be the same.

    Longer than NAME_LENGTH it is cut there, with a hash as well.
    """
    names = {location: _safe_stem(location) for location in locations}
    uses = Counter(names.values())
    for location, name in names.items():
        if uses[name] > 1 or len(name) > NAME_LENGTH:
            names[location] = (
                f"{name[:NAME_LENGTH]}-{hashlib.blake2b(location.encode(), digest_size=4).hexdigest()}"
            )
    return names


def _safe_stem(location: str) -> str:
    path = _split_location(location)[1]
    stem = re.sub(r"\.(tar|tar\.gz|tgz)$", "", path.rpartition("/")[2], flags=re.IGNORECASE)
    return re.sub(r"[^A-Za-z0-9._-]", "_", stem).lstrip(".") or "shard"

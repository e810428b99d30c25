"""Image-caption samples in tar shards, the WebDataset layout: `KEY.jpg`, `KEY.txt`, `KEY.json`.

A shard is read once, forwards, member by member (`sources.tar`); nothing is ever extracted to a
path. Memory holds one sample and a digest of every key of the shard. Shards are found by
`sources.shard_patterns`.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from pds_ray.config import ReadConfig
from pds_ray.modalities.text import MAX_CAPTIONS
from pds_ray.sources.base import Fault, MissingShardsError, Sample, Shard
from pds_ray.sources.shard_patterns import find_shards, open_shard, shard_names
from pds_ray.sources.tar import DAMAGE, TarReader

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif")
CAPTION_SUFFIXES = ("txt", "json")

MAX_NAME = 4096
"""Longest name of a member, in characters: no file system takes a longer path."""

_GONE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


@dataclass(frozen=True)
class WebDatasetSource:
    """Tar shards of image-caption samples.

    `uri` is one or more patterns, separated by white space or `::`. A pattern is a path or an
    object-store URI, in which `{a,b}` and `{00000..00041}` are spelled out and `*`, `?`, `[...]`,
    `**` match files that exist; `@FILE` reads patterns from a list, one per line, relative to that
    file. Settings of a store follow a `?`, as in `s3://bucket/*.tar?region=eu-west-1`; so a `?` in
    a remote pattern is never a wildcard.

    A sample's captions are its .txt and the strings of `captions` and `caption` in its .json; of
    more than MAX_CAPTIONS the first ones count.
    """

    uri: str = field(repr=False)
    options: ReadConfig = ReadConfig()
    max_image_bytes: int = 64 * 1024**2
    max_text_bytes: int = 1024**2
    validation: None = None

    def shards(self) -> list[Shard]:
        """Return the shards that exist, sorted by location.

        Raises SourceError if a pattern matches nothing: MissingShardsError, which holds the shards
        found, if it is one of several.
        """
        found, missing = find_shards(self.uri)
        shards = [
            Shard(name, location, found[location].size or 0, str(found[location].mtime_ns))
            for location, name in shard_names(sorted(found)).items()
        ]
        if missing:
            raise MissingShardsError(missing, shards)
        return shards

    def read(self, shard: Shard) -> Iterator[Sample | Fault]:
        """Yield the samples and faults of a shard, in stored order.

        A file that is gone or may not be read is a fault. Any other I/O failure (network, disk)
        says nothing about the data: it is raised, for the caller to try again.
        """
        try:
            stream = open_shard(shard.location)
        except _GONE as error:
            yield Fault("", "missing_shard", error.strerror or str(error))
            return
        with stream:
            yield from self.read_samples(TarReader(stream))

    def read_samples(self, tar: TarReader) -> Iterator[Sample | Fault]:
        """Yield the samples and faults of an open tar; damage is a fault and the end."""
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
                    # a digest, because names can be long, and many
                    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
                    if digest in seen:
                        group.refuse("duplicate_key", f"second sample at {member.name}")
                    seen.add(digest)
                if unsafe:
                    group.refuse("unsafe_member", f"{member.name}: {unsafe}")
                else:
                    is_image = suffix in IMAGE_SUFFIXES
                    limit = self.max_image_bytes if is_image else self.max_text_bytes
                    group.add(suffix, member, tar, limit)
        except DAMAGE as error:
            yield from _cut_short(tar, group, str(error))
            return
        if group is not None:
            yield group.outcome()


@dataclass
class _Group:
    """The consecutive members of one key, as far as they have been read."""

    key: str
    fault: Fault | None = None
    suffixes: set[str] = field(default_factory=set)
    """Known suffixes met so far; one that comes again starts another sample."""
    image: bytes | None = None
    texts: dict[str, bytes] = field(default_factory=dict)
    reading: bool = False
    """A member is being read; still set afterwards if the shard ended inside it."""

    def refuse(self, reason: str, detail: str) -> None:
        """Mark the sample as unusable; the first reason stays."""
        self.fault = self.fault or Fault(self.key, reason, detail)

    def add(self, suffix: str, member: tarfile.TarInfo, tar: TarReader, limit: int) -> None:
        """Take a member in if it is an image (the first one counts) or a caption file."""
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
        """Return the sample that the members make, or the fault."""
        if self.fault is not None:
            return self.fault
        if self.image is None:
            return Fault(self.key, "missing_image", f"no {', '.join(IMAGE_SUFFIXES)} member")
        captions = read_captions(self.texts)
        if captions:
            return Sample(self.key, self.image, captions)
        found = " and ".join(f".{suffix}" for suffix in self.texts)
        detail = f"no caption in {found}" if found else "no .txt or .json member"
        return Fault(self.key, "missing_caption", detail)


def _cut_short(tar: TarReader, group: _Group | None, detail: str) -> Iterator[Sample | Fault]:
    """Yield the outcome of a shard whose next bytes are missing or damaged."""
    if not tar.started:
        yield Fault("", "not_a_tar", detail)
        return
    key = ""
    if group is not None:
        outcome = group.outcome()
        lacks = isinstance(outcome, Fault) and outcome.reason.startswith("missing_")
        if group.reading or lacks:
            key = group.key  # what it lacks lies behind the cut
        else:
            yield outcome
    yield Fault(key, "truncated_shard", detail)


def _identify(member: tarfile.TarInfo) -> tuple[str | None, str, str]:
    """Return a member's key, its lower-case suffix, and why it is unsafe or "".

    The key is None for members that have nothing to do with samples.
    """
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


def read_captions(texts: dict[str, bytes]) -> tuple[str, ...]:
    """Return the captions of .txt and .json, in this order, by their suffix.

    Blank and repeated ones are left out; at most MAX_CAPTIONS count.
    """
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
        items = value if isinstance(value, list) else [value]
        found += [item for item in items if isinstance(item, str)]
    # JSON can spell lone surrogates, which no UTF-8 file can hold.
    return [caption.encode("utf-8", "replace").decode("utf-8") for caption in found]

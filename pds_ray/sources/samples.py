"""Files of an archive, one after the other, put together to samples.

A file's suffix is the longest known one at its end; all before it is the key, dots included, so
that `22.05.jpg` and `www.example.org_7.jpg` are samples of their own. A file whose key extends
another's by a dot (`0001.seg.png` beside `0001.jpg`) belongs to that sample and is not looked at,
unless it makes a sample by itself, with image and caption.

The files of a sample lie side by side. A sample stays open until the image of another comes, so
that files without an image in between, as metadata are, do not end it. At most two are open.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from pds_ray.sources.advice import APART, HARD_LINK, HOLES, TWO_KEYS
from pds_ray.sources.base import Fault, Sample
from pds_ray.sources.captions import CaptionReader, Names
from pds_ray.sources.tar import Member, TarReader
from pds_ray.sources.unpack import DAMAGE

MAX_NAME = 4096
"""Longest name of a member, in characters: no file system takes a longer path."""

MAX_PARTS = 256
"""Most incomplete samples kept until the sample comes that they may belong to: its masks, edges."""

SHOWN = 5  # names that a fault shows


@dataclass(frozen=True)
class Files:
    """The files that are looked at, by their suffix."""

    images: Names
    captions: CaptionReader
    max_image_bytes: int
    max_text_bytes: int

    @cached_property
    def known(self) -> frozenset[str]:
        return frozenset((*self.images, *self.captions.suffixes))

    @cached_property
    def _longest(self) -> int:
        return max(suffix.count(".") for suffix in self.known) + 1

    def suffix(self, base: str) -> str:
        """Return the longest known suffix of a file name, in lower case; "" if it has none."""
        parts = base.lower().split(".")
        lengths = range(min(self._longest, len(parts) - 1), 0, -1)
        ends = (".".join(parts[-length:]) for length in lengths)
        return next((end for end in ends if end in self.known), "")


def read_samples(tar: TarReader, files: Files, each_line: bool) -> Iterator[Sample | Fault]:
    """Yield the samples and faults of an open tar; damage is a fault and the end.

    They come in stored order, but for files that stand between those of a sample. With `each_line`
    each line of a text file is a caption.
    """
    samples = _Samples(files, each_line)
    try:
        for member in tar:
            file = _identify(member, files)
            if file is not None:
                yield from samples.take(file, member.size, tar)
    except DAMAGE as error:
        if tar.started:
            yield from samples.cut_short(str(error))
        else:
            yield Fault("", "not_a_tar", str(error))
        return
    yield from samples.end()


@dataclass(frozen=True)
class _File:
    """A member of an archive, by its name."""

    name: str
    key: str
    """All before a known suffix; before the first dot of the base name if none is known."""
    suffix: str
    """In lower case."""
    known: bool
    unsafe: str = ""
    """Why it must not be read, "" if it may."""

    @property
    def begins(self) -> str:
        """The name up to the first dot of its base name."""
        folder, slash, base = self.name.rpartition("/")
        return f"{folder}{slash}{base.partition('.')[0]}"


def _identify(member: Member, files: Files) -> _File | None:
    """Return a member as a file; None if it has nothing to do with samples."""
    name = member.name
    if len(name) > MAX_NAME:
        problem = f"a name of {len(name)} characters, at most {MAX_NAME}"
        return _File(name[:MAX_NAME], name[:MAX_NAME], "", False, problem)
    parts = re.split(r"[/\\]", name)
    if member.isdir():
        return None
    if name.startswith(("/", "\\")):
        unsafe = "absolute path"
    elif ".." in parts:
        unsafe = "leaves the folder"
    elif any(part == "__MACOSX" or (part.startswith(".") and part != ".") for part in parts):
        return None
    elif member.issym():
        unsafe = f"link to {member.linkname}"
    elif member.islnk():
        unsafe = f"{HARD_LINK}{member.linkname}"
    elif not member.isreg():
        unsafe = f"not a regular file (type {member.type!r})"
    else:
        unsafe = member.problem
    base = name.rpartition("/")[2]
    known = files.suffix(base)
    if known:
        if member.type == tarfile.GNUTYPE_SPARSE:  # what stands in the archive is not the file
            unsafe = unsafe or HOLES
        return _File(name, name[: -len(known) - 1], known, True, unsafe)
    stem, dot, suffix = base.partition(".")
    if stem and dot:
        return _File(name, name[: -len(suffix) - 1], suffix.lower(), False, unsafe)
    return _File(name, name, "", False, unsafe) if unsafe else None


@dataclass(eq=False)
class _Group:
    """The files of one key, as far as they have been read."""

    first: _File
    fault: Fault | None = None
    too_large: Fault | None = None
    """A file that is too large, and needed only where no file of a usual name is there."""
    again: str | None = None
    """The first known file's name if the key was there before, "" if not; None without such a file.
    """
    suffixes: set[str] = field(default_factory=set)
    """Known suffixes met so far; one that comes again starts another sample."""
    has_image: bool = False
    image: tuple[str, bytes] | None = None
    """Suffix and data."""
    texts: dict[str, bytes] = field(default_factory=dict)
    found: list[str] = field(default_factory=list)
    """The parts that its files add to the key."""
    reading: bool = False
    """A file is being read; still set afterwards if the archive ended inside it."""

    @property
    def key(self) -> str:
        return self.first.key

    @property
    def is_part(self) -> bool:
        """It may belong to a sample with a shorter key, or the same if no file of it is known."""
        return not self.suffixes or self.key != self.first.begins

    def takes(self, file: _File) -> bool:
        """Return whether a file belongs here."""
        if file.known:
            return file.key == self.key and file.suffix not in self.suffixes
        return file.key == self.key or file.name.startswith(f"{self.key}.")

    def belongs(self, other: _Group) -> bool:
        """Return whether its key extends that of another sample by a dot."""
        is_sample = bool(other.suffixes) or "." not in other.first.suffix
        return self is not other and is_sample and self.extends(other.key)

    def extends(self, key: str) -> bool:
        """Return whether its first file's name goes on where `key` and a dot end."""
        return self.first.name.startswith(f"{key}.")

    def refuse(self, reason: str, detail: str) -> None:
        """Mark the sample as unusable; the first reason stays."""
        self.fault = self.fault or Fault(self.key, reason, detail)

    def add(self, file: _File, size: int, tar: TarReader, files: Files) -> None:
        """Take a file in if it is the image or a caption file."""
        if len(self.found) < SHOWN:
            self.found.append(file.name.removeprefix(self.key)[-40:])
        is_image = file.suffix in files.images
        self.has_image |= is_image and file.known
        if file.unsafe:
            self.refuse("unsafe_member", f"{file.name}: {file.unsafe}")
        if file.unsafe or not file.known:
            return
        self.suffixes.add(file.suffix)
        limit = files.max_image_bytes if is_image else files.max_text_bytes
        if size > limit:
            detail = f"{file.name}: {size} bytes, at most {limit}"
            if file.suffix not in (files.images if is_image else files.captions.suffixes).always:
                self.too_large = self.too_large or Fault(self.key, "member_too_large", detail)
                return
            self.refuse("member_too_large", detail)
        if self.fault or self.again or (is_image and not self._better(file.suffix, files.images)):
            return
        self.reading = True
        data = tar.read()
        self.reading = False
        if is_image:
            self.image = (file.suffix, data)
        else:
            self.texts[file.suffix] = data

    def _better(self, suffix: str, images: Names) -> bool:
        """Return whether to take an image: the first counts, one of a usual suffix before all."""
        return self.image is None or (suffix in images.always and self.image[0] in images.otherwise)

    def outcome(self, files: Files, each_line: bool) -> Sample | Fault:
        """Return the sample that the files make, or the fault."""
        if self.again:
            whole = self.has_image and not self.suffixes <= set(files.images)
            detail = f"second sample at {self.again}"
            return Fault(self.key, "duplicate_key", detail if whole else f"{detail}: {APART}")
        if self.fault is not None:
            return self.fault
        captions = files.captions.read(self.texts, each_line)
        if self.image is not None and captions.texts:
            return Sample(self.key, self.image[1], captions.texts, captions.notes)
        return self.too_large or self._lacking(files)

    def _lacking(self, files: Files) -> Fault:
        """Return the fault of a sample without an image or without a caption."""
        found = f"found {', '.join(self.found)}"
        if self.image is None:
            return Fault(
                self.key, "missing_image", f"no image ({', '.join(files.images)}); {found}"
            )
        wanted = ", ".join(files.captions.suffixes)
        nothing = f"no caption file ({wanted}); {found}"
        detail = files.captions.found(self.texts) if self.texts else nothing
        return Fault(self.key, "missing_caption", detail)


class _Samples:
    """The samples of an archive that are not finished yet."""

    def __init__(self, files: Files, each_line: bool) -> None:
        self._files = files
        self._each_line = each_line
        self._open: list[_Group] = []
        """One or two; the second has no image or belongs to the first."""
        self._latest: _Group | None = None
        self._parts: list[tuple[_Group, Fault]] = []
        """Incomplete samples, alike up to the first dot, that may belong to one with a shorter key.

        Their data is gone.
        """
        self._seen: set[bytes] = set()

    def take(self, file: _File, size: int, tar: TarReader) -> Iterator[Sample | Fault]:
        """Add a file to its sample; yield the samples that end with it."""
        # a digest, because names can be long, and many
        digest = hashlib.blake2b(file.key.encode(), digest_size=16).digest()
        group = next((group for group in self._open if group.takes(file)), None)
        if group is None:
            if not file.known and not file.unsafe and digest in self._seen:
                return  # one more file of a sample that was read
            group = _Group(file)
            yield from self._make_room(group)
            self._open.append(group)
        if file.known and group.again is None:
            group.again = file.name if digest in self._seen else ""
            self._seen.add(digest)
        self._latest = group
        group.add(file, size, tar, self._files)
        first = self._open[0]
        if group is not first and group.has_image and not group.belongs(first):
            yield from self._close([first])

    def end(self) -> Iterator[Sample | Fault]:
        """Yield what is open at the end of the archive."""
        yield from self._close(self._open)
        yield from self._release()

    def cut_short(self, detail: str) -> Iterator[Sample | Fault]:
        """Yield the outcome of an archive whose next bytes are missing or damaged."""
        key = ""
        if self._latest in self._open:
            lacks = _lacks(self._latest.outcome(self._files, self._each_line))
            if self._latest.reading or lacks:
                key = self._latest.key  # what it lacks lies behind the cut
                self._open.remove(self._latest)
        yield from self.end()
        yield Fault(key, "truncated_shard", detail)

    def _make_room(self, coming: _Group) -> Iterator[Sample | Fault]:
        """Close the open samples that cannot stay open beside one that comes."""
        if self._open:
            first, file = self._open[0], coming.first
            ends = file.known and (
                file.key == first.key or first.first.name.startswith(f"{file.key}.")
            )
            is_image = file.known and file.suffix in self._files.images
            if any(self._outlasts(second, coming) for second in self._open[1:]):
                yield from self._close([first])
            else:
                stays = not ends and (not is_image or coming.belongs(first))
                yield from self._close(self._open[stays:])
        begins = {group.first.begins for group in (*self._open, coming)}
        if self._parts and self._parts[0][0].first.begins not in begins:
            yield from self._release()

    def _outlasts(self, second: _Group, coming: _Group) -> bool:
        """Return whether the second open sample stays open beside one that comes, not the first.

        It does if that may be a part of it, or is a file of no sample, as may stand between caption
        and image, and the first sample lacks nothing.
        """
        first = self._open[0]
        if coming.belongs(second):
            return True
        if coming.first.known or second.belongs(first):
            return False
        return not _lacks(first.outcome(self._files, self._each_line))

    def _close(self, groups: list[_Group]) -> Iterator[Sample | Fault]:
        """Yield what becomes of open samples that end, or keep them as parts of another."""
        for group in groups:
            outcome = group.outcome(self._files, self._each_line)
            if group.has_image:
                self._parts = [part for part in self._parts if not part[0].belongs(group)]
            if not (_lacks(outcome) or _is_too_large(outcome)):
                if self._parts and self._parts[0][0].first.begins == group.first.begins:
                    yield from self._release()
                yield outcome
            elif any(owner.has_image and group.belongs(owner) for owner in self._open):
                continue
            elif group.is_part:
                group.image, group.texts = None, {}
                assert isinstance(outcome, Fault)
                self._parts.append((group, outcome))
                if len(self._parts) > MAX_PARTS:
                    yield from self._release()
            else:
                yield outcome
        self._open = [group for group in self._open if group not in groups]

    def _release(self) -> Iterator[Fault]:
        """Yield the faults of incomplete samples that belong to no other.

        An image and a caption file whose keys begin alike are one sample, under names that the
        options do not have.
        """
        parts, self._parts = self._parts, []
        suffixes = [suffix for group, _ in parts for suffix in group.suffixes]
        kinds = {group.has_image for group, _ in parts if group.suffixes}
        if len(kinds) > 1 and len(suffixes) == len(set(suffixes)):
            begins = parts[0][0].first.begins
            found = [group.first.name.removeprefix(begins) for group, _ in parts[:SHOWN]]
            yield Fault(begins, "missing_image", f"{TWO_KEYS}; found {', '.join(found)}")
        else:
            yield from (fault for _, fault in parts)


def _lacks(outcome: Sample | Fault) -> bool:
    return isinstance(outcome, Fault) and outcome.reason.startswith("missing_")


def _is_too_large(outcome: Sample | Fault) -> bool:
    return isinstance(outcome, Fault) and outcome.reason == "member_too_large"

"""The captions of a sample, from the files that hold them: text and JSON in the shapes people use.

Names of files and of JSON entries are options. Without a choice of the user some names always
count, as they always did, and further ones where these give no caption: sets that have the same
caption under several names do not get it several times.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from pds_ray.config import FilesConfig, listed
from pds_ray.errors import first_line
from pds_ray.modalities.text import MAX_CAPTIONS, decode_text, storable
from pds_ray.sources.base import CAPTION_LINES

_LINE_END = re.compile(r"\r\n|\n|\r")
SHOWN = 8  # names that a message about a sample shows

USUAL, GUESSED, OTHERWISE = range(3)
"""Ranks of a caption file: UTF text, or JSON that has texts under names that always count; text in
an encoding that is a guess; JSON of any other shape.

A sample that has captions of one rank keeps them, whatever further shapes are learned.
"""


@dataclass(frozen=True)
class Names:
    """Names by which something is found, in the order in which they count."""

    always: tuple[str, ...]
    """Names that all count."""
    otherwise: tuple[str, ...] = ()
    """Names of which the first that gives something counts, if none of `always` does."""

    def __iter__(self) -> Iterator[str]:
        return iter(self.always + self.otherwise)

    def pick(self, give: Callable[[str], list[str]]) -> list[str]:
        """Return what `give` returns for the names that count."""
        found = [item for name in self.always for item in give(name)]
        return found or next(filter(None, map(give, self.otherwise)), [])


IMAGE_SUFFIXES = Names(
    ("jpg", "jpeg", "png", "webp", "gif"), ("jfif", "jpe", "bmp", "tif", "tiff", "avif", "img")
)
CAPTION_SUFFIXES = Names(("txt", "json"), ("caption", "captions", "cap", "text"))
CAPTION_KEYS = Names(
    ("captions", "caption"),
    ("TEXT", "text", "alt_text", "alt", "raw_caption", "raw", "sentences"),
)


def suffixes(option: str, usual: Names) -> Names:
    """Return the suffixes that an option names, in lower case, without a dot in front."""
    if option == "auto":
        return usual
    return Names(tuple(dict.fromkeys(name.lower().lstrip(".") for name in listed(option))))


@dataclass(frozen=True)
class Captions:
    """The captions of one sample."""

    texts: tuple[str, ...]
    """Not blank, none twice, at most MAX_CAPTIONS."""
    notes: tuple[str, ...] = ()
    """As those of `sources.base.Sample`."""


@dataclass(frozen=True)
class CaptionReader:
    """A reader of caption files by the options of a run."""

    suffixes: Names
    """Suffixes of caption files; those that end in json hold JSON, all others text."""
    keys: Names

    @classmethod
    def of(cls, options: FilesConfig) -> CaptionReader:
        """Return the reader that the options ask for."""
        keys = CAPTION_KEYS
        if options.caption_keys != "auto":
            keys = Names(listed(options.caption_keys))
        return cls(suffixes(options.caption_suffixes, CAPTION_SUFFIXES), keys)

    def read(self, files: Mapping[str, bytes], each_line: bool = False) -> Captions:
        """Return the captions in the files of one sample, given by their suffix.

        With `each_line` each line of a text file is a caption. The files of the first rank that
        gives any count alone. Raises nothing, whatever the bytes are.
        """
        parsed = {
            suffix: self._json(data) if is_json(suffix) else _File.of_text(data, each_line)
            for suffix, data in files.items()
        }
        for rank in sorted({file.rank for file in parsed.values()}):
            alike = {suffix: file for suffix, file in parsed.items() if file.rank == rank}
            if captions := self._choose(alike):
                return captions
        return Captions(())

    def _choose(self, files: Mapping[str, _File]) -> Captions | None:
        """Return the captions of those files that count, None if they have none."""
        texts = self.suffixes.pick(lambda suffix: files[suffix].captions if suffix in files else [])
        notes = dict.fromkeys(note for file in files.values() for note in file.notes)
        return Captions(_distinct(texts), tuple(notes)) if texts else None

    def of_record(self, record: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the captions in a record, a row of a table, in any shape that JSON may have."""
        return _distinct(map(storable, self._strings(record)))

    def found(self, files: Mapping[str, bytes]) -> str:
        """Say what is in files without a caption."""
        where = " and ".join(f".{suffix}" for suffix in files)
        parsed = [_parsed(data) for suffix, data in files.items() if is_json(suffix)]
        entries = (entry for file in parsed for entry in self._entries(file.value))
        shown = ", ".join(islice(entries, SHOWN))
        no_json = next(
            (f", which is no JSON ({file.problem})" for file in parsed if file.problem), ""
        )
        return f"no caption in {where}" + (f", which has {storable(shown)}" if shown else no_json)

    def _entries(self, value: Any) -> Iterator[str]:
        """Yield the names in an object, and the values that would be captions if they were text."""
        for name, entry in value.items() if isinstance(value, Mapping) else ():
            is_number = name in self.keys and isinstance(entry, int | float)
            yield f"{name[:40]} = {json.dumps(entry)[:40]} (no text)" if is_number else name[:40]

    def _json(self, data: bytes) -> _File:
        file = _parsed(data)
        usual = self._usual(file.value) if file.valid else []
        captions = usual or self._strings(file.value)
        return _File(list(map(storable, captions)), USUAL if usual else OTHERWISE)

    def _usual(self, value: Any) -> list[str]:
        """Return the texts of a JSON object under names that always count, alone or in a list."""
        entries = [value.get(name) for name in self.keys.always] if isinstance(value, dict) else []
        items = (item for each in entries for item in (each if isinstance(each, list) else [each]))
        return [item for item in items if isinstance(item, str) and item.strip()]

    def _strings(self, value: Any, deeper: int = 2) -> list[str]:
        """Return the captions in a JSON value: a text, a list of such, or an object's entries."""
        if isinstance(value, str):
            return [value] if value.strip() else []
        if isinstance(value, list):
            simple = (item for item in value if isinstance(item, str | dict))
            return [text for item in simple for text in self._strings(item, deeper)]
        if isinstance(value, Mapping) and deeper:
            return self.keys.pick(lambda name: self._strings(value.get(name), deeper - 1))
        return []


def is_json(suffix: str) -> bool:
    """Return whether files of a suffix hold JSON."""
    return suffix.rpartition(".")[2] == "json"


@dataclass(frozen=True)
class _File:
    """The captions of one file."""

    captions: list[str]
    """Not blank."""
    rank: int
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of_text(cls, data: bytes, each_line: bool) -> _File:
        text, encoding = decode_text(data)
        lines = [line for line in _LINE_END.split(text) if line.strip()]
        notes = [] if encoding in ("utf-8", "utf-8-sig") else [encoding]
        if len(lines) > 1 and not each_line:
            notes.append(CAPTION_LINES)
        captions = lines if each_line else [text] if lines else []
        return cls(captions, GUESSED if encoding == "cp1252" else USUAL, notes)


class _Json(NamedTuple):
    """The content of a JSON file."""

    value: Any
    """None if it holds no JSON."""
    valid: bool = True
    """It is as JSON should be, in UTF and without raw control characters in texts."""
    problem: str = ""
    """Why it is no JSON, "" if it is."""


def _parsed(data: bytes) -> _Json:
    """Return what a JSON file holds, in any encoding; texts in it may have raw line breaks."""
    try:
        return _Json(json.loads(data))
    except (ValueError, RecursionError):
        pass  # it is read once more, with what is often wrong in it
    try:
        return _Json(json.loads(decode_text(data)[0], strict=False), valid=False)
    except (ValueError, RecursionError) as error:  # not JSON, not text, or nested too deep
        return _Json(None, problem=first_line(error))


def _distinct(captions: Iterable[str]) -> tuple[str, ...]:
    unique: dict[str, str] = {}
    for caption in captions:
        unique.setdefault(caption.strip(), caption)
    return tuple(islice(unique.values(), MAX_CAPTIONS))

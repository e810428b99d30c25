"""Captions in files of any encoding and shape."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pds_ray.config import FilesConfig
from pds_ray.modalities.text import decode_text
from pds_ray.sources.advice import advice
from pds_ray.sources.captions import CaptionReader

TEXT = "a café with “smart” quotes – and more"


def captions(files: dict[str, bytes], each_line: bool = False, **options: str) -> tuple[str, ...]:
    return CaptionReader.of(FilesConfig(**options)).read(files, each_line).texts


@pytest.mark.parametrize(
    ("encoding", "found"),
    [
        ("utf-8", "utf-8"),
        ("utf-8-sig", "utf-8-sig"),
        ("utf-16", "utf-16"),
        ("utf-32", "utf-32"),
        ("utf-16-le", "utf-16-le"),
        ("utf-16-be", "utf-16-be"),
        ("cp1252", "cp1252"),
    ],
)
def test_encodings(encoding: str, found: str) -> None:
    assert decode_text(TEXT.encode(encoding)) == (TEXT, found)
    read = CaptionReader.of(FilesConfig()).read({"txt": TEXT.encode(encoding)})
    assert read.texts == (TEXT,)
    assert read.notes == (() if found.startswith("utf-8") else (found,))


@pytest.mark.parametrize("mark", [b"\xfe\xff", b"\0\0\xfe\xff"])
def test_marks_of_the_other_byte_order(mark: bytes) -> None:
    encoding = "utf-16-be" if len(mark) == 2 else "utf-32-be"
    assert decode_text(mark + TEXT.encode(encoding))[0] == TEXT


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff")))
def test_any_text_in_utf_8_is_read_as_it_is(text: str) -> None:
    assert decode_text(text.encode()) == (text, "utf-8")


@given(st.binary())
def test_any_bytes_are_a_text_that_can_be_stored(data: bytes) -> None:
    text, _ = decode_text(data)
    assert text.encode().decode() == text


@pytest.mark.parametrize("length", [2, 3, 4])
def test_a_text_that_a_limit_in_bytes_cut(length: int) -> None:
    last = {2: "\u00e9", 3: "\u732b", 4: "\U0001f408"}[length].encode()
    for kept in range(1, length):
        assert decode_text(TEXT.encode() + last[:kept]) == (TEXT, "utf-8")
    assert decode_text(b"caf\xe9") == ("caf\u00e9", "cp1252")


def test_bytes_that_cp1252_leaves_open_are_read_as_latin_1() -> None:
    every = bytes(range(128, 256))
    text, encoding = decode_text(every)
    assert encoding == "cp1252"
    for byte, character in zip(every, text, strict=True):
        is_open = byte in b"\x81\x8d\x8f\x90\x9d"
        assert character == bytes([byte]).decode("latin-1" if is_open else "cp1252")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"TEXT": "x"}, ("x",)),
        ({"text": "x", "url": "u"}, ("x",)),
        ({"alt": "x"}, ("x",)),
        ({"alt_text": ["x", "y"]}, ("x", "y")),
        ("x", ("x",)),
        (["x", "y", "x"], ("x", "y")),
        ([{"caption": "x"}, {"raw": "y"}], ("x", "y")),
        ({"captions": [{"caption": "x"}, {"raw": "y"}]}, ("x", "y")),
        ({"sentences": [{"raw": "x", "tokens": ["x"]}]}, ("x",)),
        ({"raw_caption": "X!", "caption": "x"}, ("x",)),  # further names are no further captions
        ({"caption": "x", "TEXT": "y", "alt": "z"}, ("x",)),
        ({"TEXT": " ", "alt": "z"}, ("z",)),
        ({"captions": ["x"], "caption": "y"}, ("x", "y")),
        ({"url": "u", "caption": None}, ()),
        (7, ()),
        ({"caption": 2012}, ()),
    ],
)
def test_shapes_of_json(value: Any, expected: tuple[str, ...]) -> None:
    assert captions({"json": json.dumps(value).encode()}) == expected


def test_keys_that_are_chosen_all_count() -> None:
    data = json.dumps({"b": "2", "caption": "no", "a b": ["1"]}).encode()
    assert captions({"json": data}, caption_keys="a b, b") == ("1", "2")


def test_json_in_cp1252_counts_where_no_other_file_does() -> None:
    data = b'{"caption": "caf\xe9"}'
    assert captions({"json": data}) == ("café",)
    assert captions({"json": data, "txt": b"coffee"}) == ("coffee",)


@pytest.mark.parametrize(
    ("text", "value", "expected"),
    [
        ("x", {"caption": "y", "captions": ["z"]}, ("x", "z", "y")),
        ("x", {"TEXT": "y"}, ("x",)),
        ("x", ["y"], ("x",)),
        ("x", "y", ("x",)),
        ("x", {"captions": [{"raw": "y"}]}, ("x",)),
        ("x", {"caption": {"text": "y"}}, ("x",)),
        ("caf\xe9", {"TEXT": "y"}, ("café",)),
        ("caf\xe9", {"caption": "y"}, ("y",)),
        (" ", {"TEXT": "y"}, ("y",)),
    ],
)
def test_further_shapes_add_nothing_to_what_always_counted(
    text: str, value: Any, expected: tuple[str, ...]
) -> None:
    files = {"txt": text.encode("latin-1"), "json": json.dumps(value).encode()}
    assert captions(files) == expected


@pytest.mark.parametrize("control", ["\t", "\n", "\r", "\x01"])
def test_json_may_have_raw_control_characters_in_texts(control: str) -> None:
    text = f"a red{control}circle"
    assert captions({"json": f'{{"caption": "{text}"}}'.encode()}) == (text,)
    assert captions({"json": f'{{"caption": "é{text}"}}'.encode("cp1252")}) == (f"é{text}",)
    both = {"txt": b"x", "json": f'{{"caption": "{text}"}}'.encode()}
    assert captions(both) == ("x",)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_caption_per_line(end: str) -> None:
    data = f"one{end}{end} two {end}one{end}".encode()
    assert captions({"txt": data}, each_line=True) == ("one", " two ")
    read = CaptionReader.of(FilesConfig()).read({"txt": data})
    assert (read.texts, read.notes) == ((data.decode(),), ("lines",))
    assert CaptionReader.of(FilesConfig()).read({"txt": b"one\n"}).notes == ()


def test_what_was_found_is_said() -> None:
    reader = CaptionReader.of(FilesConfig())
    data = json.dumps({"url": "u", "title": "x"}).encode()
    assert reader.found({"json": data}) == "no caption in .json, which has url, title"
    assert reader.found({"txt": b" "}) == "no caption in .txt"
    assert reader.found({"json": b'{"\\ud800": 1}'}) == "no caption in .json, which has ?"


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b'{"caption": 2012, "url": 7}', "has caption = 2012 (no text), url"),
        (b'{"caption": NaN}', "has caption = NaN (no text)"),
        (
            b"{'caption': 'x'}",
            "is no JSON (Expecting property name enclosed in double quotes: "
            "line 1 column 2 (char 1))",
        ),
        (
            b'{"caption": "x"}\n{"caption": "y"}',
            "is no JSON (Extra data: line 2 column 1 (char 17))",
        ),
    ],
)
def test_why_json_gives_no_caption_is_said(data: bytes, found: str) -> None:
    detail = CaptionReader.of(FilesConfig()).found({"json": data})
    assert detail == f"no caption in .json, which {found}"
    assert advice("missing_caption", detail) not in ("", advice("missing_caption", ", which has "))

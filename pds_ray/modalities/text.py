"""From the bytes of a text to its characters, and caption cleaning.

There is one cleaner per rule set, chosen by name. A cleaner never raises and may return "": the
caller counts an empty caption as missing.

Whatever the rule, a caption ends after MAX_CHARACTERS characters. A CLIP text encoder reads 77
tokens, 300 to 400 characters of prose; it would read beyond the cut only if a token had more than
26 characters on average, which real captions do not have. Tokenizers, though, take the whole text,
and the whole text is stored.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable

MAX_CHARACTERS = 2000
"""Longest caption that a cleaner lets pass."""

MAX_CAPTIONS = 1000
"""Most captions of one sample that a source hands out."""

PAPER_MAX_WORDS = 30
"""Words of a caption that the published protocols read."""

# Characters that show nothing but change what is tokenised or displayed: controls that are not
# white space, lone surrogates (which cannot be stored as UTF-8), zero-width and invisible
# operators, bidi controls, tag characters. The joiners U+200C and U+200D are spelling inside of
# words (Persian, Hindi) and of emoji; elsewhere they show nothing either.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e"
    "\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
_STRAY_JOINERS = re.compile(r"(?<!\S)[\u200c\u200d]+|[\u200c\u200d]+(?!\S)")
_PAPER_PUNCTUATION = re.compile(r"[.!\"()*#:;~]")
_WHITE_RUN = re.compile(r"\s{2,}")

BYTE_ORDER_MARKS = {  # the mark of UTF-32 begins as that of UTF-16 does, so it comes first
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# cp1252 leaves five bytes undefined; they are read as Latin-1 reads them
_CP1252 = {
    byte: text for byte in range(128, 160) if (text := bytes([byte]).decode("cp1252", "ignore"))
}


def decode_text(data: bytes) -> tuple[str, str]:
    """Return the text that a file holds, and its encoding.

    A byte-order mark decides. Without one it is UTF-16 if every other byte of most characters is
    zero, otherwise UTF-8, also where a limit in bytes cut its last character, and, where that is
    not valid, cp1252, which editors of Windows write and which takes any bytes. Raises nothing.
    """
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if data.startswith(mark):
            return data.decode(encoding, "replace"), encoding
    for encoding in (*_wide(data), "utf-8"):
        try:
            return data.decode(encoding), encoding
        except UnicodeDecodeError as error:
            whole = data[: error.start]
            # one such byte alone may be the last letter of cp1252
            if error.reason == "unexpected end of data" and not whole.isascii():
                return whole.decode(encoding), encoding
    return data.decode("latin-1").translate(_CP1252), "cp1252"


def _wide(data: bytes) -> tuple[str, ...]:
    """Return the UTF-16 that the bytes look like, if any."""
    for encoding, text, zeros in (
        ("utf-16-le", data[0::2], data[1::2]),
        ("utf-16-be", data[1::2], data[0::2]),
    ):
        if len(text) == len(zeros) < 2 * zeros.count(0) and 0 not in text:
            return (encoding,)
    return ()


def storable(text: str) -> str:
    """Return a text without the lone surrogates that JSON can spell and no UTF-8 file can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def clean_basic(text: str) -> str:
    """Return one line of visible text, white space collapsed, cut at a word end."""
    line = " ".join(_STRAY_JOINERS.sub("", _INVISIBLE.sub("", text)).split())
    if len(line) <= MAX_CHARACTERS:
        return line
    word_end = line.rfind(" ", 0, MAX_CHARACTERS + 1)
    return line[: word_end if word_end > 0 else MAX_CHARACTERS]


def clean_paper(text: str) -> str:
    """Apply the rule of the published Flickr30K and COCO protocols.

    Lower case, the signs . ! " ( ) * # : ; ~ to spaces, 30 words. Kept to the letter but for the
    cut at MAX_CHARACTERS, so only *runs* of white space collapse and a lone tab stays.
    """
    line = _WHITE_RUN.sub(" ", _PAPER_PUNCTUATION.sub(" ", text.lower()))
    return " ".join(line.rstrip("\n").strip(" ").split(" ")[:PAPER_MAX_WORDS])[:MAX_CHARACTERS]


def clean_none(text: str) -> str:
    """Return the caption as the source has it.

    Of one beyond MAX_CHARACTERS, return as many from where its text begins.
    """
    return text if len(text) <= MAX_CHARACTERS else text.lstrip()[:MAX_CHARACTERS]


CLEANERS: dict[str, Callable[[str], str]] = {
    "basic": clean_basic,
    "paper": clean_paper,
    "none": clean_none,
}

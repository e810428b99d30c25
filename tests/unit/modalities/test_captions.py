"""Caption cleaning."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings

from pds_ray.modalities.text import CLEANERS, MAX_CHARACTERS, clean_basic, clean_paper
from tests.fuzz import targets
from tests.support.strategies import any_text


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("A man in Black, sitting.", "a man in black, sitting"),
        ('He said "hi"! (Twice) * # : ; ~', "he said hi twice"),
        ("don't stop-now, ok?", "don't stop-now, ok?"),
        ("Two  dogs \n\n run.\n", "two dogs run"),
        (" ".join(["word"] * 31), " ".join(["word"] * 30)),
        ("", ""),
        ("...", ""),
    ],
)
def test_paper_rule(raw: str, cleaned: str) -> None:
    assert clean_paper(raw) == cleaned


@pytest.mark.parametrize(
    ("name", "longer_than_30"), [("flickr30k_test", 45), ("coco_karpathy_test", 18)]
)
def test_paper_rule_on_real_captions(shared_data: Path, name: str, longer_than_30: int) -> None:
    records = json.loads(
        gzip.decompress((shared_data / "annotations" / f"{name}.json.gz").read_bytes())
    )
    captions = [caption for record in records for caption in record["caption"]]
    cleaned = [clean_paper(caption) for caption in captions]
    assert all(0 < len(caption.split()) <= 30 for caption in cleaned)
    long_ones = [
        (raw, out) for raw, out in zip(captions, cleaned, strict=True) if len(raw.split()) > 30
    ]
    assert len(long_ones) == longer_than_30  # counted independently, in raw words
    assert not any(
        set('.!"()*#:;~\n') & set(out) or out != out.lower() or "  " in out for out in cleaned
    )


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("  A  Dog,\r\n\truns!  ", "A Dog, runs!"),
        ("nul\x00 bell\x07 esc\x1b[31m del\x7f c1\x9f", "nul bell esc[31m del c1"),
        ("zero\u200bwidth\u2060 \ufeffbom soft\xadhyphen", "zerowidth bom softhyphen"),
        ("\u202eevil\u202c \u2066x\u2069 \u200fy", "evil x y"),
        ("line\u2028separator\x85next", "line separator next"),
        ("lone \ud800 surrogate", "lone surrogate"),
        ("naïve café 犬 🐕", "naïve café 犬 🐕"),
        ("\u200b \n", ""),
        ("می\u200cخواهم \U0001f468\u200d\U0001f469", "می\u200cخواهم \U0001f468\u200d\U0001f469"),
        ("\u200d a\u200c \u200d\u200c b\u200d", "a b"),
    ],
)
def test_basic_rule(raw: str, cleaned: str) -> None:
    assert clean_basic(raw) == cleaned


def test_basic_rule_cuts_at_a_word_end() -> None:
    words = "abcd " * 1000
    assert clean_basic(words) == ("abcd " * 400).strip()
    assert clean_basic("a" * 1999 + " b") == "a" * 1999
    assert clean_basic("a" * 2000 + " b") == "a" * 2000
    assert clean_basic("a" * 5000) == "a" * MAX_CHARACTERS


@settings(max_examples=100)
@given(any_text)
def test_any_text_is_cleaned_and_shown_without_harm(text: str) -> None:
    targets.caption(text.encode("utf-8", "surrogatepass"))


def test_cleaners_by_name() -> None:
    raw = " A\n\x00Dog. "
    assert {name: clean(raw) for name, clean in CLEANERS.items()} == {
        "basic": "A Dog.",
        "paper": "a\n\x00dog",
        "none": raw,
    }

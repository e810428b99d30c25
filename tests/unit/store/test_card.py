"""The data-set card: front matter that Hugging Face reads, and text in which nothing can act."""

from __future__ import annotations

import json

import pytest
import yaml

from pds_ray.methods.pds import PDS_CARD
from pds_ray.methods.selection import SELECTION_CARD
from pds_ray.store.card import card
from pds_ray.store.distilled_set import Record

ABOUT = {
    "source": "made up",
    "method": "pds",
    "encoder": "toy",
    "decoder": "painter",
    "picture_origin": "synthetic",
    "counts": {"distilled pairs": 7, "bad samples": 0},
    "config": {"pairs": 7, "match": {"filter": True}},
}
CAPTIONS = [
    "pipes | and `ticks` and <b>tags</b> & \\ backslashes",
    "two\nlines\r\nand a\ttab",
    "Zoë ☃ \u2028 line\u0085separators 漢字",
    '"quoted", {"json": true}',
    "```\n# heading\n---\n",
    "<script>alert(1)</script>",
    "\\",
    "\\|",
    "| a | b |",
    "\x0b\x0c\x1c\x85",
    " leading and trailing ",
    "x" * 400,
]


def rows(captions: list[str]) -> list[Record]:
    return [{"pair": pair, "text": text, "cosine": 0.5} for pair, text in enumerate(captions)]


def body(text: str) -> str:
    return text.split("---\n", 2)[2]


@pytest.mark.parametrize(
    ("method", "tag"), [(PDS_CARD, "dataset-distillation"), (SELECTION_CARD, "coreset")]
)
def test_front_matter(method, tag):
    assert card(rows(["a"]), ABOUT, method).startswith(f"""---
license: other
license_name: inherits-the-source
task_categories:
- image-to-text
- text-to-image
size_categories:
- n<1K
tags:
- {tag}
- pds
configs:
- config_name: default
  data_dir: imagefolder
---

# 1 image-caption pairs """)


@pytest.mark.parametrize(
    ("count", "size"),
    [
        (999, "n<1K"),
        (1000, "1K<n<10K"),
        (10_000, "10K<n<100K"),
        (999_999, "100K<n<1M"),
        (1_000_000, "n>1M"),
    ],
)
def test_the_size_category(count, size):
    row: Record = {"pair": 0, "text": "", "cosine": 0.0}
    text = card([row] * count, ABOUT, PDS_CARD)
    assert yaml.safe_load(text.split("---\n")[1])["size_categories"] == [size]


def test_the_configuration_is_in_it():
    block = card(rows(["a"]), ABOUT, PDS_CARD).split("```json\n")[1].split("```")[0]
    assert json.loads(block) == ABOUT["config"]


def test_a_method_gives_its_own_text():
    pds = body(card(rows(["a"]), ABOUT, PDS_CARD))
    chosen = {**ABOUT, "selection": "herding: one by one"}
    selection = body(card(rows(["a"]), chosen, SELECTION_CARD))
    for text in (pds, selection):
        assert "from `made up`" in text
        assert "\n- encoder: `toy`\n" in text
    assert "pairs distilled from" in pds
    assert "\n- decoder: `painter`\n" in pds
    assert "| cosine of the prototypes |" in pds
    assert "pairs chosen from" in selection
    assert "The prototypes are the pairs' own embeddings. Method: herding: one by one." in selection
    assert "painter" not in selection
    assert "averaged" not in selection


@pytest.mark.parametrize(
    ("section", "option", "value", "sentence"),
    [
        ("match", "filter", False, "Here whole clusters were averaged, not only the pairs that"),
        ("cluster", "modality", "joint", "Here one k-means on both embeddings of a pair took"),
        ("decode", "condition", "caption", "Here images were decoded from the captions alone."),
    ],
)
def test_deviations_from_the_method_are_named(section, option, value, sentence):
    changed = {**ABOUT, "config": {section: {option: value}}}
    assert sentence in card(rows(["a"]), changed, PDS_CARD)
    assert sentence not in card(rows(["a"]), ABOUT, PDS_CARD)


def cells(line: str) -> int:
    """Cells of a Markdown table row: bars that are not escaped, less one."""
    line = line.replace("\\\\", "")
    return line.count("|") - line.count("\\|") - 1


def test_no_caption_breaks_the_card():
    lines = card(rows(CAPTIONS), ABOUT, PDS_CARD).split("\n")
    start = lines.index("| pair | caption | cosine of the prototypes |") + 2
    shown = lines[start : lines.index("## Configuration") - 1]
    assert len(shown) == 10  # as many as are shown
    assert [row.split("|")[1].strip() for row in shown] == [str(pair) for pair in range(10)]
    assert {cells(row) for row in shown} == {3}
    assert not any("`" in row or "<" in row for row in shown)
    for caption in CAPTIONS:
        row = card(rows([caption]), ABOUT, PDS_CARD).split("\n")[start]
        assert cells(row) == 3, caption

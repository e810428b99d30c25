"""Captions, keys and names made to do harm, at every place that shows or stores them."""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from open_clip import SimpleTokenizer
from PIL import Image

from pds_ray.cli import main as cli
from pds_ray.cli.output import print_evaluation
from pds_ray.config import ConfigError, EvaluateConfig, RunConfig
from pds_ray.encoders.open_clip import MAX_WORD_BYTES, MAX_WORDS_KNOWN, bound_words
from pds_ray.engine.compare import entries
from pds_ray.errors import UserError, first_line, printable
from pds_ray.methods.pds import PDS_CARD
from pds_ray.modalities.text import (
    MAX_CHARACTERS,
    PAPER_MAX_WORDS,
    clean_none,
    clean_paper,
)
from pds_ray.report.figures import _hover
from pds_ray.stages.materialize import write_distilled
from pds_ray.stages.trial import MEASURES
from pds_ray.store.card import card
from pds_ray.store.distilled_set import DistilledSetError, load_distilled
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.schemas import prototype_schema, vector_array
from pds_ray.store.storage import Folder
from tests.fuzz.targets import has_commands
from tests.support.hostile import CAPTIONS, encoded, png
from tests.support.strategies import texts


def acts(text: str) -> bool:
    """Return whether a text does something to a terminal or a reader; a line feed does not."""
    return has_commands(text.replace("\n", ""))


# ---- the cleaners and the tokenizers behind them -------------------------------------------------


@given(texts)
def test_a_caption_below_the_cut_is_left_as_it_is(text: str) -> None:
    kept = text[:MAX_CHARACTERS]
    assert clean_none(kept) == kept
    assert (
        clean_paper(text) == clean_paper(clean_paper(text))
        or len(clean_paper(text)) == MAX_CHARACTERS
    )
    assert len(clean_paper(text).split(" ")) <= PAPER_MAX_WORDS


def test_what_stands_before_a_long_caption_does_not_hide_it() -> None:
    assert clean_none("\n" * 5000 + "a dog").strip() == "a dog"
    assert clean_none("a dog " * 5000) == ("a dog " * 5000)[:MAX_CHARACTERS]


@pytest.fixture(scope="module")
def tokenizers() -> tuple[SimpleTokenizer, SimpleTokenizer]:
    """CLIP's tokenizer as it comes, and bounded."""
    plain, bounded = SimpleTokenizer(), SimpleTokenizer()
    bound_words(bounded)
    return plain, bounded


ALPHABETS = [
    "abcdefghijklmnopqrstuvwxyz",
    "àéîõü",
    "абвгдежз",
    "的一是不了人我在有他",
    "กขคงจ",
    "אבגדה",
    "🐕🐈🌍",
]
ALPHABETS.append("aé的🐕 .,")


@settings(max_examples=50)
@given(st.sampled_from(ALPHABETS), st.integers(1, 1500), st.integers(0, 2**32))
def test_a_cut_word_gives_the_tokens_that_the_whole_one_gives(
    tokenizers: tuple[SimpleTokenizer, SimpleTokenizer], alphabet: str, length: int, seed: int
) -> None:
    plain, bounded = tokenizers
    text = "a photo of " + "".join(random.Random(seed).choices(alphabet, k=length))
    assert plain([text]).tolist() == bounded([text]).tolist()


def test_special_tokens_survive(tokenizers: tuple[SimpleTokenizer, SimpleTokenizer]) -> None:
    plain, bounded = tokenizers
    text = "<start_of_text> a dog <end_of_text>"
    assert plain([text]).tolist() == bounded([text]).tolist()


def test_a_word_costs_what_its_beginning_costs(
    tokenizers: tuple[SimpleTokenizer, SimpleTokenizer],
) -> None:
    # A million letters without a blank: counted in steps of the encoding, of which the whole word
    # would take 10^11.
    bounded = SimpleTokenizer()
    seen: list[int] = []
    whole = bounded.bpe
    bounded.bpe = lambda word: seen.append(len(word)) or whole(word)  # type: ignore[func-returns-value]
    bound_words(bounded)
    word = "".join(random.Random(0).choices(ALPHABETS[0], k=1_000_000))
    assert bounded([word]).tolist() == tokenizers[1]([word[:2000]]).tolist()
    assert seen == [MAX_WORD_BYTES]


def test_a_tokenizer_forgets() -> None:
    bounded = SimpleTokenizer()
    bound_words(bounded)
    bounded([" ".join(f"w{n}x" for n in range(2000))])
    assert len(bounded.cache) < 10
    assert bounded.bpe.cache_info().maxsize == MAX_WORDS_KNOWN


# ---- the terminal --------------------------------------------------------------------------------


@given(texts)
@example("\x9b2J\x1b]0;x\x07\u202e\u2028\ud800")
def test_printable_text_is_one_line_that_does_nothing(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert shown == text or not text.isprintable()


@given(texts)
def test_errors_are_one_line_that_does_nothing(text: str) -> None:
    assert first_line(UserError(text)).isprintable()


@pytest.mark.parametrize("text", CAPTIONS)
def test_the_command_line_prints_nothing_that_acts(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Any) -> None:
        raise UserError(f"cannot read {text}")

    monkeypatch.setitem(cli.COMMANDS, "doctor", fail)
    with pytest.raises(SystemExit):
        cli.main(["doctor"])
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("pds-ray: cannot read ")
    assert (printed.err.count("\n"), acts(printed.err)) == (1, False)


@pytest.mark.parametrize("text", CAPTIONS)
def test_an_evaluation_of_a_strangers_set_prints_nothing_that_acts(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {kind: dict.fromkeys([*MEASURES, "r_mean"], 1.0) for kind in ("mean", "std")}
    split = {"source": text, "images": 1, "captions": 1, "bad": {text: 1}}
    result = {
        "set": {"path": text, "pairs": 1, "method": text},
        "test": split,
        "val": split,
        "protocol": {"name": text},
        "notes": [text],
        "backbones": [{"name": text, "trials": [], **figures}],
        "file": text,
        **figures,
    }
    print_evaluation(result)
    lines = capsys.readouterr().out
    assert not acts(lines)
    assert lines.count("\n") == 13  # as many as for a set with a plain name


# ---- the distilled set, the card, tables and the page --------------------------------------------

ABOUT = {
    "method": "pds",
    "source": "scenes:4",
    "encoder": "demo",
    "decoder": "nearest",
    "picture_origin": "synthetic",
    "counts": {"pairs": 1},
    "config": {},
}


def distilled(folder: Path, captions: tuple[str, ...]) -> RunFolder:
    """A distilled set of these captions, their keys being the same texts."""
    run = RunFolder(Folder(str(folder)))
    schema = prototype_schema(2)
    vectors = vector_array(np.ones((len(captions), 2)))
    plain: dict[str, Any] = {}
    for field in schema:
        if field.name == "pair":
            plain[field.name] = pa.array(range(len(captions)), field.type)
        elif pa.types.is_fixed_size_list(field.type):
            plain[field.name] = vectors
        elif field.name == "members":
            plain[field.name] = [[f"x/{text}"] for text in captions]
        elif pa.types.is_string(field.type):
            plain[field.name] = list(captions)
        else:
            plain[field.name] = pa.array(np.ones(len(captions)), pa.float64()).cast(field.type)
    run.save_prototypes(pa.table(plain, schema=schema))
    for pair in range(len(captions)):
        run.images.write_bytes(run.image_name(pair), encoded(Image.new("RGB", (4, 4)), "PNG"))
    write_distilled(run, ABOUT, PDS_CARD)
    return run


def test_a_distilled_set_holds_any_caption_and_nothing_in_it_acts(tmp_path: Path) -> None:
    run = distilled(tmp_path, CAPTIONS)
    assert load_distilled(str(tmp_path)).captions == list(CAPTIONS)
    metadata = run.distilled.read_bytes("imagefolder/metadata.jsonl").decode()
    assert not acts(metadata)
    assert [json.loads(line)["text"] for line in metadata.splitlines()] == list(CAPTIONS)
    with tarfile.open(fileobj=io.BytesIO(run.distilled.read_bytes("webdataset/000000.tar"))) as tar:
        names = tar.getnames()
        records = [
            tar.extractfile(name).read().decode() for name in names if name.endswith(".json")
        ]  # type: ignore[union-attr]
        plain = [tar.extractfile(name).read().decode() for name in names if name.endswith(".txt")]  # type: ignore[union-attr]
    assert all(re.fullmatch(r"[0-9]{6}\.(png|txt|json)", name) for name in names)
    assert plain == list(CAPTIONS)
    assert not any(acts(record) for record in records)
    written = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")}
    assert written == {"prototypes.parquet", "images", "distilled"}
    assert not acts(run.distilled.read_bytes("README.md").decode())


@given(texts)
def test_a_caption_in_the_card_is_one_row_of_text(text: str) -> None:
    plain = card([{"pair": 0, "text": "x", "cosine": 0.5}], ABOUT, PDS_CARD)
    whole = card([{"pair": 0, "text": text, "cosine": 0.5}], ABOUT, PDS_CARD)
    start = plain.index("| x |") + 2
    assert whole.startswith(plain[:start])
    assert whole.endswith(plain[start + 1 :])
    cell = whole[start : len(whole) - len(plain) + start + 1]
    assert not re.search(r"(?<!\\)[|*_\[\]()#!]|[<>`\n]", re.sub(r"\\\\", "", cell))
    assert not acts(cell)


@given(texts)
def test_text_at_a_point_of_the_page_is_text(text: str) -> None:
    hover = _hover(7, text)
    assert not re.search(r"<(?!br>)", hover)
    assert not re.search(r"&(?!(lt|gt|amp|quot|#x27|#39|#[0-9]+);)", hover)


@pytest.mark.parametrize(
    "method", ["=cmd|'/c calc'!A0", "@SUM(1)", "-pds", "\tpds", "\rpds", '"pds']
)
def test_no_cell_of_a_table_begins_a_formula(method: str) -> None:
    # A table holds figures, and the names of methods and backbones that there are: nothing of the
    # data.
    config = RunConfig(source="scenes:4", out="unused")
    with pytest.raises(ConfigError, match="unknown method"):
        entries(config, [method], [1], EvaluateConfig())


@pytest.mark.parametrize("name", ["../escaped.png", "/etc/passwd", "..", "a\n.png"])
def test_a_set_that_points_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    run = distilled(tmp_path, ("a", "b"))
    metadata = run.distilled.read_bytes("imagefolder/metadata.jsonl").replace(
        b"000001.png", json.dumps(name)[1:-1].encode()
    )
    run.distilled.write_bytes("imagefolder/metadata.jsonl", metadata)
    manifest = run.distilled.read_json("manifest.json")
    manifest["files"]["imagefolder/metadata.jsonl"]["sha256"] = hashlib.sha256(metadata).hexdigest()
    manifest["files"][f"imagefolder/{name}"] = manifest["files"]["imagefolder/000001.png"]
    run.distilled.write_json("manifest.json", manifest)
    with pytest.raises(DistilledSetError, match="images are gone"):
        load_distilled(str(tmp_path))


@pytest.mark.filterwarnings("ignore:Image size")
def test_a_bomb_in_a_strangers_set_is_refused(tmp_path: Path) -> None:
    run = distilled(tmp_path, ("a",))
    bomb = png(12_000, 12_000)
    run.distilled.write_bytes("imagefolder/000000.png", bomb)
    manifest = run.distilled.read_json("manifest.json")
    manifest["files"]["imagefolder/000000.png"]["sha256"] = hashlib.sha256(bomb).hexdigest()
    run.distilled.write_json("manifest.json", manifest)
    with pytest.raises(DistilledSetError, match="image_too_large"):
        load_distilled(str(tmp_path)).image(0)

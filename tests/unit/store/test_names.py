"""Every file of a run, a distilled set, an evaluation or a comparison is named in pds_ray/store."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[3] / "pds_ray"
FILE_NAME = re.compile(r"\.(parquet|safetensors|jsonl?|csv|png|tar|html)$")

# files that are no part of a run, and why they are named where they are
OF_OTHERS = {
    "backbones": "weights of models",
    "cli": "placeholders in the help",
    "decoders": "weights of models",
    "demo": "weights of the demo models",
    "encoders": "weights of models",
    "planning": "measured rates, in the user's cache folder",
    "sources": "data sets",
    "training": "the state of a training, which its caller keeps",
}
TEMPLATE = "template.html"  # of the report, read from the package


def strings(path: Path) -> Iterator[str]:
    """Yield the string constants of a module, those in f-strings too, without the docstrings."""
    tree = ast.parse(path.read_text())
    docs = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value


def file_names(path: Path) -> set[str]:
    return {text for text in strings(path) if FILE_NAME.search(text) and text != TEMPLATE}


def test_the_search_finds_names():
    assert {"run.json", ".png"} <= file_names(PACKAGE / "store" / "run_folder.py")


MODULES = [
    path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.relative_to(PACKAGE).parts[0] not in {"store", *OF_OTHERS}
]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_other_module_names_a_file(path: Path) -> None:
    assert file_names(path) == set()

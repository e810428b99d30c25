"""docs/troubleshooting.md has a row for each message of the code, and no row for one that is gone.

Messages are found by their syntax: what is raised as a UserError, or as an error of a module's own
that becomes one; what is logged as a warning or an error; what `doctor` says is not well. Of each,
the longest part without variables must stand in the first column of a table of the page.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pds_ray.sources.advice import ADVICE
from pds_ray.sources.base import REASONS
from pds_ray.sources.unpack import BEGINNINGS
from pds_ray.store.weights import INSTEAD
from tests.support.docs_pages import DOCS, ROOT

PAGE = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
FILES = sorted((ROOT / "pds_ray").rglob("*.py"))
WORTH_LOOKING_FOR = 8  # letters; of less, any text holds them


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def user_errors() -> set[str]:
    """Return the names of UserError and of all classes derived from it."""
    classes = [
        node for path in FILES for node in ast.walk(tree(path)) if isinstance(node, ast.ClassDef)
    ]
    found, before = {"UserError"}, 0
    while len(found) > before:
        before = len(found)
        found |= {c.name for c in classes if found & {ast.unparse(base) for base in c.bases}}
    return found


def said(call: ast.Call) -> ast.expr | None:
    """Return the text of a call that tells the user what is wrong, None of any other call."""
    function = ast.unparse(call.func).rpartition(".")[2]
    arguments = [ast.unparse(argument) for argument in call.args]
    if call.args and (function in user_errors() or re.fullmatch(r"_\w+Error|ReadError", function)):
        return call.args[0]
    if function == "event" and {"'warning'", "'error'"} & set(arguments[2:]):
        return call.args[1]
    if function == "say" and re.search("LOW|MISSING", arguments[0]):
        return call.args[2]
    return None


def texts(node: ast.AST, module: ast.Module, within: ast.AST, depth: int = 3) -> Iterator[str]:
    """Yield the longest fixed part of each text that an expression may be.

    Names stand for what is assigned to them in the function, calls for what functions of the module
    return.
    """
    alternatives: list[ast.AST] = []
    match node:
        case ast.Constant(str(text)):
            yield plain(text)
        case ast.JoinedStr(parts):
            fixed = [plain(str(part.value)) for part in parts if isinstance(part, ast.Constant)]
            if any(fixed):
                yield max(fixed, key=len)
            else:  # a prefix and a text
                alternatives = [
                    part.value for part in parts if isinstance(part, ast.FormattedValue)
                ]
        case ast.BinOp(left, _, right):
            yield max(
                (text for side in (left, right) for text in texts(side, module, within, depth)),
                key=len,
                default="",
            )
        case ast.IfExp(_, body, orelse):
            alternatives = [body, orelse]
        case ast.Name(name):
            alternatives = [
                found.value
                for found in ast.walk(within)
                if isinstance(found, ast.Assign) and name in map(ast.unparse, found.targets)
            ]
        case ast.Call(function):
            name = ast.unparse(function).removeprefix("self.")
            for called in functions(module, name) if depth else ():
                for found in ast.walk(called):
                    if isinstance(found, ast.Return) and found.value:
                        yield from texts(found.value, module, called, depth - 1)
    for alternative in alternatives:
        yield from texts(alternative, module, within, depth)


def functions(module: ast.Module, name: str = "") -> Iterator[ast.FunctionDef]:
    """Yield the functions and methods of a module, all or those of a name."""
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef) and (not name or node.name == name):
            yield node


@functools.cache
def messages(path: Path) -> list[str]:
    """Return the longest fixed part of each message of a module."""
    return [
        text
        for function in functions(tree(path))
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and (argument := said(node))
        for text in texts(argument, tree(path), function)
        if text
    ]


def plain(text: str) -> str:
    """Return a text without marks and ends, so that the page may set it as it likes."""
    text = text.strip().removeprefix("pds-ray:").replace("<br>", " ")
    return re.sub(r"[\s`*|\\]+", " ", text).strip(" .,;:()[]'\"…")


def first_cells() -> list[str]:
    """Return the first column of all tables of the page."""
    return re.findall(r"^\| (.+?) \|", PAGE, flags=re.MULTILINE)


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if messages(path)],
    ids=lambda path: str(path.relative_to(ROOT / "pds_ray")),
)
def test_the_page_has_the_messages(path: Path) -> None:
    there = plain(" ".join(first_cells()))
    assert [text for text in messages(path) if text not in there] == []


def test_the_page_has_reasons_and_advice() -> None:
    shown = plain(PAGE)
    told = [*REASONS, *(do for _, _, do in ADVICE), *BEGINNINGS.values(), *INSTEAD.values()]
    assert [text for text in told if plain(text) not in shown] == []


def test_the_code_has_the_messages_of_the_page() -> None:
    """Each part of a message between variables is a part of some text of the code."""
    known = "\n".join(
        plain(node.value)
        for path in FILES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    parts = [
        plain(part)
        for cell in first_cells()
        for message in re.findall("`(.+?)`", cell)
        for part in message.split("…")
    ]
    assert len(parts) > 250
    gone = [part for part in parts if len(part) >= WORTH_LOOKING_FOR and part not in known]
    assert gone == []


def test_messages_are_found() -> None:
    """The walk sees texts that are given, assigned, chosen and returned."""
    found = {text for path in FILES for text in messages(path)}
    assert {
        "no run folder: give --out FOLDER",
        "is the folder of a run and passed over; name it in full, without a wildcard, to read "
        "what is in it",
        "check its address and state and the credentials; the same command continues",
        "leave the one that names the images, or call it metadata.csv",
        "faiss-cpu and faiss-gpu overwrite each other: pip uninstall both, then install one",
    } <= found
    assert len(found) > 250

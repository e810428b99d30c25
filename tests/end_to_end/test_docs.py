"""The pages of docs/: each block is run in the order of its page, or marked with its needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pds_ray.cli.main import resolve, resolve_evaluation
from pds_ray.cli.parser import build_parser
from pds_ray.planning.figures import read_prices
from tests.support.docs_pages import PAGES, ROOT, Block, blocks, commands

CONFIGURED = {"distill": resolve, "select": resolve, "evaluate": resolve_evaluation}
MARKED = [
    pytest.param(page, block, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, block in enumerate(blocks(page))
    if block.language == "sh" and block.needs
]


def write(block: Block, folder: Path) -> None:
    """Write the file that a block is, or apply the changes that it shows."""
    assert block.file is not None
    path = folder / block.file
    if block.language != "diff":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text, encoding="utf-8")
        return
    lines, at = path.read_text(encoding="utf-8").splitlines(), 0
    for change in block.text.splitlines()[1:]:
        sign, line = change[0], change[1:]
        if sign == "+":
            lines.insert(at, line)
            at += 1
            continue
        assert lines.count(line) == 1, f"{block.file} has not once: {line}"
        at = lines.index(line)
        if sign == "-":
            del lines[at]
        else:
            at += 1
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def run(script: str, folder: Path, python_path: Path) -> None:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(python_path),
        "HF_HUB_OFFLINE": "1",
        "RAY_raylet_start_wait_time_s": "120",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        capture_output=True, text=True, timeout=900, env=environment, check=False, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"


def follow(page: Path, folder: Path, python_path: Path) -> None:
    """Do what a page says, as far as that is possible here."""
    for block in blocks(page):
        if block.language == "sh" and not block.needs:
            run(block.text, folder, python_path)
        elif block.file:
            write(block, folder)


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.parametrize(
    "name",
    [
        "laptop.md",
        "flickr30k-coco.md",
        "laion-on-a-cluster.md",
        "watching.md",
        "optimisation.md",
    ],
)
def test_a_page_word_by_word(name: str, tmp_path: Path) -> None:
    follow(ROOT / "docs" / name, tmp_path, ROOT)


@pytest.mark.long
@pytest.mark.ray
def test_plugins_are_added_word_by_word(tmp_path: Path) -> None:
    for part in ("pds_ray", "tests", "jobs", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, tmp_path / part)
    follow(ROOT / "docs" / "extending.md", tmp_path, tmp_path)


def test_every_page_is_followed() -> None:
    """A new page has to be named above; the index holds no commands."""
    assert {page.name for page in PAGES if blocks(page)} == {
        "laptop.md", "flickr30k-coco.md", "laion-on-a-cluster.md", "watching.md", "evaluation.md",
        "extending.md", "optimisation.md",
    }  # fmt: skip


@pytest.mark.parametrize(("page", "block"), MARKED)
def test_commands_that_cannot_run_here_are_valid(
    page: Path, block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They parse, as do commands that they hand on, and their configurations are valid."""
    monkeypatch.chdir(tmp_path)
    for shown in blocks(page):
        if shown.language == "yaml" and shown.file:
            write(shown, tmp_path)
    for command in commands(block, "pds-ray"):
        args = build_parser().parse_args(command)
        if args.command == "submit":
            args = build_parser().parse_args(args.job[1:])
        if args.command == "plan" and args.prices:
            read_prices(args.prices)
        if args.command in CONFIGURED and not any("$" in word for word in command):
            CONFIGURED[args.command](args)
    for command in commands(block, "python"):
        assert command[0] == "-m" or (ROOT / command[0]).is_file()

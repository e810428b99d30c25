"""The scripts of jobs/ pass on to existing commands; the usage in their docstrings can be typed."""

from __future__ import annotations

import ast
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from ray.dashboard.modules.job.cli import submit

from pds_ray.cli import main as cli

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "jobs").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_command_of_a_script_can_be_typed(
    script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's parser takes it, the script passes the rest on, and the command takes that."""
    about = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    typed = about.partition("ray job submit ")[2].partition(" ...")[0]
    entrypoint = submit.make_context("submit", shlex.split(typed)).params["entrypoint"]
    assert entrypoint[:2] == ("python", f"jobs/{script.name}")
    passed: list[str] = []
    monkeypatch.setattr(cli, "main", passed.extend)
    monkeypatch.setattr(sys, "argv", list(entrypoint[1:]))
    runpy.run_path(str(script), run_name="__main__")
    args = cli.build_parser().parse_args(passed)
    assert args.config == entrypoint[entrypoint.index("--config") + 1]


def test_there_are_scripts() -> None:
    assert {path.stem for path in SCRIPTS} == {
        "compare",
        "distill",
        "embed",
        "evaluate",
        "synthesize",
    }

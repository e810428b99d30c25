"""The pages of docs/ for tests: their code blocks, with their needs and their commands."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
FENCE = re.compile(
    r"^( *)(?:<!-- needs: (.+?) -->\n\1)?```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    language: str
    text: str
    needs: str | None
    """A need that a test cannot meet."""

    @property
    def file(self) -> str | None:
        """Return the file that it is, if its first line names one."""
        named = re.match(r"# ([\w./-]+\.\w+)\n", self.text)
        return named[1] if named else None


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page that have a language, in order."""
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [
        Block(language, textwrap.dedent(text), needs or None) for _, needs, language, text in found
    ]


def commands(block: Block, program: str) -> Iterator[list[str]]:
    """Yield the arguments of each call of `program` in a shell block."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        call: list[str] | None = None
        for word in [*words, ";"]:
            if set(word) <= set("();<>|&"):
                if call is not None:
                    yield call
                call = None
            elif call is not None:
                call.append(word)
            elif word == program:
                call = []

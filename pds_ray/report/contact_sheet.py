"""A contact sheet: the pairs of a distilled set as one image."""

from __future__ import annotations

import textwrap
from typing import Protocol

from PIL import Image, ImageDraw, ImageFont

TILE, TEXT_HEIGHT, GAP, COLUMNS = 144, 54, 8, 10
FONT_SIZE, TEXT_COLUMNS, TEXT_LINES = 11, 25, 4
PAPER, INK = (250, 250, 248), (40, 40, 44)


class Pairs(Protocol):
    """Images with captions: a distilled set is such."""

    @property
    def captions(self) -> list[str]: ...

    def __len__(self) -> int: ...

    def image(self, pair: int) -> Image.Image: ...


def contact_sheet(distilled: Pairs, limit: int = 100, columns: int = COLUMNS) -> Image.Image:
    """Return an RGB image of the first `limit` pairs, `columns` per row, captions below."""
    count = min(limit, len(distilled))
    columns = max(1, min(columns, count))
    rows = -(-count // columns)
    width, height = TILE + GAP, TILE + TEXT_HEIGHT + GAP
    sheet = Image.new("RGB", (columns * width + GAP, rows * height + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(FONT_SIZE)
    for pair in range(count):
        left, top = GAP + pair % columns * width, GAP + pair // columns * height
        sheet.paste(
            distilled.image(pair).resize((TILE, TILE), Image.Resampling.LANCZOS), (left, top)
        )
        lines = textwrap.wrap(
            distilled.captions[pair], TEXT_COLUMNS, max_lines=TEXT_LINES, placeholder=" ..."
        )
        draw.multiline_text(
            (left, top + TILE + 3), "\n".join(lines), fill=INK, font=font, spacing=1
        )
    return sheet

"""Draw r_mean of the methods of some comparisons side by side, as an SVG of bars.

    python -m benchmarks.chart docs/methods.svg 'exact captions, 100 pairs=runs/clean/100' ...

Each argument after the file is a panel: its title, the folder of the comparison and, after the last
slash, the number of pairs or the bytes of the budget. Of several of these, by comma, a later one
adds its methods, in place of those of the same names. Bars are the average of the backbones; a line
through the end of a bar is one deviation over the sets to either side, where several were made.
"""

from __future__ import annotations

import sys
from pathlib import Path
from xml.sax.saxutils import escape

from pds_ray.report.evaluations import read_comparison
from pds_ray.report.values import Json
from pds_ray.store.evaluation_folder import AVERAGE
from pds_ray.store.storage import Folder

PANEL, LABELS, ROW, HEAD = 230, 190, 22, 34
"""Widths of a panel and of the names, heights of a bar with its space and of a title; pixels."""
FULL = 160
"""Pixels of a bar of 100 percent."""
STYLE = (
    "text{font:12px sans-serif;fill:#555}.title{font-weight:bold}"
    ".bar{fill:#9db7d5}.best{fill:#2f6db5}.spread{stroke:#555;stroke-width:1.5}"
    "@media(prefers-color-scheme:dark){text{fill:#bbb}.spread{stroke:#bbb}}"
)


def cells_of(folder: str, size: int) -> dict[str, Json]:
    """Return method -> cell of the average backbone at one size. Raises SystemExit if none."""
    cells = read_comparison(Folder(folder))["cells"]
    found = {c["method"]: c for c in cells if c["backbone"] == AVERAGE and c["size"] == size}
    if not found:
        raise SystemExit(f"{folder} has no sets of size {size}")
    return found


def draw(panels: dict[str, dict[str, Json]]) -> str:
    """Return the SVG of panels, title -> method -> cell; methods are named once, at the left."""
    methods = list(dict.fromkeys(method for cells in panels.values() for method in cells))
    width, height = LABELS + PANEL * len(panels), HEAD + ROW * len(methods) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img"><title>r_mean of methods</title>'
        f"<style>{STYLE}</style>"
    ]
    for row, method in enumerate(methods):
        parts.append(_text(LABELS - 8, _middle(row), method, anchor="end"))
    for number, (title, cells) in enumerate(panels.items()):
        left = LABELS + PANEL * number
        parts.append(_text(left, HEAD - 14, title, "title"))
        best = max(cells, key=lambda method: cells[method]["mean"]["r_mean"])
        for row, method in enumerate(methods):
            if method in cells:
                parts.append(_bar(left, row, cells[method], method == best))
    return "\n".join([*parts, "</svg>", ""])


def _bar(left: int, row: int, cell: Json, best: bool) -> str:
    value, spread = cell["mean"]["r_mean"], cell["set_std"]["r_mean"]
    scale, middle = FULL / 100, _middle(row)
    bar = (
        f'<rect class="bar{" best" if best else ""}" x="{left}" y="{middle - 8}" '
        f'width="{value * scale:.1f}" height="16"/>'
    )
    label, end = f"{value:.1f}", value
    if spread:
        end = value + spread
        bar += (
            f'<line class="spread" x1="{left + (value - spread) * scale:.1f}" '
            f'x2="{left + end * scale:.1f}" y1="{middle}" y2="{middle}"/>'
        )
        label += f" ± {spread:.1f}"
    return bar + _text(left + end * scale + 5, middle, label)


def _middle(row: int) -> int:
    return HEAD + ROW * row + ROW // 2


def _text(x: float, y: float, text: str, style: str = "", anchor: str = "start") -> str:
    kind = f' class="{style}"' if style else ""
    return f'<text{kind} x="{x:.1f}" y="{y + 4}" text-anchor="{anchor}">{escape(text)}</text>'


def main() -> None:
    """Write the chart."""
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    panels: dict[str, dict[str, Json]] = {}
    for argument in sys.argv[2:]:
        title, _, places = argument.rpartition("=")
        panels[title] = {}
        for place in places.split(","):
            folder, _, size = place.rpartition("/")
            panels[title] |= cells_of(folder, int(size))
    Path(sys.argv[1]).write_text(draw(panels))


if __name__ == "__main__":
    main()

"""The rows of the table by number.

Parts import heavy packages themselves, as each runs in a process of its own.
"""

from __future__ import annotations

from importlib import import_module

from benchmarks.measure import Row

ROWS = {
    1: "kmeans",
    2: "matching",
    3: "embedding",
    4: "clip_retrieval",
    5: "captions_per_image",
    6: "decoding",
    7: "evaluation",
    8: "recall",
    9: "whole_run",
    10: "workers",
    11: "startup",
    12: "nearest",
    13: "driver",
}


def load_row(number: int) -> Row:
    """Return the row of that number."""
    return import_module(f"benchmarks.rows.{ROWS[number]}").ROW

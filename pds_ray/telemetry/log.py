"""What a run says while it works: lines for a person, or one JSON object a line for what collects logs.

Each object has `time` (UTC), `level`, `event` and, where known, `run`, `stage` and `shard`; the rest depends on the
event.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from tqdm import tqdm

_json = False
_context: dict[str, str] = {}


def as_json() -> None:
    """From now on everything is said as JSON."""
    global _json  # noqa: PLW0603 - a process has one standard error
    _json = True


def is_json() -> bool:
    return _json


@contextmanager
def context(**fields: str) -> Iterator[None]:
    """Fields of all events in the block, such as the run and its stage."""
    global _context  # noqa: PLW0603
    before, _context = _context, {**_context, **fields}
    try:
        yield
    finally:
        _context = before


def event(event: str, text: str = "", level: str = "info", **fields: Any) -> None:
    """Says something on standard error: the text to a person (nothing if it is empty), the fields to a machine."""
    if _json:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        said = {"message": text} if text else {}
        line = json.dumps(
            {"time": now, "level": level, "event": event, **_context, **fields, **said}
        )
    else:
        line = text
    if line:
        tqdm.write(line, sys.stderr)  # above a bar that is being drawn
        sys.stderr.flush()

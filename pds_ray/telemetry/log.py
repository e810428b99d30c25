"""Events of a run: lines for a person, or one JSON object per line for what collects logs.

Each object has `time` (UTC), `level`, `event` and, where known, `run`, `stage` and `shard`; the
rest depends on the event.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from tqdm import tqdm

from pds_ray.telemetry.state import run_state


@contextmanager
def as_json(wanted: bool = True) -> Iterator[None]:
    """Write the events of the block as JSON, or as text."""
    state = run_state()
    before, state.json = state.json, wanted
    try:
        yield
    finally:
        state.json = before


def is_json() -> bool:
    """Return whether events are written as JSON."""
    return run_state().json


@contextmanager
def context(**fields: str) -> Iterator[None]:
    """Add fields to all events of the block, such as the run and its stage."""
    state = run_state()
    before, state.fields = state.fields, {**state.fields, **fields}
    try:
        yield
    finally:
        state.fields = before


def event(event: str, text: str = "", level: str = "info", **fields: Any) -> None:
    """Write an event to standard error: `text` for a person (nothing if empty), or the fields."""
    state = run_state()
    if state.json:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        message = {"message": text} if text else {}
        about = {"time": now, "level": level, "event": event}
        line = json.dumps({**about, **state.fields, **fields, **message})
    else:
        line = text
    if line:
        tqdm.write(line, sys.stderr)  # above a bar that is being drawn
        sys.stderr.flush()

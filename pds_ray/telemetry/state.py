"""The state that the log and the progress bars of one run share.

Each thread that begins a run has a state of its own, so that two runs in one process do not mix.
A thread that works for a run is started by `start_thread` and shares the run's state.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm


@dataclass
class RunState:
    """The form and the fields of a run's events, and what the run is doing."""

    json: bool = False
    fields: dict[str, str] = field(default_factory=dict)
    """Fields of all events, such as the run and its stage."""
    bar: tqdm | None = None
    """The bar that is open."""
    waiting_for: Callable[[], str] | None = None
    """Describes what the run is waiting for; called by the bar's watchdog."""


_state: ContextVar[RunState] = ContextVar("pds_ray_run_state")


def run_state() -> RunState:
    """Return the state of the run in this thread; a thread without one gets one."""
    state = _state.get(None)
    if state is None:
        state = RunState()
        _state.set(state)
    return state


@contextmanager
def sharing(state: RunState) -> Iterator[None]:
    """Make `state` that of this thread in the block."""
    token = _state.set(state)
    try:
        yield
    finally:
        _state.reset(token)


def start_thread(work: Callable[..., None], *args: Any) -> threading.Thread:
    """Start `work(*args)` in a daemon thread that shares the state of the caller's run."""
    state = run_state()

    def work_for_run() -> None:
        with sharing(state):
            work(*args)

    thread = threading.Thread(target=work_for_run, daemon=True)
    thread.start()
    return thread

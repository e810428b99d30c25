"""Progress bars: with rate and ETA on a terminal, a line now and then in a log file.

Each bar has a watchdog, a thread that moves the bar ahead of the results by what workers report,
and says so when nothing gets on for a while, with what the run is waiting for.
"""

from __future__ import annotations

import io
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from tqdm import tqdm

from pds_ray.telemetry import log
from pds_ray.telemetry.state import run_state, sharing, start_thread

LOG_INTERVAL_S = 10.0
LINE = "{l_bar}{n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
LINE_WITHOUT_TOTAL = "{desc}: {n_fmt} [{elapsed}, {rate_fmt}{postfix}]"
QUIET_S = 10.0
"""Delay before a bar is shown for work outside a stage."""
STALL_S = 120.0
"""Time without progress after which the watchdog reports; then after twice as long, and so on."""


@dataclass(frozen=True)
class State:
    """The progress of the work that has the open bar."""

    label: str
    unit: str
    done: int
    total: int | None
    per_s: float | None
    """The rate of this session alone."""
    eta_s: float | None
    note: str


def current() -> State | None:
    """Return the state of the run's open bar, if one is open."""
    bar = run_state().bar  # read once: another thread may close it
    return None if bar is None else _state(bar)


def _state(bar: tqdm) -> State:
    seconds = bar.format_dict["elapsed"]
    rate = (bar.n - bar.initial) / seconds if seconds and bar.n > bar.initial else None
    eta = max(0, bar.total - bar.n) / rate if rate and bar.total is not None else None
    return State(
        bar.desc.rstrip(" :"),
        bar.unit.strip(),
        int(bar.n),
        None if bar.total is None else int(bar.total),
        rate and round(rate, 3),
        eta if eta is None else round(eta, 1),
        str(bar.postfix or "").lstrip(", "),
    )


class Reports(Protocol):
    """Reports of workers on work whose results are still to come."""

    def read(self) -> None:
        """Read the reports anew; may take seconds."""
        ...

    def ahead(self) -> int:
        """Return the units that are done ahead of their results, as of the last reading."""
        ...

    def progress(self) -> object:
        """Return a value that changes whenever any work gets on."""
        ...

    def describe(self) -> str:
        """Name what is being done, for a person; "" if nothing is."""
        ...


class Bar(tqdm):
    """A bar of finished units, moved ahead of them by those that workers report."""

    def __init__(self, **settings: Any) -> None:
        self.finished = settings["initial"]
        self._reports: Reports | None = None
        self._note = self._own_note = ""
        self._moving = threading.Lock()  # the watchdog moves it, too
        super().__init__(**settings)

    def update(self, n: float | None = 1) -> bool | None:
        """Count `n` more units as finished."""
        with self._moving:
            self.finished += n
            return self._move()

    def follow(self, reports: Reports | None) -> None:
        """Let the bar run ahead by what workers report from now on."""
        with self._moving:
            self._reports = reports
            self._show_note("")
            self._move()

    def look(self) -> None:
        """Read the reports anew; before anything is done, they are the bar's note."""
        reports = self._reports  # read once: another thread may take it back
        if reports is None:
            return
        reports.read()
        with self._moving:
            self._move()
            if self._reports is reports:
                waits = self.n == self.initial
                named = waits and f"waiting for {reports.describe() or 'a free worker'}"
                self._show_note(named or "")

    def progress(self) -> object:
        """Return a value that changes whenever any of the work gets on."""
        return self.n, self._reports and self._reports.progress()

    def waiting_for(self) -> str:
        """Name what the run is waiting for."""
        reports, describe = self._reports, run_state().waiting_for  # others may take them back
        named = (reports.describe() if reports else "") or (describe() if describe else "")
        if reports:
            return named or "a free worker: none is at work"
        return str(named or self.postfix or "its first result")

    def __str__(self) -> str:
        """Return the text of the bar; a slow rate, tqdm's `1.30s/ pairs`, is `1.30 s per pair`."""
        return super().__str__().replace(f"s/{self.unit}", f" s per{self.unit.removesuffix('s')}")

    def _show_note(self, note: str) -> None:
        """Show a note in place of the bar's own one, which comes back for an empty note."""
        shown = str(self.postfix or "")
        if shown != self._note:
            self._own_note = shown
        if note or shown == self._note:
            self._note = note
            self.set_postfix_str(note or self._own_note, refresh=False)

    def _move(self) -> bool | None:
        ahead = self._reports.ahead() if self._reports else 0
        moved = super().update(self.finished + ahead - self.n)
        if self.n > self.initial and not self.dynamic_miniters:
            self.miniters = 1  # no line in a log without progress, but for those before the first
        return moved


class _JsonBar(Bar):
    """A bar that is written as an event now and then."""

    def __init__(self, **settings: Any) -> None:
        self._run = run_state()  # a thread of tqdm's own displays bars that are seldom updated
        super().__init__(**settings)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:  # noqa: ARG002
        if msg is None:
            with sharing(self._run):
                log.event("progress", **asdict(_state(self)))


class _Lines(io.TextIOBase):
    """A stream that turns a bar redrawn in place into lines, for logs."""

    def write(self, text: str) -> int:
        if line := text.strip():
            print(line, file=sys.stderr, flush=True)
        return len(text)


def on_terminal() -> bool:
    """Return whether bars are written to a terminal; the stream of a notebook need be no file."""
    return getattr(sys.stderr, "isatty", bool)()


@contextmanager
def progress_bar(
    label: str, total: int | None, unit: str, done: int = 0, delay_s: float = 0.0
) -> Iterator[Bar]:
    """Open a bar named `label` that counts `unit`s up to `total`, with `done` finished earlier.

    Work that takes no longer than `delay_s` shows nothing. On a terminal the bar is redrawn in
    place; elsewhere it prints a line every LOG_INTERVAL_S seconds and one at the end. Call
    `.update(n)` for work done, `.follow(reports)` to show what is done ahead of that, and
    `.set_postfix_str(text, refresh=False)` for a note.
    """
    interactive = on_terminal() and not log.is_json()
    with (
        (_JsonBar if log.is_json() else Bar)(
            # whatever TQDM_DISABLE says: a bar that is disabled does not count, and its count is
            # what the watchdog and the heartbeat go by
            disable=False,
            total=total,
            initial=done,
            desc=f"{label:<12}",
            unit=f" {unit}",
            file=sys.stderr if interactive else _Lines(),
            mininterval=0.2 if interactive else LOG_INTERVAL_S,
            # else a thread of tqdm's looks after a bar that slows down, and writes lines twice
            miniters=None if interactive else 0,
            maxinterval=LOG_INTERVAL_S,
            delay=max(delay_s, 0 if interactive else 1e-9),  # no line at 0 %
            leave=interactive,
            smoothing=0.1 if interactive else 0,  # a log tells the mean rate
            dynamic_ncols=interactive,
            position=None if interactive else 0,  # lines of two runs do not move each other
            ascii=None if interactive else True,
            bar_format=None if interactive else LINE if total is not None else LINE_WITHOUT_TOTAL,
        ) as bar,
        _watchdog(label, bar),
        _current(bar),
    ):
        yield bar
        bar.follow(None)
        shown = bar.last_print_n == bar.n > bar.initial
        if not interactive and not shown and bar.format_dict["elapsed"] >= delay_s:
            bar.refresh()  # the last line, with the mean rate


@contextmanager
def _current(bar: Bar) -> Iterator[None]:
    state = run_state()
    state.bar = bar
    try:
        yield
    finally:
        state.bar = None


def waiting_for(describe: Callable[[], str] | None) -> None:
    """Set the callback that describes what the run is waiting for, called in another thread."""
    run_state().waiting_for = describe


@contextmanager
def _watchdog(label: str, bar: Bar) -> Iterator[None]:
    ended = threading.Event()
    waiting_for(None)
    start_thread(_watch, label, bar, ended)
    try:
        yield
    finally:
        ended.set()
        waiting_for(None)


def _watch(label: str, bar: Bar, ended: threading.Event) -> None:
    known, since, patience = bar.progress(), time.monotonic(), STALL_S
    while not ended.wait(min(1.0, STALL_S / 4)):
        bar.look()
        waited = time.monotonic() - since
        if (now := bar.progress()) != known:
            known, since, patience = now, time.monotonic(), STALL_S
        elif waited >= patience:
            patience *= 2
            what = bar.waiting_for()
            text = f"{label}: nothing finished for {waited:.0f} s; waiting for {what}"
            log.event("stalled", text, "warning", seconds=round(waited), waiting_for=what)

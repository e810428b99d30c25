"""Progress as a person wants it: a bar with rate and ETA on a terminal, a line now and then in a log file.

Each bar has a watchdog: where nothing gets finished for a while, it says so, and what is being waited for.
"""

from __future__ import annotations

import io
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from tqdm import tqdm

from pds_ray.telemetry import log

LOG_INTERVAL_S = 10.0
LINE = "{l_bar}{n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
LINE_WITHOUT_TOTAL = "{desc}: {n_fmt} [{elapsed}, {rate_fmt}{postfix}]"
QUIET_S = 10.0
"""As `delay_s`: what is no stage is worth a bar only when it takes long."""
STALL_S = 120.0
"""Without progress for so long, the watchdog speaks; then after twice as long, and so on."""

_bar: tqdm | None = None  # the one that is open: there is one at a time
_waiting_for: Callable[[], str] | None = None  # what its watchdog asks


@dataclass(frozen=True)
class State:
    """How far what is under way has come."""

    label: str
    unit: str
    done: int
    total: int | None
    per_s: float | None
    """Of what was done in this sitting."""
    eta_s: float | None
    note: str


def current() -> State | None:
    """The state of the bar that is open."""
    bar = _bar  # once: another thread may close it
    return None if bar is None else _state(bar)


def _state(bar: tqdm) -> State:
    seconds = bar.format_dict["elapsed"]
    rate = (bar.n - bar.initial) / seconds if seconds and bar.n > bar.initial else None
    eta = (bar.total - bar.n) / rate if rate and bar.total is not None else None
    return State(
        bar.desc.rstrip(" :"),
        bar.unit.strip(),
        int(bar.n),
        None if bar.total is None else int(bar.total),
        rate and round(rate, 3),
        eta if eta is None else round(eta, 1),
        str(bar.postfix or "").lstrip(", "),
    )


class _JsonBar(tqdm):
    """A bar that is an event now and then."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:  # noqa: ARG002 - tqdm's signature
        if msg is None:
            log.event("progress", **asdict(_state(self)))


class _Lines(io.TextIOBase):
    """Turns a bar redrawn in place into lines, for logs."""

    def write(self, text: str) -> int:
        if line := text.strip():
            print(line, file=sys.stderr, flush=True)
        return len(text)


@contextmanager
def progress_bar(
    label: str, total: int | None, unit: str, done: int = 0, delay_s: float = 0.0
) -> Iterator[tqdm]:
    """A bar named `label` counting `unit`s up to `total`, of which `done` were finished earlier.

    With a `delay_s` nothing is shown of what takes no longer.

    On a terminal it is redrawn in place; elsewhere it prints a line every LOG_INTERVAL_S seconds and one at the end.
    Call `.update(n)` for work done and `.set_postfix_str(text, refresh=False)` for what else is worth seeing.
    """
    interactive = sys.stderr.isatty() and not log.is_json()
    with (
        (_JsonBar if log.is_json() else tqdm)(
            total=total,
            initial=done,
            desc=f"{label:<12}",
            unit=f" {unit}",
            file=sys.stderr if interactive else _Lines(),
            mininterval=0.2 if interactive else LOG_INTERVAL_S,
            maxinterval=LOG_INTERVAL_S,
            delay=max(delay_s, 0 if interactive else 1e-9),  # no line at 0 %
            leave=interactive,
            smoothing=0.1 if interactive else 0,  # a log tells the mean rate
            dynamic_ncols=interactive,
            ascii=None if interactive else True,
            bar_format=None if interactive else LINE if total is not None else LINE_WITHOUT_TOTAL,
        ) as bar,
        _watchdog(label, bar),
        _current(bar),
    ):
        yield bar
        told = bar.last_print_n == bar.n > bar.initial
        if not interactive and not told and bar.format_dict["elapsed"] >= delay_s:
            bar.refresh()  # the last line, with the mean rate


@contextmanager
def _current(bar: tqdm) -> Iterator[None]:
    global _bar  # noqa: PLW0603 - a process does one thing at a time
    _bar = bar
    try:
        yield
    finally:
        _bar = None


def waiting_for(describe: Callable[[], str] | None) -> None:
    """What the open bar's watchdog asks, in a thread of its own, when nothing gets finished."""
    global _waiting_for  # noqa: PLW0603 - who waits is deep below who opened the bar
    _waiting_for = describe


@contextmanager
def _watchdog(label: str, bar: tqdm) -> Iterator[None]:
    ended = threading.Event()
    waiting_for(None)
    threading.Thread(target=_watch, args=(label, bar, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        waiting_for(None)


def _watch(label: str, bar: tqdm, ended: threading.Event) -> None:
    count, since, patience = bar.n, time.monotonic(), STALL_S
    while not ended.wait(min(1.0, STALL_S / 4)):
        waited = time.monotonic() - since
        if bar.n != count:
            count, since, patience = bar.n, time.monotonic(), STALL_S
        elif waited >= patience:
            patience *= 2
            describe = _waiting_for  # once: another thread may take it back
            what = (describe() if describe else bar.postfix) or "its first result"
            text = f"{label}: nothing finished for {waited:.0f} s; waiting for {what}"
            log.event("stalled", text, "warning", seconds=round(waited), waiting_for=what)
